"""The picture of a status that a terminal is shown, on 80 columns."""

from collections.abc import Mapping

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.progress import duration
from common.untrusted import one_line
from precompute.fleet.lines import ENDED, LABELS, WAITING, costs_of, speed_of, troubles_of
from precompute.fleet.status import ReplicaStatus, Status

BAR_WIDTH = 30
HEAD_LINES = 6
"""Lines above the replicas at most, and one below for the cursor."""
SILENCE_S = 10.0
"""Of a running replica that is expected to beat every second; then it is shown, long before anybody kills it."""
STYLES = {"complete": "green", "failed": "red", "stopped": "yellow", "draining": "yellow"}
COLUMNS = (("replica", 11), ("on", 9), ("state", 16), ("rows in", 7), ("shards", 11), ("tok/s", 9))
"""Headings and widths; fixed, so that nothing jumps when a number grows."""


def frame(status: Status, seconds: Mapping[str, float], spinner: str, width: int, height: int) -> RenderableType:
    """All that a terminal shows.

    Args:
        seconds: how long each replica, by its name, has been in its state.
        spinner: one character that shows life.
        width: columns of the terminal.
        height: its lines; of more replicas than fit, the last are only counted.
    """
    parts: list[RenderableType] = [_head(status, spinner, width), _bar(status, width)]
    for line in (", ".join([*speed_of(status), *costs_of(status)]), ", ".join(_checks(status))):
        parts += [_cut(Text(f"  {line}"), width)] if line else []
    if status.reason:
        parts.append(_cut(Text(f"  {one_line(status.reason)}", STYLES.get(status.state, "")), width))
    if status.replicas and status.state not in ENDED:
        parts.append(_replicas(status.replicas, seconds, max(1, height - HEAD_LINES - 2)))
    return Group(*parts)


def _head(status: Status, spinner: str, width: int) -> Text:
    mark = {"complete": "✓", "failed": "✗", "stopped": "✗"}.get(status.state, spinner)
    label, state = f"{LABELS[status.phase]} ", f": {status.state}, {duration(status.seconds)}"
    room = max(8, width - len(mark) - len(label) - len(state) - 2)
    url, style = _tail(one_line(status.url), room), STYLES.get(status.state, "")
    return _cut(Text.assemble(mark, " ", (label, "bold"), url, (state, style)), width)


def _bar(status: Status, width: int) -> RenderableType:
    """By rows, which move more often than shards do."""
    share = status.rows_done / status.rows_total if status.rows_total else 1.0
    counts = (
        f"{status.shards_done:,}/{status.shards_total:,} shards, "
        f"{status.rows_done:,}/{status.rows_total:,} rows ({share:.0%})"
    )
    line = Table.grid(padding=(0, 2))
    bar_width = max(4, min(BAR_WIDTH, width - len(counts) - 5))
    line.add_row("", ProgressBar(total=1.0, completed=share, width=bar_width), Text(counts, no_wrap=True))
    return line


def _checks(status: Status) -> list[str]:
    tested = [] if status.self_test is None else [f"self-test {status.self_test:.2g} nats"]
    return [*tested, *troubles_of(status)]


def _replicas(replicas: tuple[ReplicaStatus, ...], seconds: Mapping[str, float], room: int) -> RenderableType:
    lines: list[RenderableType] = [Text(_columns([name for name, _ in COLUMNS]), "dim")]
    shown = replicas if len(replicas) <= room else replicas[: room - 1]
    for replica in shown:
        state, style = _state(replica, seconds.get(replica.name, 0.0))
        cells = [
            _tail(one_line(replica.name), COLUMNS[0][1]),
            one_line(replica.devices),
            state,
            f"{replica.in_engine:,}",
            _shards(replica.shards),
            f"{replica.tokens_per_s:,.0f}",
        ]
        died = f"{replica.deaths}†" if replica.deaths else ""
        lines.append(Text.assemble((_columns(cells), style), "  ", (died, "red")))
    if len(shown) < len(replicas):
        lines.append(Text(f"  and {len(replicas) - len(shown)} more", "dim"))
    return Group(*lines)


def _columns(cells: list[str]) -> str:
    """Numbers stand to the right, words to the left."""
    line = ""
    for (name, width), cell in zip(COLUMNS, cells, strict=True):
        short = cell if cell_len(cell) <= width else f"{set_cell_size(cell, width - 1)}…"
        line += "  " + (short.rjust(width) if name in ("rows in", "tok/s") else set_cell_size(short, width))
    return line


def _state(replica: ReplicaStatus, seconds: float) -> tuple[str, str]:
    if replica.state == "running" and replica.beat_age_s > SILENCE_S:
        return f"no beat {duration(replica.beat_age_s)}", "yellow"
    if replica.state in WAITING:
        return f"{replica.state} {duration(seconds)}", "cyan"
    return replica.state, "" if replica.state == "running" else "dim"


def _shards(shards: tuple[int, ...]) -> str:
    """`12 14`, or `12 14 +3` of more."""
    return " ".join([*(str(shard) for shard in shards[:2]), *([f"+{len(shards) - 2}"] if len(shards) > 2 else [])])


def _tail(text: str, room: int) -> str:
    """What is left of a name that is too long: its end, which tells it from its neighbours."""
    while cell_len(text) > room:
        text = f"…{text.lstrip('…')[1:]}"
    return text


def _cut(text: Text, width: int) -> Text:
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text
