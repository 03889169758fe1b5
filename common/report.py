"""Numbers -> one self-contained HTML page: text, tables and inline SVG, no script and nothing fetched."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UsageError

BLUE, RED, GREY = "#2563eb", "#dc2626", "#94a3b8"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #0f172a; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .9rem; text-align: left; }
th { border-bottom: 2px solid #cbd5e1; } tr + tr td { border-top: 1px solid #e2e8f0; }
td:not(:first-child) { font-variant-numeric: tabular-nums; }
figure { margin: 2rem 0; } svg { max-width: 100%; height: auto; } figcaption { color: #475569; }
code { background: #f1f5f9; padding: .1rem .3rem; border-radius: .2rem; word-break: break-all; }
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


def page(title: str, lead: str, parts: Sequence[Table | Figure], facts: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        lead: one paragraph below the title.
        facts: what pins the numbers (hashes, versions, commands), listed at the end.
    """
    body = "\n".join(_table(part) if isinstance(part, Table) else _figure(part) for part in parts)
    pins = _table(Table(("", ""), [(key, value) for key, value in facts.items()]), code=True)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n<p>{html.escape(lead)}</p>\n"
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
    plot, axes = _canvas()
    errors = np.array([[mean - low, high - mean] for mean, (low, high) in zip(means, intervals, strict=True)]).T
    drawn = axes.bar(labels, means, yerr=errors, capsize=6, color=BLUE, width=0.55)
    axes.bar_label(drawn, [f"{mean:.3f}" for mean in means], padding=4)
    axes.set_ylabel(unit)
    return _finish(plot, title, caption)


def curve(title: str, x: Sequence[float], y: Sequence[float], labels: tuple[str, str], caption: str) -> Figure:
    """One line; `labels` name the axes."""
    plot, axes = _canvas()
    axes.plot(x, y, color=BLUE, marker="o", markersize=3)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return _finish(plot, title, caption)


def density(title: str, x: np.ndarray, y: np.ndarray, labels: tuple[str, str], caption: str) -> Figure:
    """Many points as a log-scaled density, with the line on which both are equal."""
    plot, axes = _canvas()
    low = float(min(x.min(), y.min()))
    axes.hexbin(x, y, gridsize=45, bins="log", cmap="Blues", mincnt=1, extent=(low, 0.0, low, 0.0))
    axes.plot([low, 0], [low, 0], color=RED, linewidth=1)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return _finish(plot, title, caption)


def _canvas():  # noqa: ANN202 - matplotlib's types are not ours to require
    try:
        from matplotlib.figure import Figure as Plot
    except ImportError:
        raise UsageError("plots need matplotlib", fix="Install lightning-opd[report]") from None
    plot = Plot(figsize=(7.2, 4.0), layout="constrained")
    axes = plot.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.3)
    axes.set_axisbelow(True)
    return plot, axes


def _finish(plot, title: str, caption: str) -> Figure:  # noqa: ANN001
    sink = io.StringIO()
    plot.savefig(sink, format="svg", metadata={"Date": None})
    return Figure(title, sink.getvalue()[sink.getvalue().index("<svg") :], caption)


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
