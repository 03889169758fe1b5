"""Means over seeds, and how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5% quantiles of Student's t distribution by degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """Of several seeds, with the 95% interval of Student's t."""

    mean: float
    half: float
    """Half the width of the interval."""
    values: tuple[float, ...]
    """By seed, in their order."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Two values at least, ten at most."""
        count = len(values)
        mean = math.fsum(values) / count
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, T95[count - 1] * math.sqrt(variance / count), tuple(values))

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0: nothing is shown."""
        return int(self.low > 0) - int(self.high < 0)

    def agrees(self, recorded: "Mean", allowed: float = 0.0) -> bool:
        """Whether this may be another mean of what `recorded` is a mean of.

        Both intervals are taken from the spread of the recorded values: that of two values alone, thirteen times their
        standard error, is wider than any fault.

        Args:
            allowed: how far apart they may be beyond that.
        """
        own = recorded.half * math.sqrt(len(recorded.values) / len(self.values))
        return abs(self.mean - recorded.mean) <= recorded.half + own + allowed

    def __str__(self) -> str:
        """With two digits of the interval at least, so that it is seen on which side of zero it ends."""
        decimals = max(3, 1 - math.floor(math.log10(self.half))) if self.half > 1e-6 else 3
        return f"{self.mean:.{decimals}f} ± {self.half:.{decimals}f}"


def difference(one: Sequence[float], other: Sequence[float]) -> Mean:
    """one - other, seed by seed: what two arms of one seed share (start, prompts, rollouts) cancels."""
    return Mean.of([a - b for a, b in zip(one, other, strict=True)])
