"""How far stored log-probs are from recomputed ones, and whether that is what the arithmetic allows. Pure numpy.

A mean alone lets a shift by one token through: the shifted column is made of the same numbers. So all is compared per
token, in place and one token to either side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CLEARLY = 0.25
"""In place, the mean difference must be below this share of what it is one token to either side."""
MIN_TOKENS = 32
"""Fewer tokens than this cannot tell the offsets apart; the limits hold all the same."""
MIN_SHARE = 0.5
"""Of the tokens that were scored again: when more are left out as unsure, the others speak for too few."""
TOPK_SHARE = 2.0
"""The k most likely ids reach down to unlikely ones, whose log-probs are noisier: their mean may be so much larger."""


class Rescored(NamedTuple):
    """One row, scored again."""

    logprobs: np.ndarray  # (tokens,) float32 nats
    blur: np.ndarray  # (tokens,) float32 nats by which an unsure edge of top-p, top-k or min-p may move them
    outside: np.ndarray  # (tokens,) bool: cut off by top-p, top-k or min-p, so it could not be sampled
    at_ids: np.ndarray  # (tokens, k) float32 nats, at the stored top-k ids; k may be 0
    kth: np.ndarray  # (tokens,) float32 nats, of the k-th most likely id; NaN when k is 0


@dataclass(frozen=True)
class Row:
    """A row as it is stored, and as it was scored again."""

    uid: str
    completion_ids: np.ndarray  # (tokens,) int32
    stored: np.ndarray  # (tokens,) float32 nats
    again: Rescored
    topk_ids: np.ndarray | None = None  # (tokens, k) int32
    topk_logprobs: np.ndarray | None = None  # (tokens, k) float32 nats; None where only the ids are stored
    ranked: bool = True  # whether these are said to be the most likely ids of the model that scores again


@dataclass(frozen=True)
class Limits:
    """What two forward passes of one model may differ by, in nats."""

    mean: float
    largest: float
    noise: float
    """Of a logit: how unsure the edge of top-p, top-k or min-p is."""
    outside: float
    """Share of tokens that may lie beyond that edge."""


LIMITS = {
    "float32": Limits(mean=5e-4, largest=2e-3, noise=5e-4, outside=0.0),
    "float16": Limits(mean=0.01, largest=0.3, noise=0.02, outside=1e-3),
    "bfloat16": Limits(mean=0.06, largest=2.0, noise=0.1, outside=1e-3),
}
"""By the coarser dtype of the two passes. SmolLM2-135M measured against float32, mean and largest: 3e-6 and 1e-4 from a
float32 engine; 0.04 and 0.6 from a bfloat16 one with its head in bfloat16, on a CPU that multiplies in tiles; 0.01 and
0.3 with its head in float32 and top-p 0.9. One token to either side it is 0.5 to 3 on average."""


@dataclass(frozen=True)
class Offset:
    """Recomputed against stored log-probs with the stored ones moved by some tokens."""

    mean: float  # of |d|
    correlation: float | None  # None where it is undefined


@dataclass(frozen=True)
class RowGap:
    """One row's differences."""

    uid: str
    tokens: int
    mean: float  # of |d|
    largest: float


@dataclass(frozen=True)
class TopkAgreement:
    """The stored k ids at each position and their log-probs."""

    k: int
    mean: float | None  # of |d|; None where no log-probs are stored
    largest: float | None
    shortfall: float | None  # nats by which the least likely stored id is below the recomputed k-th, at worst; None
    # where another model's most likely ids are stored
    repeated: int  # positions that name an id twice


@dataclass(frozen=True)
class Agreement:
    """Stored against recomputed log-probs of one column; d = stored - recomputed, in nats."""

    rows: int
    tokens: int
    here: Offset
    before: Offset  # against the stored value one token earlier
    after: Offset  # and one token later
    signed: float  # mean of d
    p99: float  # of |d|
    largest: float  # of |d|, and where:
    uid: str
    position: int  # in the completion, from 0
    token: int
    blurred: int  # tokens left out of all figures: the edge of top-p, top-k or min-p is unsure there
    broken: int  # tokens left out of all figures: their recomputed log-prob, or one of the top k, is NaN or infinite
    outside: int  # tokens that top-p, top-k or min-p cuts off
    topk: TopkAgreement | None
    by_row: tuple[RowGap, ...]  # worst mean first

    @property
    def scored(self) -> int:
        """Tokens in all, those left out included."""
        return self.tokens + self.blurred + self.broken


def compare(rows: Sequence[Row], limits: Limits) -> Agreement:
    """Compare stored with recomputed log-probs, token by token; at least one row."""
    finite = [_finite(row.again) for row in rows]
    unsure = [row.again.blur > limits.mean for row in rows]
    kept = [whole & ~blurred for whole, blurred in zip(finite, unsure, strict=True)]
    gaps = [np.where(keep, row.stored - row.again.logprobs, 0.0) for row, keep in zip(rows, kept, strict=True)]
    d = np.concatenate([gap[keep] for gap, keep in zip(gaps, kept, strict=True)]).astype(np.float64)
    d = d if len(d) else np.zeros(1)
    row, position = _largest(gaps)
    return Agreement(
        rows=len(rows),
        tokens=_count(kept),
        here=_offset(rows, kept, 0),
        before=_offset(rows, kept, -1),
        after=_offset(rows, kept, 1),
        signed=float(d.mean()),
        p99=float(np.quantile(np.abs(d), 0.99)),
        largest=float(np.abs(d).max()),
        uid=rows[row].uid,
        position=position,
        token=int(rows[row].completion_ids[position]),
        blurred=_count([whole & blurred for whole, blurred in zip(finite, unsure, strict=True)]),
        broken=_count([~whole for whole in finite]),
        outside=_count([each.again.outside for each in rows]),
        topk=_compare_topk(rows, finite),
        by_row=_by_row(rows, gaps, kept),
    )


def faults(found: Agreement, limits: Limits) -> list[str]:
    """What is wrong with the stored column, the plainest sign first; empty when it is what it is said to be."""
    said = []
    if found.broken:
        said.append(f"{found.broken} tokens came back NaN or infinite from the model")
    if found.blurred > (1 - MIN_SHARE) * found.scored:
        said.append(f"only {found.tokens} of {found.scored} tokens could be compared: the rest lie at an unsure edge")
    nearest = min(found.before.mean, found.after.mean)
    if _shift_shows(found, limits) and found.here.mean > CLEARLY * nearest:
        side = "earlier" if found.before.mean < found.after.mean else "later"
        better = "fit better" if found.here.mean > nearest else "fit hardly better in place than"
        said.append(f"the stored log-probs {better} one token {side}")
    if found.here.mean > limits.mean:
        said.append(f"mean |d| {found.here.mean:.3g} is over {limits.mean:g}")
    if found.largest > limits.largest:
        said.append(f"largest |d| {found.largest:.3g} is over {limits.largest:g}")
    if found.outside > limits.outside * found.scored:
        said.append(f"{found.outside} tokens could not be sampled: top-p, top-k or min-p cuts them off")
    return said + (_topk_faults(found.topk, limits) if found.topk else [])


def _shift_shows(found: Agreement, limits: Limits) -> bool:
    """Whether there are enough tokens, and enough variety in them, to tell a shift by one."""
    widest = max(found.before.mean, found.here.mean, found.after.mean)
    return found.tokens >= MIN_TOKENS and widest > limits.mean


def _topk_faults(topk: TopkAgreement, limits: Limits) -> list[str]:
    said = []
    if topk.repeated:
        said.append(f"top-k names an id twice at {topk.repeated} positions")
    if topk.shortfall is not None and topk.shortfall > limits.largest:
        said.append(f"top-k ids are not the {topk.k} most likely: one is {topk.shortfall:.3g} nats below the last")
    if topk.mean is not None and topk.mean > TOPK_SHARE * limits.mean:
        said.append(f"mean |d| {topk.mean:.3g} of the top-k log-probs is over {TOPK_SHARE * limits.mean:g}")
    if topk.largest is not None and topk.largest > limits.largest:
        said.append(f"largest |d| {topk.largest:.3g} of the top-k log-probs is over {limits.largest:g}")
    return said


def _offset(rows: Sequence[Row], kept: Sequence[np.ndarray], offset: int) -> Offset:
    """Recomputed [t] against stored [t + offset], over the tokens that are kept."""
    again, stored = [], []
    for row, keep in zip(rows, kept, strict=True):
        here = np.arange(max(0, -offset), len(keep) - max(0, offset))
        here = here[keep[here]]
        again.append(row.again.logprobs[here])
        stored.append(row.stored[here + offset])
    ours, theirs = np.concatenate(again).astype(np.float64), np.concatenate(stored).astype(np.float64)
    if len(ours) == 0:
        return Offset(0.0, None)
    told = len(ours) > 1 and ours.std() > 0 and theirs.std() > 0
    return Offset(float(np.abs(ours - theirs).mean()), float(np.corrcoef(ours, theirs)[0, 1]) if told else None)


def _finite(again: Rescored) -> np.ndarray:
    """Which tokens the model gave numbers for, (tokens,) bool; an infinite blur is one of these, and merely unsure."""
    told = np.isfinite(again.logprobs) & ~np.isnan(again.blur) & np.isfinite(again.at_ids).all(axis=1)
    return told & np.isfinite(again.kth) if again.at_ids.shape[1] else told


def _count(masks: Sequence[np.ndarray]) -> int:
    return int(sum(mask.sum() for mask in masks))


def _largest(gaps: Sequence[np.ndarray]) -> tuple[int, int]:
    """Row and position of the largest |d|."""
    row = int(np.argmax([np.abs(gap).max() for gap in gaps]))
    return row, int(np.abs(gaps[row]).argmax())


def _by_row(rows: Sequence[Row], gaps: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> tuple[RowGap, ...]:
    table = []
    for row, gap, keep in zip(rows, gaps, kept, strict=True):
        d = np.abs(gap[keep]).astype(np.float64)
        if len(d):
            table.append(RowGap(row.uid, len(d), float(d.mean()), float(d.max())))
    return tuple(sorted(table, key=lambda each: (-each.mean, each.uid)))


def _compare_topk(rows: Sequence[Row], finite: Sequence[np.ndarray]) -> TopkAgreement | None:
    held = [(row, row.topk_ids, keep) for row, keep in zip(rows, finite, strict=True) if row.topk_ids is not None]
    if not held:
        return None
    ranked = np.sort(np.concatenate([ids for _, ids, _ in held]), axis=1)
    d = [np.abs(row.topk_logprobs - row.again.at_ids)[keep] for row, _, keep in held if row.topk_logprobs is not None]
    short = [(row.again.kth - row.again.at_ids.min(axis=1))[keep] for row, _, keep in held if row.ranked]
    return TopkAgreement(
        k=ranked.shape[1],
        mean=float(np.concatenate(d).mean(dtype=np.float64)) if any(map(len, d)) else (0.0 if d else None),
        largest=float(np.concatenate(d).max(initial=0)) if d else None,
        shortfall=float(np.concatenate(short).max()) if any(map(len, short)) else (0.0 if short else None),
        repeated=int((np.diff(ranked, axis=1) == 0).any(axis=1).sum()),
    )
