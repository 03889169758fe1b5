"""The figures of a run over its steps, drawn for the report: one run in full, or several over each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.report import BLUE, GREY, RED, Figure, canvas, finish

COLOURS = (BLUE, "#d97706", "#059669", "#7c3aed", "#0891b2", "#be185d")
"""Of the runs; of the metrics, where there is one run."""
DASHES = ("-", "--", ":", "-.")
"""Of the metrics, where there are several runs."""
SIZE = (5.4, 3.1)
SMOOTHED = 40
"""A curve with more points than this is drawn faintly, and over it its running median over a twentieth of it."""


@dataclass(frozen=True)
class Panel:
    """One plot of some metrics over the steps."""

    title: str
    metrics: tuple[str, ...]
    unit: str
    caption: str
    log: bool = False
    limits: tuple[str, ...] = ()
    """Settings whose value is drawn as a red line."""
    noise: float | None = None
    """A grey line: what lies below is noise."""
    from_zero: bool = False
    """Else noise in a steady figure fills the plot."""
    compared: tuple[str, ...] = ()
    """Of the metrics, those that are drawn where several runs are compared; all if empty."""


PANELS = (
    Panel(
        "Loss", ("loss", "validation/loss"), "nats", "What was trained; of a policy gradient the value means little."
    ),
    Panel(
        "Distance to the teacher",
        ("kl/teacher_k1", "kl/teacher_k3", "validation/teacher_k1"),
        "nats per token",
        "Estimates of KL(student || teacher) at the stored tokens: k1 is unbiased while they are the student's own.",
    ),
    Panel(
        "Distance to the teacher along the completion",
        ("kl/teacher_q1", "kl/teacher_q2", "kl/teacher_q3", "kl/teacher_q4"),
        "nats per token",
        "k1 by the quarter of the completion that a token lies in.",
        compared=("kl/teacher_q1", "kl/teacher_q4"),
    ),
    Panel(
        "Forward KL to the data",
        ("kl/forward_k1", "kl/forward_k3"),
        "nats per token",
        "Estimates of KL(teacher || student), whose answers these are.",
    ),
    Panel(
        "Drift from the rollout policy",
        ("kl/rollout_k3", "kl/rollout_k1"),
        "nats per token",
        "Estimates of KL(rollout policy || student). Grey: what two bfloat16 engines differ by; red: spent.",
        log=True,
        limits=("spent_k3",),
        noise=1e-3,
    ),
    Panel(
        "What the rollouts are still worth",
        ("ratio/ess", "ratio/clipped"),
        "share of the tokens",
        "Effective sample size, and tokens whose importance weight is cut. Red: spent.",
        limits=("spent_ess", "spent_clipped"),
    ),
    Panel("Importance ratio", ("ratio/max", "ratio/mean"), "student / rollout", "Largest and mean.", log=True),
    Panel(
        "Advantage",
        ("advantage/mean", "advantage/std", "advantage/min", "advantage/max"),
        "nats",
        "log teacher - log student of the sampled tokens.",
        compared=("advantage/mean", "advantage/std"),
    ),
    Panel("Entropy", ("entropy",), "nats per token", "Of the student at the stored states; a fall to 0 is a collapse."),
    Panel(
        "Gradient",
        ("optim/grad_norm",),
        "norm before clipping",
        "Red: where it is clipped.",
        log=True,
        limits=("clip",),
    ),
    Panel("Learning rate", ("optim/lr",), "", "As scheduled."),
    Panel(
        "Throughput",
        ("perf/tokens_per_s_per_rank",),
        "tokens/s and rank",
        "Prompt and completion tokens.",
        from_zero=True,
    ),
    Panel("Use of the device", ("perf/mfu",), "MFU", "Share of the device's dense bfloat16 peak.", from_zero=True),
    Panel(
        "Operations", ("perf/tflops",), "TFLOP/s a rank", "Of the model, without what is recomputed.", from_zero=True
    ),
    Panel("Fill", ("data/fill",), "share", "Tokens of the packed passes against token_budget.", from_zero=True),
)
"""In the order of the page; those without a value are left out."""
SHARES = ("time/data", "time/save", "time/validation")


def curves(runs: Sequence[tuple[str, Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> list[Figure]:
    """The panels that have values.

    Args:
        runs: name, settings and records of each.
    """
    found = [_panel(panel, runs) for panel in PANELS if any(_has(records, panel) for _, _, records in runs)]
    return [*found, *([_time(runs[0][2])] if len(runs) == 1 else [])]


def _has(records: Sequence[Mapping[str, Any]], panel: Panel) -> bool:
    return any(record.get(metric) is not None for metric in panel.metrics for record in records)


def _panel(panel: Panel, runs: Sequence[tuple[str, Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> Figure:
    plot, (axes,) = canvas()
    plot.set_size_inches(*SIZE)
    several = len(runs) > 1
    for place, (name, settings, records) in enumerate(runs):
        for index, metric in enumerate((panel.compared if several else ()) or panel.metrics):
            x, y = series(records, metric)
            if len(x):
                label = f"{name}: {metric}" if several else metric
                colour = COLOURS[(place if several else index) % len(COLOURS)]
                _line(axes, x, y, label, colour, DASHES[index % len(DASHES)] if several else "-")
        for limit in panel.limits:
            if place == 0 and settings.get(limit) is not None:
                axes.axhline(settings[limit], color=RED, linewidth=1, linestyle="--")
        if not several:
            _mark_spent(axes, records)
    if panel.noise is not None:
        axes.axhline(panel.noise, color=GREY, linewidth=1)
    if panel.log:
        axes.set_yscale("log", nonpositive="mask")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    if several or len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)
    return finish(plot, panel.title, panel.caption)


def series(records: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a metric has a value, and the values."""
    known = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    return np.array([step for step, _ in known]), np.array([value for _, value in known], float)


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of `width` values around each; at the ends of as many as there are."""
    half = width // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _line(axes: Any, x: np.ndarray, y: np.ndarray, label: str, colour: str, dash: str) -> None:
    if len(x) <= SMOOTHED:
        axes.plot(x, y, color=colour, label=label, linestyle=dash, linewidth=1.4, marker="o", markersize=2.5)
        return
    axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    smooth = running_median(y, max(3, len(y) // 20))
    axes.plot(x, smooth, color=colour, label=label, linestyle=dash, linewidth=1.6)


def _mark_spent(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """A red line where the rollouts were first called spent."""
    spent = [record["step"] for record in records if "spent" in record]
    if spent:
        axes.axvline(spent[0], color=RED, linewidth=0.8, alpha=0.6)


def _time(records: Sequence[Mapping[str, Any]]) -> Figure:
    """What the time of a run went into, stacked."""
    plot, (axes,) = canvas()
    plot.set_size_inches(*SIZE)
    steps = np.array([record["step"] for record in records])
    waited = {name: np.array([record.get(name) or 0.0 for record in records]) for name in SHARES}
    whole = np.array([record["time/step"] for record in records])
    parts = {"computing": whole - waited["time/data"], **{name.partition("/")[2]: v for name, v in waited.items()}}
    shown = {name: values for name, values in parts.items() if values.any()}
    axes.stackplot(steps, *shown.values(), labels=list(shown), colors=[BLUE, "#d97706", RED, "#059669"], alpha=0.75)
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=8)
    return finish(plot, "Time", "Of each step, and of the save and the validation beside it.")
