"""An inspection as one self-contained page: plots, lineage, rows with every token coloured, and what pins it all."""

import html
from pathlib import Path

import numpy as np

from common import report
from common.cache import lineage_view, sample_view
from common.cache.inspect import Inspection
from common.cache.inspect_text import fact_rows, gap_says, model_rows, statistic_rows
from common.cache.statistics import BIN, FLOOR, Statistics, position_middle
from common.errors import UsageError
from common.report import Figure, Histogram, Markup, Table
from common.untrusted import one_line

TITLES = {"sft": "Answers of a teacher", "rollouts": "Rollouts", "scored": "Scored rollouts"}
COARSE_BINS = 40
"""Bins of a histogram of lengths."""
RARE = 1e-4
"""Share of the tokens that may lie left of where a plot of log-probs begins."""
DOCTYPE = b"<!doctype html>"
"""How every report begins."""
FEW = 10
"""Rollouts that a point of the gap's curve must rest on; its tokens must be a quarter as many as there are rows."""


TILE_STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tiles div { flex: 1 1 8rem; border: 1px solid #e2e8f0; border-radius: .5rem; padding: .6rem .9rem; }
.tiles b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.tiles span { color: #64748b; font-size: .85rem; }
"""


def require_report_or_nothing(file: Path) -> None:
    """Refuse to write a page over a file that is none. Raises `UsageError`."""
    if not file.exists():
        return
    with open(file, "rb") as stream:
        begins = stream.read(len(DOCTYPE))
    if begins != DOCTYPE:
        raise UsageError("what lies there is no report", where=str(file), fix="Give another name to --html")


def page(inspection: Inspection) -> str:
    """The HTML. Needs the extra `report`."""
    facts, alarm = inspection.facts, ""
    if inspection.overrides:
        alarm = f"Overridden checks: {one_line(', '.join(inspection.overrides))}"
    lineage = Markup("Lineage", lineage_view.as_html(inspection.lineage), lineage_view.TREE_STYLE)
    if inspection.statistics is None:
        pins = {name: value for name, value in model_rows(facts) if name != "URL"}
        return report.page("Model", one_line(facts["url"]), [lineage], pins, alarm)
    summary = inspection.statistics.summary()
    lead = f"{one_line(facts['url'])}: {facts['rows']:,} rollouts, {facts['tokens']:,} completion tokens."
    if "gap" in summary:
        lead = f"{lead} {gap_says(summary)}"
    parts = [
        _tiles(inspection.statistics, facts["bytes_per_token"]),
        lineage,
        Markup("Statistics", ""),
        Table(("", ""), statistic_rows(summary)),
        *_figures(inspection.statistics),
        _rows(inspection),
    ]
    pins = {name: value for name, value in fact_rows(facts) if name not in ("URL", "rows", "tokens")}
    pins["prompts"] = f"{facts['prompts']:,}"
    return report.page(TITLES[facts["kind"]], lead, parts, pins, alarm)


def _tiles(statistics: Statistics, bytes_per_token: float) -> Markup:
    """The few figures one looks for first."""
    summary = statistics.summary()
    tiles = [
        ("rollouts", f"{statistics.rows:,}"),
        ("tokens a completion, median", f"{summary['completion_tokens']['median']:,}"),
        ("cut off", f"{summary['truncated_share']:.1%}"),
        ("bytes a token", f"{bytes_per_token:.2f}"),
    ]
    if statistics.scored:
        tiles.insert(0, ("teacher minus rollout, nats a token", f"{summary['gap']['mean']:+.3f}"))
    drawn = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles)
    return Markup("", f'<div class="tiles">{drawn}</div>', TILE_STYLE)


def _figures(statistics: Statistics) -> list[Figure]:
    lengths = [
        _lengths("prompts", statistics.prompt_lengths.counts),
        _lengths("completions", statistics.completion_lengths.counts),
    ]
    reasons = {_plain(name): count for name, count in statistics.finish_reasons.most_common(8)}
    drawn = [
        report.histograms("Lengths", lengths, "tokens", "How long prompts and completions are."),
        report.shares(
            "Finish reasons",
            reasons,
            "share of the completions",
            "Why completions end; length: they were cut off at max_tokens.",
        ),
        _logprobs(statistics),
    ]
    return [*drawn, _gap(statistics), _density(statistics)] if statistics.scored else drawn


def _plain(name: str) -> str:
    """A name that the plots' font can draw."""
    return one_line(name).encode("ascii", "backslashreplace").decode()[:40]


def _lengths(label: str, counts: np.ndarray) -> Histogram:
    """Counts by length as a histogram of at most `COARSE_BINS` bins of equal width."""
    width = max(1, -(-len(counts) // COARSE_BINS))
    bins = -(-len(counts) // width)
    padded = np.pad(counts, (0, bins * width - len(counts)))
    return Histogram(label, np.arange(bins + 1) * width, padded.reshape(bins, width).sum(1))


def _logprobs(statistics: Statistics) -> Figure:
    curves = [("rollout", statistics.rollout_histogram)]
    if statistics.scored:
        curves.append(("teacher", statistics.teacher_histogram))
    first = min(_first_bin(counts) for _, counts in curves)
    edges = _edges()[first:]
    return report.outlines(
        "Log-probs of the sampled tokens",
        [Histogram(label, edges, counts[first:]) for label, counts in curves],
        "log-prob, nats",
        "Under the distribution that sampled, and under the teacher. The few tokens further left are not drawn.",
    )


def _gap(statistics: Statistics) -> Figure:
    means = statistics.by_position
    enough = (means.rollouts >= min(FEW, statistics.rows)) & (means.tokens >= statistics.rows / 4)
    shown = np.flatnonzero(enough)
    errors = np.nan_to_num(means.errors()[shown])
    return report.band(
        "Gap by position",
        position_middle(shown),
        means.means()[shown],
        2 * errors,
        ("position in the completion", "teacher minus rollout, nats a token"),
        "Mean over the rollouts that reach this far, and two standard errors to both sides. Below 0 the teacher finds "
        "the sampled tokens less likely than the policy did.",
    )


def _density(statistics: Statistics) -> Figure:
    first = min(_first_bin(statistics.rollout_histogram), _first_bin(statistics.teacher_histogram))
    return report.heat(
        "Teacher against rollout",
        statistics.density[first:, first:],
        _edges()[first:],
        ("rollout log-prob, nats", "teacher log-prob, nats"),
        "Every sampled token; below the line the teacher finds it less likely than the policy did.",
    )


def _first_bin(counts: np.ndarray) -> int:
    """The lowest bin to draw: what lies below it is rare."""
    return int(np.searchsorted(np.cumsum(counts), RARE * counts.sum(), side="right"))


def _edges() -> np.ndarray:
    return np.arange(-round(FLOOR / BIN), 1) * BIN


def _rows(inspection: Inspection) -> Markup:
    note = f"<p>{html.escape(one_line(inspection.note))}</p>" if inspection.note else ""
    legend = sample_view.html_legend() if any(sample.gap is not None for sample in inspection.samples) else ""
    rows = "".join(sample_view.as_html(sample, index == 0) for index, sample in enumerate(inspection.samples))
    return Markup("Rows", note + legend + rows, sample_view.SAMPLE_STYLE)
