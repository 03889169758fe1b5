"""What a person at a terminal sees and what a pipe gets: rich's tables and colours there, plain lines elsewhere.

What is said may quote a stranger (names of models, rows, files), so no control character gets through.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TextIO

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from common.report import Table
from common.untrusted import one_line


def rich_console(stream: TextIO) -> Console | None:
    """rich's console on `stream`; None where plain lines belong: a pipe, a dumb terminal, `NO_COLOR`.

    Names of models and files are shown as they are, so rich's own markup is off. There is one console a stream, for
    bars within bars must know of each other; a bar that is drawn puts a stand-in for the stream before it.
    """
    console = _console(getattr(stream, "rich_proxied_file", stream))
    wanted = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    return console if wanted else None


def say(text: str, style: str = "") -> None:
    """A line for people, on stdout; `style` is one of rich's, such as `red` or `bold`."""
    console, line = rich_console(sys.stdout), one_line(text)
    if console is None:
        click.echo(line)
    else:
        console.print(Text(line, style))


def say_table(table: Table, styles: Mapping[int, str] | None = None, right: Sequence[int] = ()) -> None:
    """A table on stdout; on a terminal that is too narrow for it, a row becomes a block of lines.

    Args:
        styles: rich's style of a row, by the row's index.
        right: columns of numbers, set flush right where rich draws.
    """
    console, rows = rich_console(sys.stdout), [[one_line(cell) for cell in row] for row in table.rows]
    if console is None:
        click.echo(Table(table.header, rows).as_text())
        return
    widths = [max(cell_len(line[column]) for line in (table.header, *rows)) for column in range(len(table.header))]
    if sum(widths) + 2 * len(widths) > console.width:
        _say_blocks(console, table.header, rows, styles or {})
        return
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.header):
        drawn.add_column(Text(name), justify="right" if index in right else "left", overflow="fold")
    for index, row in enumerate(rows):
        drawn.add_row(*(Text(cell) for cell in row), style=(styles or {}).get(index, ""))
    console.print(drawn, soft_wrap=False)


def _say_blocks(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[int, str]
) -> None:
    width = max(len(name) for name in header)
    for index, (title, *cells) in enumerate(rows):
        console.print(Text(title, styles.get(index) or "bold"))
        for name, cell in zip(header[1:], cells, strict=True):
            if cell not in ("", "-"):
                console.print(Text.assemble("  ", (name.ljust(width), "dim"), "  ", cell))


def say_facts(facts: Sequence[tuple[str, str]]) -> None:
    """What is known of one thing: a name and a value a line, on stdout."""
    width = max(len(name) for name, _ in facts)
    console = rich_console(sys.stdout)
    for name, value in facts:
        if console is None:
            click.echo(f"  {name.ljust(width)}  {one_line(value)}")
        else:
            console.print(Text.assemble("  ", (name.ljust(width), "dim"), "  ", one_line(value)))


def say_json(value: Any) -> None:
    """One JSON value on stdout, for programs; in ASCII, so that no terminal obeys it and every pipe can take it."""
    click.echo(json.dumps(value, allow_nan=False))


@lru_cache(maxsize=4)
def _console(stream: TextIO) -> Console:
    return Console(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=True)
