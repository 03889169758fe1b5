"""`python -m benchmarks.study`: the study, from nothing to docs/study.*; what is done already is not done again."""

import platform
import sys
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import processor
from benchmarks.study import midsize_finding
from benchmarks.study.arms import SHORT, Extent
from benchmarks.study.beyond.findings import beyond
from benchmarks.study.claims import claims
from benchmarks.study.cost import cost, timing
from benchmarks.study.lab import Lab
from benchmarks.study.results.files import agreement, headline, read, write
from benchmarks.study.results.findings import Finding, Study
from benchmarks.study.runs import run_seed
from common.cli import run
from common.errors import DataError
from precompute.engine.vllm_settings import engine_version
from trainer.world import joined

DOCS = Path(__file__).parents[2] / "docs"
ALLOWED = {"accuracy": 0.03, "reverse_kl": 0.02, "drift": 0.02}
"""How far means may lie apart, by column, where their intervals do not meet: networks that another machine has trained
from nothing are not the same ones."""
SEEDS, BEYOND_SEEDS, QUICK_SEEDS, TIMINGS = 5, 3, 2, 3


@click.command()
@click.option(
    "--quick",
    is_flag=True,
    help="The claims alone but for seconds, at the first stop and with two seeds, beside docs/study.json.",
)
@click.option("--output", default="runs/study", show_default=True, help="Folder for models, datasets and results.")
def study(quick: bool, output: str) -> None:
    """Run what is missing, write the report, and say what was found.

    The whole study takes hours and writes docs/study.md, .html and .json; it may be broken off at any time. Leave the
    machine to it: its last part takes seconds.
    """
    disable_progress_bar()
    root = Path(output).absolute()
    recorded = read(DOCS) if quick else None
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    with joined("cpu") as world:
        extent = Extent(stops=(SHORT,)) if quick else Extent()
        lab = Lab(root, extent, world, lambda name: click.echo(f"{datetime.now():%H:%M:%S} {name}", err=True))
        runs = [run_seed(lab, seed) for seed in seeds]
        found = claims(runs, extent.stops, seeds)
        if not quick:
            besides = beyond(lab, range(BEYOND_SEEDS))
            timings = [timing(lab, number) for number in range(TIMINGS)]
            found += [cost(timings, runs, extent), *besides, *_midsize(root / "midsize")]
        made = Study({**_about(lab), **({} if quick else midsize_finding.about(root / "midsize"))}, found)
    write(made, root / "quick" if quick else DOCS)
    click.echo(headline(made))
    if recorded:
        _compare(made, recorded)


def _midsize(folder: Path) -> list[Finding]:
    """The check on a language model, if it has been made."""
    found = midsize_finding.finding(folder)
    if found is None:
        click.echo(f"left out: no mid-size check in {folder}. Run `python -m benchmarks.study.midsize`", err=True)
    return [found] if found else []


def _compare(made: Study, recorded: Study) -> None:
    """Say whether the rows agree with those of the whole study."""
    apart = agreement(made, recorded, ALLOWED)
    for line in apart:
        click.echo(line, err=True)
    if apart:
        raise DataError(f"{len(apart)} figures do not agree with the recorded ones", where=str(DOCS / "study.json"))
    click.echo("All of it agrees with docs/study.json.")


def _about(lab: Lab) -> dict[str, Any]:
    packages = ("lightning-opd", "torch", "transformers")
    return {
        "sizes": asdict(lab.extent),
        "teachers_at_seed_0": {
            name: {key: lab.skill(name, 0)[key] for key in ("accuracy", "entropy")} for name in "ab"
        },
        "machine": {**processor(), "threads": torch.get_num_threads()},
        "versions": {
            **{name: version(name) for name in packages},
            "engine": engine_version(),
            "python": platform.python_version(),
        },
        "command": " ".join(["python -m benchmarks.study", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    run(study)
