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
    alignment = Alignment(
        before=_correlation(rollout_logprobs, teacher_logprobs, -1),
        here=_correlation(rollout_logprobs, teacher_logprobs, 0),
        after=_correlation(rollout_logprobs, teacher_logprobs, 1),
        tokens=sum(len(row) for row in rollout_logprobs),
    )
    if alignment.judged and alignment.here <= max(alignment.before, alignment.after):
        raise DataError(
            "teacher log-probs are not aligned with the rollout's tokens: correlation "
            f"{alignment.here:.2f} in place, {alignment.before:.2f} one token earlier, {alignment.after:.2f} one later",
            where=where,
            fix="The columns are shifted or belong to other rows; score the rollouts again",
        )
    return alignment


def _correlation(rollout: Sequence[np.ndarray], teacher: Sequence[np.ndarray], offset: int) -> float:
    """Correlation of rollout[t] with teacher[t + offset] over all rows; NaN where it is undefined."""
    pairs = [_overlap(ours, theirs, offset) for ours, theirs in zip(rollout, teacher, strict=True)]
    ours = np.concatenate([pair[0] for pair in pairs]) if pairs else np.empty(0)
    theirs = np.concatenate([pair[1] for pair in pairs]) if pairs else np.empty(0)
    if len(ours) < 2 or ours.std() == 0 or theirs.std() == 0:
        return float("nan")
    return float(np.corrcoef(ours, theirs)[0, 1])


def _overlap(ours: np.ndarray, theirs: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    if offset < 0:
        return ours[-offset:], theirs[:offset]
    return ours[: len(ours) - offset], theirs[offset:]
