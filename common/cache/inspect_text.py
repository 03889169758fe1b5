"""An inspection for a terminal: facts, lineage, statistics and rows; the same without colours for a pipe."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common.cache import lineage_view, sample_view
from common.cache.inspect import Inspection
from common.cache.samples import as_json as sample_as_json
from common.cache.statistics import QUARTILES
from common.filtered import filters_text
from common.progress import size
from common.rejected import Rejected, rejected_lines
from common.terminal import rich_console
from common.untrusted import one_line


def show(inspection: Inspection, *, whole: bool) -> None:
    """Print it to stdout."""
    console = rich_console(sys.stdout)
    for part in _parts(inspection, whole, console is not None):
        if console is not None:
            console.print(part, soft_wrap=isinstance(part, Text))
        elif isinstance(part, Text):
            click.echo(part.plain)


def as_json(inspection: Inspection) -> dict[str, Any]:
    """All of it as JSON."""
    return {
        "facts": inspection.facts,
        "lineage": lineage_view.as_json(inspection.lineage),
        "statistics": inspection.statistics.summary() if inspection.statistics is not None else None,
        "samples": [sample_as_json(sample) for sample in inspection.samples],
        "note": inspection.note,
    }


def fact_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of a dataset for people."""
    made, rejected = facts["created"], rejected_lines(map(Rejected.model_validate, facts["rejected_rows"]))
    lost = ", ".join(f"{count:,} {words}" for words, count in facts["dropped"].items())
    return [
        ("URL", one_line(facts["url"])),
        ("kind, state", f"{facts['kind']}, {facts['state']}"),
        ("dataset id", facts["dataset_id"]),
        ("manifest sha256", facts["manifest_sha256"]),
        ("begun by", one_line(f"{made['owner']} at {made['at']}, with {made['by']}")),
        ("rows", f"{facts['rows']:,} of {facts['prompts']:,} prompts, in {facts['shards']:,} shards"),
        *([("filters", one_line(filters_text(facts["filters"])))] if facts["filters"] else []),
        *([("dropped by filters", lost)] if lost else []),
        *([("rejected rows", one_line("; ".join(rejected)))] if rejected else []),
        ("tokens", f"{facts['tokens']:,} of completions, {facts['prompt_tokens']:,} of prompts"),
        ("size", f"{size(facts['bytes'])}, {facts['bytes_per_token']:.2f} bytes per completion token"),
        ("sampled by", _model(facts["policy_identity"])),
        ("scored by", _model(facts["teacher_identity"]) if facts["teacher_identity"] else "no one"),
        ("sampling", _settings(facts["sampling"])),
        ("template", _settings({name: value for name, value in facts["template"].items() if value})),
        ("engine", _settings(facts["engine"] or {})),
        *([("scoring engine", _settings(facts["scoring_engine"]))] if facts["scoring_engine"] else []),
        ("columns", ", ".join(f"{name}: {kind}" for name, kind in facts["columns"].items())),
    ]


def statistic_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The statistics of a dataset for people."""
    rows = [
        (f"{name} tokens", f"mean {of['mean']:,.1f}, median {of['median']:,}, p95 {of['p95']:,}, max {of['max']:,}")
        for name, of in (("prompt", summary["prompt_tokens"]), ("completion", summary["completion_tokens"]))
    ]
    total = sum(summary["finish_reasons"].values())
    reasons = (f"{one_line(name)} {count / total:.1%}" for name, count in summary["finish_reasons"].items())
    rows.append(("finish reasons", ", ".join(reasons)))
    rows.append(("truncated", f"{summary['truncated_share']:.1%}"))
    rows.append(("rollout log-prob", _mean(summary["rollout_logprob"], "nats a token")))
    if "gap" in summary:
        rows.append(("teacher log-prob", _mean(summary["teacher_logprob"], "nats a token")))
        rows.append(("gap, teacher minus rollout", _mean(summary["gap"], "nats a token")))
        rows += [
            (f"gap in quarter {quarter} of {QUARTILES}", _mean(mean, "nats a token"))
            for quarter, mean in enumerate(summary["gap_by_quartile"], 1)
        ]
    if "topk_mass" in summary:
        rows.append(("top-k holds the sampled token", _mean(summary["topk_holds_token"], "of the tokens")))
        rows.append(("teacher's mass in the top-k", _mean(summary["topk_mass"], "on average")))
    return rows


def gap_says(summary: Mapping[str, Any]) -> str:
    """What the mean gap estimates."""
    return (
        f"The reverse KL of what sampled to the teacher is about {-summary['gap']['mean']:.3f} nats a token, estimated "
        "from the sampled tokens alone."
    )


def model_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of a model for people."""
    recorded = facts["provenance"]
    return [
        ("URL", one_line(facts["url"])),
        ("kind", f"model, {one_line(facts['role'])}"),
        ("weights sha256", f"{one_line(recorded['weights_sha256'] or 'not recorded')} (as recorded, not checked here)"),
        ("written by", one_line(recorded["created_by"] or "not recorded")),
        ("prompted by", _settings(recorded["template"] or {})),
    ]


def _parts(inspection: Inspection, whole: bool, colour: bool) -> Iterator[RenderableType]:
    if inspection.overrides:
        yield Text(f"OVERRIDDEN: {one_line(', '.join(inspection.overrides))}", "bold white on red")
    if inspection.statistics is not None:
        summary = inspection.statistics.summary()
        yield from _section("Facts", fact_rows(inspection.facts), colour)
        yield from _section("Statistics", statistic_rows(summary), colour)
        if "gap" in summary:
            yield Text(gap_says(summary), "dim")
    else:
        yield from _section("Facts", model_rows(inspection.facts), colour)
    yield Text("\nLineage", "bold underline")
    yield (
        lineage_view.as_rich(inspection.lineage)
        if colour
        else Text("\n".join(lineage_view.as_lines(inspection.lineage)))
    )
    if inspection.note:
        yield Text(f"\n{one_line(inspection.note)}", "yellow")
    if inspection.samples:
        yield Text("\nRows", "bold underline")
        if any(sample.spelled and sample.gap is not None for sample in inspection.samples):
            yield sample_view.legend(colour)
    for sample in inspection.samples:
        yield Text(f"\n{sample_view.heading(sample)}", "bold")
        yield sample_view.as_text(sample, colour=colour, whole=whole)


def _section(title: str, rows: list[tuple[str, str]], colour: bool) -> Iterator[RenderableType]:
    """Two columns below a heading; a terminal folds the second within itself."""
    yield Text(f"\n{title}", "bold underline")
    if colour:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(name), Text(value))
        yield grid
    else:
        width = max(len(name) for name, _ in rows)
        yield Text("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))


def _model(identity: Mapping[str, Any]) -> str:
    revision = f" @ {identity['revision'][:12]}" if identity["revision"] else ""
    return one_line(f"{identity['name']}{revision}, weights {identity['weights_sha256'][:12]}")


def _settings(settings: Mapping[str, Any]) -> str:
    return one_line(", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()))


def _mean(mean: Mapping[str, float | None], unit: str) -> str:
    error = f" ± {mean['standard_error']:.4f}" if mean["standard_error"] is not None else ""
    return f"{mean['mean']:.4f}{error} {unit}" if mean["mean"] is not None else "no tokens"
