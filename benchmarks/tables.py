"""The rows of `benchmarks.storage` as tables for people, and which goals they reach."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from benchmarks.layouts import IDS, LAYOUTS, ROLLOUT, TEACHER
from common.report import Table
from common.terminal import say_table

Row = dict[str, Any]
STEPS = ("plan", "join", "resume", "finish", "open")
BYTES_GOAL, RATIO_GOAL, READ_GOAL, FLAT_GOAL, SECONDS_GOAL = 8.5, 5.0, 20e6, 1.5, 10.0


def say_tables(found: Mapping[str, Any]) -> None:
    """Print what `benchmarks.storage` found."""
    rows, data, machine = found["rows"], found["data"], found["machine"]
    click.echo(
        f"{data['rows']:,} rollouts of {data['policy']}, {data['tokens']:,} tokens, {data['tokens_per_row']:.0f} a row "
        f"({data['url']})\n{machine['cores']} cores, {machine['cpu']}, load {machine['load']:.1f} at the start"
    )
    for title, table in (
        ("Bytes per completion token", bytes_table(rows)),
        ("Million completion tokens per CPU-second", speed_table(rows)),
        ("Peak memory, MB above the start, at that many tokens", memory_table(rows)),
        ("Growth: seconds and peak MB, by the number of shards", growth_table(rows)),
        ("Goals", goals_table(rows)),
    ):
        click.echo(f"\n{title}\n")
        say_table(table, right=range(1, len(table.header)))


def bytes_table(rows: Iterable[Row]) -> Table:
    """A line a layout; the last, for the top-k, is what it adds to ours."""
    ours = _one(rows, "bytes", layout="ours")["ids_and_logprobs"]
    lines = [
        (
            LAYOUTS[row["layout"]].title,
            *(f"{row[key]:.2f}" for key in (IDS, ROLLOUT, TEACHER, "ids_and_logprobs")),
            f"{row['ids_and_logprobs'] / ours:.1f}x",
            f"{row['total']:.2f}",
        )
        for row in _all(rows, "bytes")
    ]
    for row in _all(rows, "topk"):
        ids, logprobs = row["ids"], row["logprobs"]
        added = f"ours, top-{row['k']} beside: adds"
        lines.append((added, f"{ids:.2f}", "", f"{logprobs:.2f}", f"{ids + logprobs:.2f}", "", ""))
    return Table(("", "ids", "rollout lp", "teacher lp", "these three", "to ours", "whole file"), lines)


def speed_table(rows: Iterable[Row]) -> Table:
    """A line a layout: rates, and how many times slower than ours."""
    ours = _one(rows, "speed", layout="ours")
    lines = []
    for row in _all(rows, "speed"):
        line = [LAYOUTS[row["layout"]].title]
        for action in ("write", "read"):
            rate, best = row[f"{action}_tokens_per_cpu_second"], ours[f"{action}_tokens_per_cpu_second"]
            line += [f"{rate / 1e6:.2f}", f"{best / rate:.1f}x"]
        lines.append(line)
    return Table(("", "write", "ours to it", "read", "ours to it"), lines)


def memory_table(rows: Iterable[Row]) -> Table:
    """A line a layout, a column a size."""
    sizes = sorted({row["tokens"] for row in _all(rows, "memory")})
    header = ["", *(f"{action} {tokens / 1e6:g}M" for action in ("write", "read") for tokens in sizes)]
    lines = []
    for name, one_shard in [(name, False) for name in LAYOUTS] + [("ours", True)]:
        mine = [_one(rows, "memory", layout=name, one_shard=one_shard, tokens=tokens) for tokens in sizes]
        peaks = [f"{row[f'{action}_peak_bytes'] / 1e6:,.0f}" for action in ("write", "read") for row in mine]
        lines.append([LAYOUTS[name].title + (", all in one shard" if one_shard else ""), *peaks])
    return Table(header, lines)


def growth_table(rows: Iterable[Row]) -> Table:
    """A line a store and size, a column a step."""
    lines = []
    for store, shards in dict.fromkeys((row["store"], row["shards"]) for row in _all(rows, "growth")):
        line = [store, f"{shards:,}"]
        for step in STEPS:
            row = _one(rows, "growth", store=store, shards=shards, step=step)
            line.append(f"{row['seconds']:.2f} s, {row['peak_bytes'] / 1e6:.0f} MB")
        lines.append(line)
    return Table(("store", "shards", *STEPS), lines)


def goals_table(rows: Sequence[Row]) -> Table:
    """What was to be reached, and what was."""
    size = _one(rows, "bytes", layout="ours")["ids_and_logprobs"]
    read, paper = (_one(rows, "speed", layout=name)["read_tokens_per_cpu_second"] for name in ("ours", "nested"))
    memory = [row for row in _all(rows, "memory") if row["layout"] == "ours" and not row["one_shard"]]
    smallest, largest = (pick(memory, key=lambda row: row["tokens"])["read_peak_bytes"] for pick in (min, max))
    slowest = max(row["seconds"] for row in _all(rows, "growth") if row["step"] in ("plan", "join", "resume", "open"))
    growth = largest / smallest
    checks = [
        ("bytes per token, ids and two log-probs", size <= BYTES_GOAL, f"{size:.2f}", f"<= {BYTES_GOAL}"),
        ("read rate, to the paper's layout", read / paper >= RATIO_GOAL, f"{read / paper:.1f}x", f">= {RATIO_GOAL:g}x"),
        ("read, million tokens per CPU-second", read >= READ_GOAL, f"{read / 1e6:.1f}", f">= {READ_GOAL / 1e6:g}"),
        ("reader's memory, largest to smallest", growth <= FLAT_GOAL, f"{growth:.2f}x", f"<= {FLAT_GOAL}x"),
        ("slowest of plan, join, resume, open", slowest <= SECONDS_GOAL, f"{slowest:.1f} s", f"<= {SECONDS_GOAL:g} s"),
    ]
    lines = [(goal, found, wanted, "reached" if reached else "MISSED") for goal, reached, found, wanted in checks]
    return Table(("goal", "found", "wanted", ""), lines)


def _all(rows: Iterable[Row], table: str) -> list[Row]:
    return [row for row in rows if row["table"] == table]


def _one(rows: Iterable[Row], table: str, **keys: object) -> Row:
    (row,) = (row for row in _all(rows, table) if all(row[key] == value for key, value in keys.items()))
    return row
