"""The learning rate as a pure function of the step, so that a checkpoint needs no scheduler state."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]


def lr(step: int, *, peak: float, schedule: Schedule, warmup: int, total: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`.

    Linear from peak/warmup to peak over the first `warmup` steps, then constant, or down a half cosine towards 0,
    which it would reach at step `total`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    match schedule:
        case "constant":
            return peak
        case "cosine":
            done = (step - warmup) / max(total - warmup, 1)
            return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
