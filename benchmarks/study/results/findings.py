"""What the study found, as the report takes it: tables of means over seeds, each with a question and an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.study.results.statistics import Mean

Verdict = Literal["holds", "does not hold", "not shown", "measured"]
"""Of a claim; `not shown`: the intervals leave it open; `measured`: there was no claim."""


@dataclass(frozen=True)
class Row:
    """One arm."""

    name: str
    figures: Mapping[str, Mean | float | str]
    """By column; what was not measured is not there."""


@dataclass(frozen=True)
class Curve:
    """One arm over the steps."""

    name: str
    points: Sequence[tuple[float, Mean]]


@dataclass(frozen=True)
class Plot:
    """Some curves on the same axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Finding:
    """A question, what was measured, and the answer."""

    key: str
    """Names it in JSON and in links: `a`, `objectives`."""
    title: str
    question: str
    columns: Mapping[str, str]
    """Heads of the columns, with units, by what `Row.figures` calls them."""
    rows: Sequence[Row]
    verdict: Verdict
    answer: str
    """In a sentence or three, with the numbers."""
    seeds: Sequence[int]
    would_hold: str = ""
    """What would make the claim hold, read where it does not."""
    plots: Sequence[Plot] = field(default=())
    timing: bool = False
    """Whether its figures are times, which another machine need not confirm."""


@dataclass(frozen=True)
class Study:
    """All of it."""

    about: Mapping[str, object]
    """Sizes, versions, machine, teachers, commands, as JSON."""
    findings: Sequence[Finding]
