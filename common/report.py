"""Numbers -> one self-contained HTML page: text, tables and inline SVG, no script and nothing fetched."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from common.errors import UsageError

BLUE, RED, GREY = "#2563eb", "#dc2626", "#94a3b8"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #0f172a; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .9rem; text-align: left; }
th { border-bottom: 2px solid #cbd5e1; } tr + tr td { border-top: 1px solid #e2e8f0; }
td:first-child { white-space: nowrap; } td:not(:first-child) { font-variant-numeric: tabular-nums; }
h1 { margin-bottom: .3rem; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .4rem; font-size: 1.25rem; }
.alarm { background: #fee2e2; color: #991b1b; font-weight: 600; padding: .6rem 1rem; border-radius: .5rem; }
figure { margin: 2rem 0; } svg { width: 100%; max-width: 52rem; height: auto; } figcaption { color: #475569; }
code { background: #f1f5f9; padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Table:
    """A header and its rows; every cell is text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        """For a terminal: columns padded to their widest cell."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(
            [rows[0].rstrip(), "  ".join("─" * width for width in widths), *(row.rstrip() for row in rows[1:])]
        )


@dataclass(frozen=True)
class Figure:
    """A plot as inline SVG."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Markup:
    """HTML in which every text is escaped already, and the CSS it needs; the title may be empty."""

    title: str
    body: str
    style: str = ""


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; `edges` has one entry more than `counts`."""

    label: str
    edges: np.ndarray  # (bins + 1,)
    counts: np.ndarray  # (bins,)


def require_plots() -> None:
    """Refuse at once what could not be drawn in the end."""
    if find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib", fix="Install lightning-opd[report]")


def page(
    title: str, lead: str, parts: Sequence[Table | Figure | Markup], facts: Mapping[str, str], alarm: str = ""
) -> str:
    """The whole page.

    Args:
        lead: one paragraph below the title.
        facts: what pins the numbers (hashes, versions, commands), listed at the end.
        alarm: what nobody may overlook, in red above all else.
    """
    body = "\n".join(_part(part) for part in parts)
    pins = _table(Table(("", ""), [(key, value) for key, value in facts.items()]), code=True)
    style = "".join([STYLE, *(part.style for part in parts if isinstance(part, Markup))])
    warning = f'<p class="alarm">{html.escape(alarm)}</p>\n' if alarm else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{warning}<p>{html.escape(lead)}</p>\n"
        f"{body}\n<h2>What pins these numbers</h2>\n{pins}\n</body></html>\n"
    )


def bars(
    title: str,
    labels: Sequence[str],
    means: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    unit: str,
    caption: str,
) -> Figure:
    """A bar a label, with its interval as a whisker."""
    plot, (axes,) = canvas()
    errors = np.array([[mean - low, high - mean] for mean, (low, high) in zip(means, intervals, strict=True)]).T
    drawn = axes.bar(labels, means, yerr=errors, capsize=6, color=BLUE, width=0.55)
    axes.bar_label(drawn, [f"{mean:.3f}" for mean in means], padding=4)
    axes.set_ylabel(unit)
    return finish(plot, title, caption)


def curve(title: str, x: Sequence[float], y: Sequence[float], labels: tuple[str, str], caption: str) -> Figure:
    """One line; `labels` name the axes."""
    plot, (axes,) = canvas()
    axes.plot(x, y, color=BLUE, marker="o", markersize=3)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return finish(plot, title, caption)


def density(title: str, x: np.ndarray, y: np.ndarray, labels: tuple[str, str], caption: str) -> Figure:
    """Many points as a log-scaled density, with the line on which both are equal."""
    plot, (axes,) = canvas()
    low = float(min(x.min(), y.min()))
    axes.hexbin(x, y, gridsize=45, bins="log", cmap="Blues", mincnt=1, extent=(low, 0.0, low, 0.0))
    axes.plot([low, 0], [low, 0], color=RED, linewidth=1)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return finish(plot, title, caption)


def histograms(title: str, panels: Sequence[Histogram], unit: str, caption: str) -> Figure:
    """One panel beside the other."""
    plot, axes = canvas(len(panels), height=3.0)
    for own, panel in zip(axes, panels, strict=True):
        own.bar(panel.edges[:-1], panel.counts, np.diff(panel.edges), align="edge", color=BLUE, linewidth=0)
        own.set_xlim(panel.edges[0], panel.edges[-1])
        own.set_xlabel(f"{panel.label}, {unit}")
    axes[0].set_ylabel("rows")
    return finish(plot, title, caption)


def outlines(title: str, curves: Sequence[Histogram], unit: str, caption: str) -> Figure:
    """Histograms over each other as outlines, their counts as shares of their sums, on a logarithmic axis."""
    plot, (axes,) = canvas()
    for curve_, colour in zip(curves, (GREY, BLUE, RED), strict=False):
        shares = curve_.counts / curve_.counts.sum()
        axes.stairs(shares, curve_.edges, label=curve_.label, color=colour, fill=colour == GREY, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_xlim(curves[0].edges[0], curves[0].edges[-1])
    axes.set_xlabel(unit)
    axes.set_ylabel("share of the tokens")
    axes.legend(frameon=False)
    return finish(plot, title, caption)


def band(
    title: str, x: np.ndarray, mean: np.ndarray, margin: np.ndarray, labels: tuple[str, str], caption: str
) -> Figure:
    """A mean with a margin on both sides, over a logarithmic axis; all three of shape (points,)."""
    plot, (axes,) = canvas()
    axes.axhline(0, color=GREY, linewidth=1)
    axes.fill_between(x, mean - margin, mean + margin, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=BLUE, marker="o", markersize=3)
    axes.set_xscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return finish(plot, title, caption)


def heat(title: str, counts: np.ndarray, edges: np.ndarray, labels: tuple[str, str], caption: str) -> Figure:
    """Counts over two axes with the same edges, as a log-scaled density, with the line on which both are equal.

    Args:
        counts: (bins, bins), the horizontal axis first.
        edges: (bins + 1,).
    """
    plot, (axes,) = canvas()
    shown = np.ma.masked_equal(counts.T, 0)
    drawn = axes.pcolormesh(edges, edges, shown, norm="log", cmap="Blues", rasterized=True)
    axes.plot(edges[[0, -1]], edges[[0, -1]], color=RED, linewidth=1)
    plot.colorbar(drawn, ax=axes, label="tokens").outline.set_visible(False)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return finish(plot, title, caption)


def shares(title: str, counts: Mapping[str, int], unit: str, caption: str) -> Figure:
    """A bar for each name, as long as its share, the longest on top."""
    plot, (axes,) = canvas(height=0.9 + 0.42 * len(counts))
    total = sum(counts.values())
    names = sorted(counts, key=lambda name: counts[name])
    places = range(len(names))
    drawn = axes.barh(places, [counts[name] / total for name in names], color=BLUE, height=0.6)
    axes.bar_label(drawn, [f"{counts[name] / total:.1%} ({counts[name]:,})" for name in names], padding=5)
    axes.set_yticks(places, names, parse_math=False)  # a name may hold a $
    axes.set_xlim(0, 1.2)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    axes.set_xlabel(unit)
    return finish(plot, title, caption)


def canvas(panels: int = 1, height: float = 4.0):  # noqa: ANN202 - matplotlib's types are not ours to require
    """A plot and its `panels` axes, side by side."""
    require_plots()
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(7.2, height), layout="constrained")
    drawn = list(plot.subplots(1, panels, squeeze=False)[0])
    for axes in drawn:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GREY, alpha=0.3)
        axes.set_axisbelow(True)
    return plot, drawn


def finish(plot, title: str, caption: str) -> Figure:  # noqa: ANN001
    """The plot as a figure of a page."""
    sink = io.StringIO()
    plot.savefig(sink, format="svg", metadata={"Date": None})
    return Figure(title, sink.getvalue()[sink.getvalue().index("<svg") :], caption)


def _part(part: Table | Figure | Markup) -> str:
    if isinstance(part, Markup):
        return f"<h2>{html.escape(part.title)}</h2>\n{part.body}" if part.title else part.body
    return _table(part) if isinstance(part, Table) else _figure(part)


def _table(table: Table, code: bool = False) -> str:
    def cell(text: str, column: int) -> str:
        shown = html.escape(text)
        return f"<td><code>{shown}</code></td>" if code and column else f"<td>{shown}</td>"

    rows = ["".join(cell(text, column) for column, text in enumerate(row)) for row in table.rows]
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.header)
    head = f"<tr>{head}</tr>" if any(table.header) else ""
    return f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _figure(figure: Figure) -> str:
    return (
        f"<figure><h2>{html.escape(figure.title)}</h2>{figure.svg}"
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )
