"""The line of a step for whoever watches: aligned, no wider than the terminal, with the time that is left."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from rich.text import Text

from common.progress import duration
from common.terminal import rich_console

RECENT = 20
"""Steps whose mean duration foretells the rest: the first ones compile and warm up, and say little of those to come."""
GAP = "  "
MUST = 0
"""Rank of what is never left out."""


class Field(NamedTuple):
    """A figure of the line; of those that do not fit, the highest `rank` goes first."""

    label: str
    value: str
    rank: int
    alarm: bool = False

    def __str__(self) -> str:
        return f"{self.label} {self.value}" if self.label else self.value


class Live:
    """Says one line a step: as wide as the terminal allows with rich, in plain text elsewhere.

    Args:
        total: steps of the whole run.
        say: takes the plain line.
    """

    def __init__(self, total: int, say: Callable[[str], None], stream: TextIO | None = None) -> None:
        self._total, self._say = total, say
        self._console = rich_console(stream or sys.stderr)
        self._ends = deque([time.monotonic()], maxlen=RECENT + 1)

    def step(self, record: Mapping[str, Any]) -> None:
        """Say the line of a step that is just done."""
        self._ends.append(time.monotonic())
        mean = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        found = fields(record, self._total, mean * (self._total - record["step"]))
        if self._console is None:
            self._say(GAP.join(str(field) for field in found).rstrip())
        else:
            shown = fitted(found, self._console.width)
            self._console.print(_styled(shown, self._console.width), no_wrap=True, overflow="crop", soft_wrap=False)


def fields(record: Mapping[str, Any], total: int, seconds_left: float) -> list[Field]:
    """The figures of a step in their order, each as wide as in every other step."""
    count = f"{record['step']}/{total}".ljust(2 * len(str(total)) + 1)
    found = [Field("step", count, MUST), Field("loss", _number(record["loss"], "8.4f"), MUST)]
    if "kl/teacher_k1" in record:
        found += [
            Field("kl", _number(record["kl/teacher_k1"], "7.4f"), 1),
            Field("ess", _number(record["ratio/ess"], "4.2f"), 3, alarm="spent" in record),
        ]
    found.append(Field("|g|", _number(record["optim/grad_norm"], "6.3f"), 6))
    found.append(Field("lr", f"{record['optim/lr']:.1e}", 7))
    found.append(Field("", f"{record['perf/tokens_per_s']:>7,.0f} tok/s", 2))
    mfu = record["perf/mfu"]
    if mfu is not None:
        found.append(Field("mfu", f"{mfu:4.0%}", 4))
    found.append(Field("", f"{duration(seconds_left):>6} left", 1))
    for name, label in (("validation/loss", "val"), ("validation/teacher_k1", "val kl")):
        if name in record:
            found.append(Field(label, _number(record[name], ".4f"), 5))
    return found


def fitted(found: Sequence[Field], width: int) -> list[Field]:
    """Those fields that fit into `width` columns together, the dispensable left out first."""
    kept = list(found)
    while len(GAP.join(map(str, kept))) > width and any(field.rank > MUST for field in kept):
        kept.remove(max(kept, key=lambda field: field.rank))
    return kept


def _styled(found: Sequence[Field], width: int) -> Text:
    line = Text()
    for field in found:
        line.append(GAP if line else "")
        line.append(f"{field.label} " if field.label else "", "dim")
        line.append(field.value, "bold red" if field.alarm else "")
    line.truncate(width)
    return line


def _number(value: float | None, form: str) -> str:
    """A figure that may be missing, because it was not finite."""
    return format(float("nan") if value is None else value, form)
