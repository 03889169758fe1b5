"""Running statistics of rollouts: one row group at a time, in memory that does not grow with the dataset.

Every mean over tokens has the standard error of a ratio of sums over rollouts, because the tokens of one rollout are
not independent of each other.
"""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from common.schema import topk_of

QUARTILES = 4
FLOOR = 20.0
"""Log-probs below minus this many nats share the lowest bin of a histogram."""
BIN = 0.1
"""Width of a histogram's bin, in nats."""
STEPS_PER_DOUBLING = 3
"""Bins of position grow with it: three for every doubling."""
MAX_POSITIONS = 1 << 24
TRUNCATED = "length"
"""The finish reason of a completion that was cut off."""


class Lengths:
    """How often each length occurs; quantiles are exact."""

    def __init__(self) -> None:
        self.counts = np.zeros(0, np.int64)  # (longest + 1,)

    def add(self, lengths: np.ndarray) -> None:
        """Count `lengths`, (rows,) of integers."""
        found = np.bincount(lengths, minlength=len(self.counts))
        found[: len(self.counts)] += self.counts
        self.counts = found

    def summary(self) -> dict[str, float]:
        """Mean, median, 95th percentile and maximum, in tokens."""
        total = int(self.counts.sum())
        mean = float(self.counts @ np.arange(len(self.counts))) / total
        return {"mean": mean, "median": self._at(0.5), "p95": self._at(0.95), "max": len(self.counts) - 1}

    def _at(self, share: float) -> int:
        """The shortest length that at least this share of the rows does not exceed."""
        reached = np.cumsum(self.counts)
        return int(np.searchsorted(reached, share * reached[-1]))


class TokenMeans:
    """Means per token in some cells, each with its standard error over rollouts."""

    def __init__(self, cells: int) -> None:
        self.rollouts, self.tokens, self.sums, self._ss, self._sn, self._nn = np.zeros((6, cells))

    def add(self, sums: np.ndarray, tokens: np.ndarray) -> None:
        """Per rollout and cell, both (rollouts, cells): the sum of the values and the number of tokens."""
        self.rollouts += (tokens > 0).sum(0)
        self.tokens += tokens.sum(0)
        self.sums += sums.sum(0)
        self._ss += (sums * sums).sum(0)
        self._sn += (sums * tokens).sum(0)
        self._nn += (tokens * tokens).sum(0)

    def means(self) -> np.ndarray:
        """(cells,), NaN where there is no token."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.tokens

    def errors(self) -> np.ndarray:
        """Standard errors, (cells,), NaN below two rollouts."""
        means = self.means()
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.maximum(self._ss - 2 * means * self._sn + means**2 * self._nn, 0)
            return np.where(
                self.rollouts > 1, np.sqrt(spread * self.rollouts / (self.rollouts - 1)) / self.tokens, np.nan
            )

    def summary(self, cell: int = 0) -> dict[str, float | None]:
        """Mean and standard error of one cell; None where there are too few rollouts to say."""
        return {"mean": _finite(self.means()[cell]), "standard_error": _finite(self.errors()[cell])}


class Statistics:
    """All that is said of a dataset's rows.

    Args:
        scored: whether the rows have teacher log-probs.
    """

    def __init__(self, scored: bool) -> None:
        self.scored = scored
        self.rows = 0
        self.prompt_lengths, self.completion_lengths = Lengths(), Lengths()
        self.finish_reasons: Counter[str] = Counter()
        bins = round(FLOOR / BIN)
        self.rollout_histogram = np.zeros(bins, np.int64)  # of log-probs in [-FLOOR, 0], lowest first
        self.teacher_histogram = np.zeros(bins, np.int64)
        self.density = np.zeros((bins, bins), np.int64)  # (rollout, teacher)
        self.rollout, self.teacher, self.gap = TokenMeans(1), TokenMeans(1), TokenMeans(1)
        self.by_quartile = TokenMeans(QUARTILES)
        self.by_position = TokenMeans(position_bin(np.array([MAX_POSITIONS]))[0] + 1)
        self.covered, self.topk_mass = TokenMeans(1), TokenMeans(1)

    def add(self, table: pa.Table) -> None:
        """Take in some rows of a dataset, a table of `common.schema`."""
        lengths = _lengths(table, "completion_ids")
        rows = np.repeat(np.arange(len(table)), lengths)  # (tokens,): the rollout of each token
        self.rows += len(table)
        self.prompt_lengths.add(_lengths(table, "prompt_ids"))
        self.completion_lengths.add(lengths)
        self.finish_reasons.update(table["finish_reason"].to_pylist())
        rollout = _flat(table, "rollout_logprobs")
        self.rollout_histogram += _histogram(rollout)
        self.rollout.add(*_per_rollout(rollout, rows, lengths))
        if self.scored:
            self._add_scores(table, rollout, rows, lengths)

    def _add_scores(self, table: pa.Table, rollout: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> None:
        teacher = _flat(table, "teacher_logprobs")
        self.teacher_histogram += _histogram(teacher)
        cells = _bins(rollout) * len(self.density) + _bins(teacher)
        self.density += np.bincount(cells, minlength=self.density.size).reshape(self.density.shape)
        self.teacher.add(*_per_rollout(teacher, rows, lengths))
        gap = teacher - rollout
        self.gap.add(*_per_rollout(gap, rows, lengths))
        position = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        self.by_quartile.add(*_per_rollout(gap, rows, lengths, QUARTILES * position // lengths[rows], QUARTILES))
        self.by_position.add(*_per_rollout(gap, rows, lengths, position_bin(position), len(self.by_position.sums)))
        k = topk_of(table.schema)
        if k:
            ids = _flat(table, "teacher_topk_ids").reshape(-1, k)
            held = (ids == _flat(table, "completion_ids")[:, None]).any(1)
            mass = np.exp(_flat(table, "teacher_topk_logprobs")).reshape(-1, k).sum(1)
            self.covered.add(*_per_rollout(held.astype(np.float64), rows, lengths))
            self.topk_mass.add(*_per_rollout(mass, rows, lengths))

    def summary(self) -> dict[str, Any]:
        """As JSON: lengths in tokens, log-probs in nats, None where a figure cannot be given."""
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt_lengths.summary(),
            "completion_tokens": self.completion_lengths.summary(),
            "finish_reasons": dict(self.finish_reasons.most_common()),
            "truncated_share": self.finish_reasons[TRUNCATED] / self.rows,
            "rollout_logprob": self.rollout.summary(),
        }
        if self.scored:
            found |= {
                "teacher_logprob": self.teacher.summary(),
                "gap": self.gap.summary(),
                "gap_by_quartile": [self.by_quartile.summary(quartile) for quartile in range(QUARTILES)],
            }
        if self.covered.tokens[0]:
            found |= {"topk_holds_token": self.covered.summary(), "topk_mass": self.topk_mass.summary()}
        return found


def position_bin(position: np.ndarray) -> np.ndarray:
    """The bin of a token's position in its completion; bins widen with the position."""
    return np.floor(STEPS_PER_DOUBLING * np.log2(position + 1)).astype(np.int64)


def position_middle(bins: np.ndarray) -> np.ndarray:
    """The position, counted from 1, in the middle of a bin (geometrically)."""
    return 2 ** ((bins + 0.5) / STEPS_PER_DOUBLING)


def _per_rollout(
    values: np.ndarray, rows: np.ndarray, lengths: np.ndarray, cells: np.ndarray | None = None, count: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of `values` and numbers of tokens, both (rollouts, count)."""
    index = rows if cells is None else rows * count + cells
    size = len(lengths) * count
    sums = np.bincount(index, weights=values, minlength=size).reshape(-1, count)
    return sums, np.bincount(index, minlength=size).reshape(-1, count).astype(np.float64)


def _bins(logprobs: np.ndarray) -> np.ndarray:
    count = round(FLOOR / BIN)
    return np.clip(np.floor((logprobs + FLOOR) / BIN).astype(np.int64), 0, count - 1)


def _histogram(logprobs: np.ndarray) -> np.ndarray:
    return np.bincount(_bins(logprobs), minlength=round(FLOOR / BIN))


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    return np.diff(table[name].combine_chunks().offsets.to_numpy()).astype(np.int64)


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """All values of a list column one after another; log-probs as float64, so that sums over many tokens hold."""
    values = table[name].combine_chunks().flatten()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False)
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
