"""When the rollouts are spent: the student has moved so far from the policy that sampled them that a new round is due.

Three signs, each over a window of steps, for one batch may hold an unlucky token:

    ratio/ess      share of the tokens that still count once each is weighted by pi_theta / pi_rollout
    kl/rollout_k3  KL(rollout policy || student) per token. Two engines in bfloat16 disagree by 1e-3 on the very same
                   weights, so only what lies far above that is drift
    ratio/clipped  share of the tokens whose importance weight is cut, where the gradient is no longer that of the KL

If log-ratios were Gaussian with variance v, ESS would be exp(-v) and k3 about v / 2: the default limits of 0.5 and 0.1
are a variance of 0.7, where half of the sample is lost, and of 0.2, a hundred times the noise.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from trainer.config import OpdConfig, TrainConfig

WINDOW = 5
"""Steps whose median is judged: two of them may be freaks."""
RUNAWAY = 5.0
"""kl/rollout_k1 in nats beyond which the student is no relative of its rollout policy any more: what that sampled is a
hundred and fifty times less likely to it, token by token. Learning moves it by hundredths."""


class Limit(NamedTuple):
    """A metric is a sign of spent rollouts beyond `value`, on the side that `below` says."""

    metric: str
    setting: str
    value: float
    below: bool = False


def limits_of(config: TrainConfig) -> tuple[Limit, ...]:
    """The limits of a run; SFT has none, for its answers are the teacher's."""
    if not isinstance(config, OpdConfig):
        return ()
    return (
        Limit("ratio/ess", "spent_ess", config.spent_ess, below=True),
        Limit("kl/rollout_k3", "spent_k3", config.spent_k3),
        Limit("ratio/clipped", "spent_clipped", config.spent_clipped),
    )


def signs(records: Sequence[Mapping[str, Any]], limits: Sequence[Limit]) -> list[str]:
    """What says after the last of these steps that the rollouts are spent, metric by metric; [] where nothing does."""
    recent = records[-WINDOW:]
    if len(recent) < WINDOW:
        return []
    found = []
    for limit in limits:
        values = [record[limit.metric] for record in recent]
        value = median(values) if None not in values else None
        if value is not None and (value < limit.value if limit.below else value > limit.value):
            side = "below" if limit.below else "over"
            found.append(f"{limit.metric} {value:.3g} is {side} {limit.setting}={limit.value:g}")
    return found


def runaway(record: Mapping[str, Any]) -> str | None:
    """The warning of a step whose student has run away, from the learning rate as a rule; None for any other."""
    drift = record.get("kl/rollout_k1")
    if drift is None or drift <= RUNAWAY:
        return None
    return (
        f"the student has run away: at step {record['step']} it is {drift:.3g} nats a token from the policy that "
        "sampled its rollouts, which no rollout can bring back. Stop it, and begin anew in another output with a "
        "lower lr; do not sample from this student"
    )


def advice(found: Sequence[str], *, output: str, round_: int) -> str:
    """The sentence for the person who watches."""
    return (
        f"the rollouts are spent: {'; '.join(found)} (median of {WINDOW} steps). What follows teaches less and less. "
        f"Sample round {round_ + 1} from this student: let the run end, or stop it and run it once more with max_steps "
        f"at the step it saved, then: make precompute MODEL={output}/export PROMPTS=... CACHE=<a new place>"
    )
