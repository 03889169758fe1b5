"""A forecast for people."""

from common.progress import duration, size
from common.report import Table
from common.terminal import say, say_table
from precompute.forecast.estimate import Range
from precompute.forecast.forecast import Forecast

HEADER = ["phase", "shards", "rows", "tokens", "stored", "start", "hours", "GPU-hours", "cost"]


def show(forecast: Forecast) -> None:
    """The table, what its ranges mean, and the advice."""
    rows = [
        [
            phase.phase,
            f"{phase.shards:,}",
            f"{phase.rows:,}",
            _counts(phase.tokens),
            _sizes(phase.stored),
            duration(3600 * phase.startup_h) if phase.startup_h is not None else "-",
            _hours(phase.hours),
            _hours(phase.gpu_hours),
            _money(phase.cost),
        ]
        for phase in forecast.phases
    ]
    total = ["together", "", "", "", *(_sizes(each) for each in [forecast.total("stored")] if each)]
    rows.append([
        *total, "", _hours(forecast.total("hours")), _hours(forecast.total("gpu_hours")), _money(forecast.total("cost"))
    ])  # fmt: skip
    say_table(Table(HEADER, rows), right=range(1, len(HEADER)))
    for line in explanation(forecast):
        say(line)


def explanation(forecast: Forecast) -> list[str]:
    """What the numbers rest on, a sentence a line."""
    pilot = forecast.pilot
    if pilot is None:
        return [
            "Without a pilot: every completion as long as sampling.max_tokens allows, at most; hours are not known."
        ]
    lines = [
        f"pilot: {pilot.prompts} prompts, {pilot.rows} rows of {pilot.mean_tokens:,.0f} tokens on average, "
        f"{pilot.truncated:.0%} cut off at the longest length",
        "low and high: the mean length with 90% confidence, and the speed of the pilot's first half and of all of it; "
        "hours count the start of the engines once, and are of this box with all of its replicas",
    ]
    if pilot.fills < 1:
        lines.append(
            f"the pilot filled the engine to {pilot.fills:.0%} of engine.max_num_seqs, so the job will be faster than "
            f"told; --pilot {max(1, round(pilot.prompts / pilot.fills))} would fill it"
        )
    if (advice := forecast.advice) is not None:
        lines.append(
            f"advice: prompts_per_shard={advice.prompts_per_shard} (now {forecast.prompts_per_shard}): a shard of "
            f"{duration(advice.seconds)} and {size(advice.stored)}; {advice.reason}"
        )
    return lines


def _counts(numbers: Range) -> str:
    return _between(f"{numbers.low:,.0f}", f"{numbers.high:,.0f}")


def _sizes(numbers: Range) -> str:
    return _between(size(numbers.low), size(numbers.high))


def _hours(numbers: Range | None) -> str:
    return _between(f"{numbers.low:,.2f}", f"{numbers.high:,.2f}") if numbers is not None else "-"


_money = _hours


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
