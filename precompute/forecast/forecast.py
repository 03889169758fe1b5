"""What `lopd precompute run` would take: its checks, a pilot of both phases, and what follows from it."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from common.config import Frozen
from common.errors import UsageError
from common.prompts import PromptSet
from precompute.checks.preflight import Place, check_run, place_of, require, summary_lines
from precompute.config import Generate, Score
from precompute.forecast.estimate import Advice, Box, Measured, PhaseEstimate, Range, Size, advise, estimate
from precompute.forecast.pilot import draw, pilot_rollouts, pilot_scores
from precompute.plan import plan_generation


class PilotFacts(Frozen):
    """What the pilot was and saw."""

    prompts: int
    rows: int
    mean_tokens: float
    truncated: float
    """Share of completions that were cut off at the longest length."""
    fills: float
    """Rows of the pilot for each that an engine takes at once: below 1, the job will be faster than the pilot."""


class Forecast(Frozen):
    """The answer of `lopd precompute plan`."""

    checks: tuple[str, ...]
    pilot: PilotFacts | None
    phases: tuple[PhaseEstimate, ...]
    advice: Advice | None
    prompts_per_shard: int
    """As it is set now."""

    def total(self, what: str) -> Range | None:
        """`hours`, `gpu_hours`, `cost` or `stored` of all phases together; None where one does not say."""
        parts: list[Range | None] = [getattr(phase, what) for phase in self.phases]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return Range(low=sum(part.low for part in known), high=sum(part.high for part in known))


def forecast(generate: Generate, score: Score, prompts: PromptSet, pilot: int, tell: Callable[[str], None]) -> Forecast:
    """Check both phases, try `pilot` prompts, and carry over what they took; 0 leaves it at what is bound to hold.

    Raises:
        LopdError: whatever `run` would refuse, or the pilot met.
    """
    planned = plan_generation("rollouts", generate, prompts)
    places = (place_of(generate), place_of(score))
    checks = check_run(generate, prompts, planned, score, places)
    require(checks)
    for line in summary_lines(checks):
        tell(line)
    size = Size(
        len(prompts.prompts), generate.sampling.samples, generate.sampling.max_tokens, generate.prompts_per_shard
    )
    scored = Size(size.prompts, size.samples, size.max_tokens, size.prompts_per_shard, score.topk)
    seen = _try(generate, score, prompts, pilot, places, tell) if pilot else (None, None)
    rollouts, scores = seen
    return Forecast(
        checks=tuple(check.line for check in checks),
        pilot=_facts(rollouts, generate.engine.max_num_seqs) if rollouts else None,
        phases=(
            estimate("rollouts", size, _box(generate, places[0]), rollouts),
            estimate("score", scored, _box(score, places[1]), scores),
        ),
        advice=_advice(rollouts, scores, size, len(places[0].slots)) if rollouts and scores else None,
        prompts_per_shard=size.prompts_per_shard,
    )


def _try(
    generate: Generate,
    score: Score,
    prompts: PromptSet,
    pilot: int,
    places: tuple[Place, Place],
    tell: Callable[[str], None],
) -> tuple[Measured, Measured]:
    """Both phases of the pilot, one after the other, in a folder that is removed."""
    if any(place.elsewhere for place in places):
        raise UsageError("a pilot runs on this box, not on a cluster", fix="Give --pilot 0, or leave --on ray out")
    with TemporaryDirectory(prefix="lopd-pilot-") as folder:
        file = Path(folder) / "prompts.jsonl"
        draw(prompts, pilot, generate.sampling.seed, file)
        tell(f"pilot: sampling {min(pilot, len(prompts.prompts))} prompts")
        rollouts = pilot_rollouts(generate, file, places[0].slots[0], Path(folder))
        tell("pilot: scoring them")
        return rollouts, pilot_scores(score, places[1].slots[0], Path(folder))


def _box(section: Generate | Score, place: Place) -> Box:
    gpus = sum(len(slot.devices) for slot in place.slots)
    return Box(len(place.slots), gpus, section.fleet.price_per_hour)


def _facts(seen: Measured, at_once: int) -> PilotFacts:
    return PilotFacts(
        prompts=len(seen.completions),
        rows=seen.rows,
        mean_tokens=seen.tokens / seen.rows,
        truncated=seen.truncated / seen.rows,
        fills=seen.rows / at_once,
    )


def _advice(rollouts: Measured, scores: Measured, size: Size, replicas: int) -> Advice:
    """By the slower phase, for both have the same shards, and by the larger object."""
    prompts = len(rollouts.completions)
    seconds = max(each.work / prompts / each.steady for each in (rollouts, scores))
    return advise(seconds, max(rollouts.stored, scores.stored) / prompts, size.prompts, replicas)
