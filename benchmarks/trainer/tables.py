"""The rows of `benchmarks.trainer` as tables for people, and which goals they reach."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from benchmarks.trainer.probes import PHASES
from common.report import Table
from common.terminal import say_table

Row = dict[str, Any]
SPEED_GOAL, MEMORY_GOAL, MFU_GOAL = 1.5, 0.6, 0.5


def say_tables(found: Mapping[str, Any]) -> None:
    """Print what `benchmarks.trainer` found."""
    machine, rows = found["machine"], found["rows"]
    click.echo(
        f"{machine['cores']} cores, {machine['cpu']}, load {machine['load']:.1f} at the start; "
        f"{machine['threads']} threads a side, {machine['clock']} seconds"
    )
    for title, table in (
        ("Tokens a second and peak memory of a step", versus_table(rows, "versus")),
        ("Where a step of ours spends its time, %", phases_table(rows)),
        ("Cost of a token as rows get longer", context_table(rows)),
        ("Ranks on one machine", ranks_table(rows)),
        ("Log-prob of the chosen token and its gradient", heads_table(rows)),
        ("Shapes of larger models", versus_table(rows, "shapes")),
        ("Goals", goals_table(rows)),
    ):
        if table.rows:
            click.echo(f"\n{title}\n")
            say_table(table, right=range(2, len(table.header)))


def versus_table(rows: Iterable[Row], name: str) -> Table:
    """A line a step, a length and a side; TRL's last, the others beside it in `to TRL`."""
    rows = _all(rows, name)
    lines = []
    for row in rows:
        trl = next((other for other in rows if other["side"] == "TRL" and _same_work(row, other)), None)
        mfu = row.get("mfu")
        lines.append((
            " ".join((row.get("shape", ""), row["kind"])).strip(),
            row["side"],
            f"{row['length']:,}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / trl['tokens_per_s']:.2f}x" if trl else "",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['above_imports_bytes'] / 1e6:,.0f}",
            f"{row['peak_bytes'] / trl['peak_bytes']:.2f}x" if trl else "",
            *((f"{mfu:.0%}" if mfu else "", f"{row['head_share']:.0%}" if "head_share" in row else "")
              if name == "shapes" else ()),
        ))  # fmt: skip
    header = ("step", "side", "length", "tok/s", "to TRL", "peak MB", "above imports", "to TRL")
    return Table((*header, "MFU", "head") if name == "shapes" else header, lines)


def phases_table(rows: Iterable[Row]) -> Table:
    """A line a step and a length, of every side: the share of each phase."""
    lines = [
        (row["kind"], row["side"], f"{row['length']:,}", *(f"{row[f'{p}_s'] / row['step_s']:.1%}" for p in PHASES))
        for row in _all(rows, "versus")
    ]
    return Table(("step", "side", "length", *PHASES), lines)


def context_table(rows: Iterable[Row]) -> Table:
    """A line a length: milliseconds a token and memory."""
    lines = [
        (
            row["kind"],
            f"{row['length']:,}",
            f"{1000 / row['tokens_per_s']:.3f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
        for row in _all(rows, "context")
    ]
    return Table(("step", "length", "ms a token", "tok/s", "peak MB"), lines)


def ranks_table(rows: Iterable[Row]) -> Table:
    """A line a number of ranks, all of them together on the same cores."""
    rows = _all(rows, "ranks")
    lines = [
        (
            row["kind"],
            f"{row['ranks']}",
            f"{row['threads_a_rank']}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:.2f}x",
        )
        for row in rows
    ]
    return Table(("step", "ranks", "threads a rank", "tok/s", "to one rank"), lines)


def heads_table(rows: Iterable[Row]) -> Table:
    """A line a head and size; the reason where it does not run."""
    lines = []
    for row in _all(rows, "heads"):
        line = (row["head"], f"{row['tokens']:,} x {row['vocab']:,}")
        if "absent" in row:
            lines.append((*line, row["absent"], "", "", "", ""))
            continue
        errors = (f"{row[key]:.1e}" for key in ("logprob_error", "hidden_grad_error", "head_grad_error"))
        lines.append((*line, f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e6:,.0f}", *errors))
    return Table(("head", "tokens x vocab", "seconds", "peak MB", "log-prob", "d hidden", "d head"), lines)


def goals_table(rows: Iterable[Row]) -> Table:
    """What was to be reached at every length, and the least that was; only what was measured."""
    rows = list(rows)
    lines = []
    for kind in ("sft", "opd"):
        for length in sorted({row["length"] for row in _all(rows, "versus") if row["kind"] == kind}):
            sides = {row["side"]: row for row in _all(rows, "versus") if (row["kind"], row["length"]) == (kind, length)}
            if trl := sides.pop("TRL", None):
                lines += [line for row in sides.values() for line in _against(row, trl)]
    for row in _all(rows, "shapes"):
        if row["side"] == "ours" and row["mfu"] and "1.7B" in row["shape"]:
            work = f"{row['kind']}, {row['shape']}, {row['length']:,}: MFU"
            lines.append(_goal(work, f"{row['mfu']:.0%}", f">= {MFU_GOAL:.0%}", row["mfu"] >= MFU_GOAL))
    return Table(("goal", "", "found", "wanted"), lines)


def _against(row: Row, trl: Row) -> Iterator[tuple[str, str, str, str]]:
    work = f"{row['kind']}, {row['length']:,}, {row['side']}"
    speed, memory = row["tokens_per_s"] / trl["tokens_per_s"], row["peak_bytes"] / trl["peak_bytes"]
    yield _goal(f"{work}: tok/s to TRL", f"{speed:.2f}x", f">= {SPEED_GOAL}x", speed >= SPEED_GOAL)
    yield _goal(f"{work}: peak to TRL", f"{memory:.2f}x", f"<= {MEMORY_GOAL}x", memory <= MEMORY_GOAL)


def _goal(what: str, found: str, wanted: str, reached: bool) -> tuple[str, str, str, str]:
    return (what, "reached" if reached else "MISSED", found, wanted)


def _same_work(row: Row, other: Row) -> bool:
    return all(row.get(key) == other.get(key) for key in ("kind", "length", "shape"))


def _all(rows: Iterable[Row], table: str) -> list[Row]:
    return [row for row in rows if row["table"] == table]
