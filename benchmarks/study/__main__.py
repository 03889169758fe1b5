"""`python -m benchmarks.study`: the study, from nothing to docs/study.*; what is done already is not done again."""

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from transformers.utils.logging import disable_progress_bar

from benchmarks.study.arms import SHORT, Extent
from benchmarks.study.beyond import beyond
from benchmarks.study.claims import claims
from benchmarks.study.lab import Lab
from benchmarks.study.midsize_finding import finding as midsize_finding
from benchmarks.study.results.files import agreement, headline, read, write
from benchmarks.study.results.findings import Finding, Study
from common.cli import run
from common.errors import DataError
from trainer.world import joined

DOCS = Path(__file__).parents[2] / "docs"
SEEDS, BEYOND_SEEDS, QUICK_SEEDS = 5, 3, 2


@click.command()
@click.option(
    "--quick", is_flag=True, help="The claims alone, at the first stop and with two seeds, beside docs/study.json."
)
@click.option("--output", default="runs/study", show_default=True, help="Folder for models, datasets and results.")
def study(quick: bool, output: str) -> None:
    """Run what is missing, write the report, and say what was found.

    The whole study takes hours and writes docs/study.md, .html and .json; it may be broken off at any time.
    """
    disable_progress_bar()
    root = Path(output).absolute()
    with joined("cpu") as world:
        lab = Lab(root, Extent(stops=(SHORT,)) if quick else Extent(), world, lambda line: click.echo(line, err=True))
        found = claims(lab, range(QUICK_SEEDS if quick else SEEDS))
        if not quick:
            found += beyond(lab, range(BEYOND_SEEDS))
            found += _midsize(root / "midsize")
        made = Study(_about(lab), found)
    write(made, lab.root if quick else DOCS)
    click.echo(headline(made))
    if quick:
        _compare(made)


def _midsize(folder: Path) -> list[Finding]:
    """The check on a language model, if it has been made."""
    found = midsize_finding(folder)
    if found is None:
        click.echo(f"left out: no mid-size check in {folder}. Run `python -m benchmarks.study.midsize`", err=True)
    return [found] if found else []


def _compare(made: Study) -> None:
    """Say whether the rows agree with those of the whole study."""
    apart = agreement(made, read(DOCS))
    for line in apart:
        click.echo(line, err=True)
    if apart:
        raise DataError(f"{len(apart)} figures do not agree with the recorded ones", where=str(DOCS / "study.json"))
    click.echo("All of it agrees with docs/study.json within its intervals.")


def _about(lab: Lab) -> dict[str, Any]:
    packages = ("lightning-opd", "torch", "transformers")
    return {
        "sizes": asdict(lab.extent),
        "teachers": {name: lab.softness(name) for name in "ab"},
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "command": "make study",
    }


if __name__ == "__main__":
    run(study)
