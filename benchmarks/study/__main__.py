"""`python -m benchmarks.study`: the study, from nothing to docs/study.*; what is done already is not done again."""

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from transformers.utils.logging import disable_progress_bar

from benchmarks.study.arms import Extent
from benchmarks.study.claims import claims
from benchmarks.study.findings import Study
from benchmarks.study.lab import Lab
from benchmarks.study.report import agreement, read, write
from common.cli import run
from trainer.world import joined

DOCS = Path(__file__).parents[2] / "docs"
QUICK_SEEDS = 2


@click.command()
@click.option(
    "--quick", is_flag=True, help="Two seeds of the claims, compared with docs/study.json; a quarter of an hour."
)
@click.option("--seeds", default=5, show_default=True, help="Of the claims.")
@click.option("--output", default="runs/study", show_default=True, help="Folder for models, datasets and cells.")
def study(quick: bool, seeds: int, output: str) -> None:
    """Run what is missing, write the report, and say what was found."""
    disable_progress_bar()
    with joined("cpu") as world:
        lab = Lab(Path(output).absolute(), Extent(), world, lambda line: click.echo(line, err=True))
        found = Study(_about(lab), claims(lab, range(QUICK_SEEDS if quick else seeds)))
    write(found, lab.root / "report" if quick else DOCS)
    for finding in found.findings:
        click.echo(f"({finding.key}) {finding.title}: {finding.verdict}. {finding.answer}")
    if quick:
        for line in agreement(found, read(DOCS)):
            click.echo(line)


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
