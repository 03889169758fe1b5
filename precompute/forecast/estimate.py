"""What a job will take, from what a pilot took: arithmetic alone, on numbers that are given.

Low and high of a number are the ends of what the pilot leaves open: the mean completion length lies between them with
90 % confidence (Student's t over the means of the prompts, for samples of one prompt are alike), and the speed between
that of the whole pilot, with its ramp and its tail, and that of its first half, when the engine was fullest. They do
not bound what a pilot cannot see: other prompts, other boxes, deaths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.config import Frozen

T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
"""Student's t with 1, 2, ... degrees of freedom that 95 % lie below; beyond 15 it is within 7 % of the normal's."""
NORMAL_95 = 1.645
BYTES_A_TOKEN = 8.5
"""At most, of ids and two log-probs as they are stored; further columns come on top."""
SHARD_S = (300.0, 600.0)
SHARD_BYTES = (32e6, 128e6)
"""A shard should be so long at work and so large: what a death costs, and what a store likes."""
SHARDS_A_REPLICA = 4
"""At least, so that replicas end at about the same time."""


class Range(Frozen):
    """Between these two."""

    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(low=self.low + other.low, high=self.high + other.high)

    def times(self, factor: float) -> "Range":
        return Range(low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True)
class Measured:
    """What a pilot of one phase saw, on one replica."""

    completions: Mapping[str, Sequence[int]]
    """Completion lengths in tokens, by prompt."""
    work: int
    """Tokens the engine was paid for: sampled ones, or those of prompt and completion that were scored."""
    seconds: float
    """From the first row in the engine to the last row out of it."""
    steady: float
    """Tokens of work a second while the engine was fullest."""
    startup_s: float
    """Until the engine took its first row."""
    stored: int
    """Bytes of the shard."""
    truncated: int
    """Completions that were cut off at the longest length."""

    @property
    def rows(self) -> int:
        return sum(map(len, self.completions.values()))

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.completions.values()))


class PhaseEstimate(Frozen):
    """One phase of the whole job, on this box."""

    phase: str
    shards: int
    rows: int
    tokens: Range
    """Of completions."""
    stored: Range
    """Bytes."""
    startup_h: float | None
    """Hours until the engines take their first row; None without a pilot."""
    hours: Range | None
    """Of this box, start and all; None without a pilot."""
    gpu_hours: Range | None
    cost: Range | None
    """In the currency of the price; None without one."""
    rate: Range | None
    """Tokens of completions a second, of all replicas together."""


@dataclass(frozen=True)
class Size:
    """The whole job."""

    prompts: int
    samples: int
    max_tokens: int
    prompts_per_shard: int
    topk: int = 0

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def shards(self) -> int:
        return math.ceil(self.prompts / self.prompts_per_shard)


@dataclass(frozen=True)
class Box:
    """Where it runs."""

    replicas: int
    gpus: int
    """That the replicas have together; 0 on a CPU."""
    price_per_hour: float | None = None


def mean_length(completions: Mapping[str, Sequence[int]], max_tokens: int) -> Range:
    """Where the mean completion length lies, within what is possible; anywhere after a pilot of one prompt."""
    means = np.array([np.mean(lengths) for lengths in completions.values()])
    freedom = len(means) - 1
    if freedom < 1:
        return Range(low=1, high=max_tokens)
    t = T_95[freedom - 1] if freedom <= len(T_95) else NORMAL_95
    reach = t * float(means.std(ddof=1)) / math.sqrt(len(means))
    mean = float(means.mean())
    return Range(low=max(1.0, mean - reach), high=min(float(max_tokens), mean + reach))


def estimate(phase: str, size: Size, box: Box, seen: Measured | None) -> PhaseEstimate:
    """The phase as the pilot foretells it; without one, what its settings allow at most."""
    if seen is None:
        tokens = Range(low=size.rows, high=size.rows * size.max_tokens)
        stored = tokens.times(BYTES_A_TOKEN + 8 * size.topk)
        return PhaseEstimate(
            phase=phase, shards=size.shards, rows=size.rows, tokens=tokens, stored=stored,
            startup_h=None, hours=None, gpu_hours=None, cost=None, rate=None,
        )  # fmt: skip
    tokens = mean_length(seen.completions, size.max_tokens).times(size.rows)
    speeds = sorted((seen.work / seen.seconds, seen.steady))
    share = seen.tokens / seen.work  # of the tokens that are paid for, those of completions
    rate = Range(low=speeds[0], high=speeds[1]).times(share * box.replicas)
    startup = seen.startup_s / 3600
    hours = Range(low=startup + tokens.low / rate.high / 3600, high=startup + tokens.high / rate.low / 3600)
    return PhaseEstimate(
        phase=phase,
        shards=size.shards,
        rows=size.rows,
        tokens=tokens,
        stored=tokens.times(seen.stored / seen.tokens),
        startup_h=startup,
        hours=hours,
        gpu_hours=hours.times(box.gpus) if box.gpus else None,
        cost=hours.times(box.price_per_hour) if box.price_per_hour is not None else None,
        rate=rate,
    )


class Advice(Frozen):
    """How many prompts a shard should have, and what one then takes of a replica and of a store."""

    prompts_per_shard: int
    seconds: float
    stored: float
    reason: str


def advise(seconds_a_prompt: float, bytes_a_prompt: float, prompts: int, replicas: int) -> Advice:
    """A shard of 5 to 10 minutes and at most 128 MB; less where the replicas would else get too few to share.

    Args:
        seconds_a_prompt: of one replica, all samples of the prompt together.
    """
    by_time = sum(SHARD_S) / 2 / seconds_a_prompt
    by_size = SHARD_BYTES[1] / bytes_a_prompt
    by_share = prompts / (SHARDS_A_REPLICA * replicas)
    best = min(by_time, by_size, by_share)
    reasons = {
        by_share: f"the job is short: {SHARDS_A_REPLICA} shards a replica",
        by_size: "more would be too large an object",
        by_time: "5 to 10 minutes a shard",
    }
    count = max(1, int(best))
    return Advice(
        prompts_per_shard=count,
        seconds=count * seconds_a_prompt,
        stored=count * bytes_a_prompt,
        reason=reasons[best],
    )


def steady_rate(lengths: Sequence[int], left_at: Sequence[float], entered: Sequence[bool], *, partial: bool) -> float:
    """Tokens a second up to the moment when half of the rows have left the engine.

    Rows that are sampled side by side grow by a token a step each, so one that is still inside has then about as many
    tokens as the longest that has left.

    Args:
        lengths: tokens of work of each row.
        left_at: when each left, in seconds since the first entered.
        entered: whether each had entered by that moment.
        partial: whether rows grow token by token; else those inside count for nothing yet.
    """
    order = np.argsort(np.asarray(left_at))
    sizes, times = np.asarray(lengths)[order], np.asarray(left_at)[order]
    half = times[(len(times) - 1) // 2]
    gone = times <= half
    inside = np.minimum(sizes, sizes[gone].max()) * np.asarray(entered)[order] * ~gone
    return float((sizes[gone].sum() + (inside.sum() if partial else 0)) / max(half, 1e-9))
