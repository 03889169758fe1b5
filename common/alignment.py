"""Do two log-prob columns speak of the same tokens?

A column shifted by one token has nearly the right mean and passes every check of averages. But two language models
find the same tokens hard, so their log-probs correlate per token at offset 0 and hardly at -1 and +1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import DataError

MIN_TOKENS = 128
"""Below this many tokens a correlation says nothing; `judged` is then False."""


@dataclass(frozen=True)
class Alignment:
    """Pearson correlation of rollout and teacher log-probs with the teacher's column moved by -1, 0 and +1 tokens."""

    before: float
    here: float
    after: float
    tokens: int

    @property
    def judged(self) -> bool:
        """Whether there were enough tokens, and enough variety in them, to say anything."""
        return self.tokens >= MIN_TOKENS and bool(np.isfinite([self.before, self.here, self.after]).all())


@dataclass(frozen=True)
class Moments:
    """Count, means and summed products of deviations of pairs (rollout, teacher), from which correlations follow.

    Those of two sets of rows add up to those of their union, so that a dataset of any size is judged without being
    held (Chan, Golub and LeVeque 1979).
    """

    count: int
    mean: np.ndarray  # (2,) nats
    scatter: np.ndarray  # (2, 2) nats squared

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def correlation(self) -> float:
        """Pearson's; NaN where it is undefined."""
        spread = self.scatter[0, 0] * self.scatter[1, 1]
        if self.count < 2 or spread <= 0:
            return float("nan")
        return float(self.scatter[0, 1] / np.sqrt(spread))


@dataclass(frozen=True)
class Shifts:
    """The moments with the teacher's column moved by -1, 0 and +1 tokens."""

    before: Moments
    here: Moments
    after: Moments

    def __add__(self, other: "Shifts") -> "Shifts":
        return Shifts(self.before + other.before, self.here + other.here, self.after + other.after)

    @property
    def alignment(self) -> Alignment:
        """What they say."""
        return Alignment(self.before.correlation, self.here.correlation, self.after.correlation, tokens=self.here.count)


def measure_shifts(rollout_logprobs: Sequence[np.ndarray], teacher_logprobs: Sequence[np.ndarray]) -> Shifts:
    """The moments of some rows: one array a row, (tokens,) nats each."""
    return Shifts(*(_moments(rollout_logprobs, teacher_logprobs, offset) for offset in (-1, 0, 1)))


def require_aligned(alignment: Alignment, where: str) -> None:
    """Refuse teacher log-probs that fit the rollout better when shifted; `DataError` says where and how much better."""
    if alignment.judged and alignment.here <= max(alignment.before, alignment.after):
        raise DataError(
            "teacher log-probs are not aligned with the rollout's tokens: correlation "
            f"{alignment.here:.2f} in place, {alignment.before:.2f} one token earlier, {alignment.after:.2f} one later",
            where=where,
            fix="The columns are shifted or belong to other rows; score the rollouts again",
        )


def check_alignment(
    rollout_logprobs: Sequence[np.ndarray], teacher_logprobs: Sequence[np.ndarray], *, where: str
) -> Alignment:
    """Refuse teacher log-probs that fit the rollout better when shifted.

    Args:
        rollout_logprobs, teacher_logprobs: one array a row, (tokens,) nats each.
        where: what is being checked, for the message.

    Raises:
        DataError: offset 0 does not correlate best.
    """
    alignment = measure_shifts(rollout_logprobs, teacher_logprobs).alignment
    require_aligned(alignment, where)
    return alignment


def _moments(rollout: Sequence[np.ndarray], teacher: Sequence[np.ndarray], offset: int) -> Moments:
    """Of the pairs (rollout[t], teacher[t + offset]) over all rows."""
    overlaps = [_overlap(ours, theirs, offset) for ours, theirs in zip(rollout, teacher, strict=True)]
    columns = [np.concatenate(column) for column in zip(*overlaps, strict=True)] if overlaps else [np.empty(0)] * 2
    pairs = np.stack(columns).astype(np.float64)  # (2, pairs)
    if not pairs.size:
        return Moments(0, np.zeros(2), np.zeros((2, 2)))
    mean = pairs.mean(axis=1)
    deviations = pairs - mean[:, None]
    return Moments(pairs.shape[1], mean, deviations @ deviations.T)


def _overlap(ours: np.ndarray, theirs: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    if offset < 0:
        return ours[-offset:], theirs[:offset]
    return ours[: len(ours) - offset], theirs[offset:]
