"""The study's plots: arms over the steps with bands, and arms below one another with their intervals."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from benchmarks.study.results.findings import Finding, Plot
from benchmarks.study.results.statistics import Mean
from common.report import BLUE, GREY, RED, Figure, canvas, finish, require_plots

COLOURS = (BLUE, "#d97706", "#059669", RED, "#7c3aed", "#0891b2", "#78350f", "#475569")
DASHES = ("-", "--", ":")
"""Of the arms; the second and the third where the colours have run out."""
PANELS = 3
"""Side by side in one figure."""
BEYOND = 0.3
"""Of the range of the values by seed, shown on both sides of it: a band of two seeds would flatten all else."""


def curves(plot: Plot) -> Figure:
    """Each arm's mean over the steps, within its 95% band."""
    with _repeatable():
        drawn, (axes,) = canvas()
        for index, curve in enumerate(plot.curves):
            colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
            steps, means = [step for step, _ in curve.points], [mean for _, mean in curve.points]
            axes.plot(steps, [mean.mean for mean in means], dash, color=colour, label=curve.name, marker="o", ms=3)
            low, high = [mean.low for mean in means], [mean.high for mean in means]
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_ylim(*_range(mean for curve in plot.curves for _, mean in curve.points))
        axes.set_xlabel(plot.x, parse_math=False)
        axes.set_ylabel(plot.y, parse_math=False)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return finish(drawn, plot.title, "Means over the seeds; bands are 95% intervals, cut off where they are wide.")


def intervals(finding: Finding) -> list[Figure]:
    """Every column that has means, arms from top to bottom as in the table; no figure where there is none."""
    columns = [key for key in finding.columns if any(isinstance(row.figures.get(key), Mean) for row in finding.rows)]
    figures = math.ceil(len(columns) / PANELS)
    bounds = [len(columns) * number // figures for number in range(figures + 1)] if figures else []
    return [_intervals(finding, columns[first:last]) for first, last in pairwise(bounds)]


def _intervals(finding: Finding, columns: Sequence[str]) -> Figure:
    with _repeatable():
        drawn, panels = canvas(len(columns), height=0.9 + 0.32 * len(finding.rows))
        for first, (axes, column) in enumerate(zip(panels, columns, strict=True)):
            cells = [row.figures.get(column) for row in finding.rows]
            known = [(place, cell) for place, cell in enumerate(cells) if isinstance(cell, Mean)]
            places, means = [place for place, _ in known], [mean for _, mean in known]
            halves = [mean.half for mean in means]
            axes.errorbar([mean.mean for mean in means], places, xerr=halves, fmt="o", color=BLUE, capsize=3, ms=4)
            for place, mean in known:
                axes.plot(mean.values, [place + 0.25] * len(mean.values), ".", color=GREY, ms=4)
            axes.set_yticks(range(len(cells)), [row.name for row in finding.rows] if not first else [])
            axes.set_ylim(len(cells) - 0.5, -0.5)
            axes.set_xlim(*_range(means))
            axes.set_xlabel(finding.columns[column], fontsize=8, parse_math=False)
            axes.grid(axis="x", color=GREY, alpha=0.3)
        return finish(
            drawn, "The intervals", "Means with 95% intervals, cut off where they are wide; grey: the values by seed."
        )


def _range(means: Iterable[Mean]) -> tuple[float | None, float | None]:
    """Limits of an axis that shows every seed's value; whatever suits where all are the same."""
    values = [value for mean in means for value in (mean.mean, *mean.values)]
    low, high = min(values), max(values)
    beyond = BEYOND * (high - low)
    return (low - beyond, high + beyond) if beyond else (None, None)


@contextmanager
def _repeatable() -> Iterator[None]:
    """The same plot gives the same SVG, for matplotlib draws the names of its parts at random otherwise; letters stay
    letters, for their outlines would be half of the page."""
    require_plots()
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        yield
