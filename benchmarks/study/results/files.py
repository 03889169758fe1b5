"""The study's three files: docs/study.md and docs/study.html for people, docs/study.json for programs."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.results.findings import Curve, Finding, Plot, Row, Study
from benchmarks.study.results.pages import headline, markdown, page
from benchmarks.study.results.statistics import Mean
from common.canonical import parse_object
from common.errors import DataError

__all__ = ["agreement", "headline", "read", "write"]

JSON = "study.json"
COLUMNS = 120
"""Characters of a line of JSON: what fits into one is not broken, so that values by seed stand side by side."""


def write(study: Study, folder: Path) -> None:
    """Write study.md, study.html and study.json into `folder`; the same study gives the same bytes.

    Figures that a finding has no column for stand in the JSON alone.

    Raises:
        DataError: a figure is not finite, or two findings, or two rows of one, have one name.
        UsageError: matplotlib is missing.
    """
    _require_whole(study)
    texts = {JSON: _layout(asdict(study)) + "\n", "study.md": markdown(study), "study.html": page(study)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def read(folder: Path) -> Study:
    """The study that `write` has put there, with tuples for sequences. Raises `DataError` where there is no JSON."""
    file = folder / JSON
    if not file.exists():
        raise DataError("no study is recorded here", where=str(file), fix="Run `make study`")
    known = parse_object(file.read_bytes(), where=str(file))
    return Study(known["about"], tuple(_finding(finding) for finding in known["findings"]))


def agreement(study: Study, recorded: Study, allowed: Mapping[str, float]) -> list[str]:
    """A line for each mean that does not agree with the recorded one (`Mean.agrees`); empty where all do.

    Rows count by finding and name. Figures without an interval, and rows that only one of the two has, say nothing
    about agreement; where nothing is left to compare, a line says so.
    """
    ours, theirs = _means(study), _means(recorded)
    both = [key for key in ours if key in theirs]
    if not both:
        return ["nothing to compare: the two studies have no mean in common"]
    return [
        f"{' / '.join(key)}: {ours[key].mean:.3f} is too far from the recorded {theirs[key]}"
        for key in both
        if not ours[key].agrees(theirs[key], allowed.get(key[-1], 0.0))
    ]


def _means(study: Study) -> dict[tuple[str, str, str], Mean]:
    """All means by finding, row and column, but for those of times."""
    return {
        (finding.key, row.name, column): figure
        for finding in study.findings
        if not finding.timing
        for row in finding.rows
        for column, figure in row.figures.items()
        if isinstance(figure, Mean)
    }


def _require_whole(study: Study) -> None:
    _require_distinct([finding.key for finding in study.findings], "findings")
    for finding in study.findings:
        _require_distinct([row.name for row in finding.rows], finding.key)
        for where, number in _numbers(finding):
            if not math.isfinite(number):
                fix = "Give a word in its place, for example `diverged`"
                raise DataError(f"{number} is no figure for a report", where=where, fix=fix)


def _require_distinct(names: list[str], where: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        fix = "Agreement goes by name: give each a name of its own"
        raise DataError(f"more than one is called {', '.join(twice)}", where=where, fix=fix)


def _numbers(finding: Finding) -> Iterator[tuple[str, float]]:
    """Every number of a finding, and where it stands."""
    figures = [
        (f"{finding.key} / {row.name} / {column}", figure)
        for row in finding.rows
        for column, figure in row.figures.items()
    ]
    points = [
        (f"{finding.key} / {plot.title} / {curve.name}", figure)
        for plot in finding.plots
        for curve in plot.curves
        for point in curve.points
        for figure in point
    ]
    for where, figure in [*figures, *points]:
        numbers = (figure.mean, figure.half, *figure.values) if isinstance(figure, Mean) else (figure,)
        yield from ((where, number) for number in numbers if not isinstance(number, str))


def _layout(value: Any, depth: int = 0) -> str:
    """JSON in lines that are as full as they can be, keys in the order of the dataclasses."""
    whole = json.dumps(value, ensure_ascii=False, allow_nan=False, default=list)  # of a range
    if depth + len(whole) < COLUMNS or not isinstance(value, dict | list | tuple):
        return whole
    if isinstance(value, dict):
        items = [f"{json.dumps(key, ensure_ascii=False)}: {_layout(item, depth + 1)}" for key, item in value.items()]
    else:
        items = [_layout(item, depth + 1) for item in value]
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return (
        f",\n{' ' * (depth + 1)}".join([f"{opened}\n{' ' * (depth + 1)}{items[0]}", *items[1:]])
        + f"\n{' ' * depth}{closed}"
    )


def _finding(known: Mapping[str, Any]) -> Finding:
    rows = tuple(
        Row(row["name"], {key: _figure(figure) for key, figure in row["figures"].items()}) for row in known["rows"]
    )
    drawn = tuple(
        Plot(plot["title"], plot["x"], plot["y"], tuple(_curve(curve) for curve in plot["curves"]))
        for plot in known["plots"]
    )
    return Finding(**{**known, "rows": rows, "seeds": tuple(known["seeds"]), "plots": drawn})


def _curve(known: Mapping[str, Any]) -> Curve:
    return Curve(known["name"], tuple((step, _mean(mean)) for step, mean in known["points"]))


def _figure(known: Any) -> Mean | float | str:
    return _mean(known) if isinstance(known, dict) else known


def _mean(known: Mapping[str, Any]) -> Mean:
    return Mean(known["mean"], known["half"], tuple(known["values"]))
