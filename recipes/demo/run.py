"""`make demo`: the main job, end to end, through the public commands.

teacher's answers -> SFT -> rollouts -> teacher's scores -> OPD -> export, then the exact reverse KL to the teacher of
the pruned, the fine-tuned and the distilled student on held-out prompts. A stage whose result is there is skipped.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from common.cli import run
from common.errors import LopdError
from common.progress import duration
from recipes.demo.paths import STUDENTS, Paths
from recipes.demo.results import kl_table, measured, require_progress, time_table, write_page

RECIPE = Path(__file__).parents[1] / "demo.toml"
PRUNED_LAYERS = range(12, 18)
HELD_OUT_EVERY = 3
EVAL_SEED = 9
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Else every engine warns of how it binds memory."""


class StageFailed(LopdError):
    """A stage's command failed; it has said why."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(f"stage {stage} failed with exit code {code}", fix="See above; run again to resume")
        self.exit_code = code


class Stages:
    """Runs stages in order, skips those whose result is there, and remembers the seconds of all their attempts."""

    def __init__(self, paths: Paths) -> None:
        self._file = paths.root / "stages.json"
        self._recipe = hashlib.sha256(RECIPE.read_bytes()).hexdigest()
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        same = known.get("recipe") == self._recipe  # with another recipe the commands refuse what no longer fits
        self._done: list[str] = known["done"] if same else []
        self.seconds: dict[str, float] = known["seconds"] if same else {}

    def run(self, name: str, does: str, action: Callable[[], None], result: Path) -> None:
        """Do one stage, unless it was done and its result is still there."""
        if name in self._done and result.exists():
            click.echo(f"[{name}] done before in {duration(self.seconds[name])}", err=True)
            return
        click.echo(f"[{name}] {does}", err=True)
        began = time.monotonic()
        try:
            action()
            self._done.append(name)
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 1)
            kept = {"recipe": self._recipe, "done": self._done, "seconds": self.seconds}
            self._file.write_text(json.dumps(kept, indent=2) + "\n")


def precompute(phase: str, **flags: object) -> Callable[[], None]:
    """`lopd precompute <phase>` on the demo's recipe."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return _command(phase, "common.cli", "precompute", phase, "--config", str(RECIPE), *words)


def train(stage: str, **settings: object) -> Callable[[], None]:
    """`python -m trainer <stage>` on the demo's recipe."""
    return _command(stage, "trainer", stage, str(RECIPE), *_words(settings))


def evaluate(**settings: object) -> Callable[[], None]:
    """`python -m trainer eval` on the demo's recipe."""
    return _command("eval", "trainer", "eval", str(RECIPE), *_words(settings))


def _words(settings: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def _command(stage: str, module: str, *words: str) -> Callable[[], None]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **QUIET}

    def run_it() -> None:
        code = subprocess.run([sys.executable, "-m", module, *words], env=environment).returncode
        if code:
            raise StageFailed(stage, code)

    return run_it


def run_stages(paths: Paths) -> Stages:
    """All stages, in the order of the path."""
    stages = Stages(paths)
    teacher, pruned, tuned, distilled = (paths.model(name) for name in ("teacher", "pruned", "sft", "opd"))
    answers, scored, prompts = paths.dataset("sft"), paths.dataset("scored"), paths.training_prompts
    stages.run(
        "models",
        "unpack the teacher, prune the student, write the prompts",
        lambda: write_inputs(paths),
        result=paths.held_out_prompts,
    )
    stages.run(
        "sft-data",
        "the teacher answers the training prompts",
        precompute("sft-data", model=teacher, prompts=prompts, cache=answers),
        result=answers / "MANIFEST.json",
    )
    stages.run(
        "sft",
        "fine-tune the pruned student on those answers",
        train("sft", model=pruned, data=answers, output=paths.root / "sft"),
        result=tuned / "config.json",
    )
    stages.run(
        "precompute",
        "sample the student's rollouts and score them by the teacher of its lineage",
        precompute("run", model=tuned, prompts=prompts, cache=paths.root / "cache"),
        result=scored / "MANIFEST.json",
    )
    stages.run(
        "opd",
        "distil from the scores; no teacher runs",
        train("opd", model=tuned, data=scored, output=paths.root / "opd"),
        result=distilled / "config.json",
    )
    for student in STUDENTS:
        _measure(stages, paths, student)
    return stages


def _measure(stages: Stages, paths: Paths, student: str) -> None:
    model, rollouts = paths.model(student), paths.dataset(f"held-out-{student}")
    stages.run(
        f"rollouts of {student}",
        f"fresh rollouts of the student {STUDENTS[student]}, on held-out prompts",
        precompute("rollouts", model=model, prompts=paths.held_out_prompts, cache=rollouts, samples=1, seed=EVAL_SEED),
        result=rollouts / "MANIFEST.json",
    )
    stages.run(
        f"kl of {student}",
        "exact reverse KL to the teacher at those states",
        evaluate(model=model, teacher=paths.model("teacher"), data=rollouts, output=paths.kl(student)),
        result=paths.kl(student),
    )


def write_inputs(paths: Paths) -> None:
    """Teacher, pruned student and both files of prompts."""
    from recipes.demo.models import build_teacher, prune_layers
    from recipes.demo.prompts import write_prompts

    build_teacher(paths.model("teacher"))
    prune_layers(paths.model("teacher"), paths.model("pruned"), PRUNED_LAYERS)
    write_prompts(paths.training_prompts, paths.held_out_prompts, HELD_OUT_EVERY)


@click.command()
@click.option("--output", default="runs/demo", show_default=True, help="Folder for models, datasets and the report.")
def demo(output: str) -> None:
    """Run what is missing, then print the table and write report.json and report.html."""
    paths = Paths(Path(output).absolute())
    for folder in (paths.root, paths.root / "kl"):
        folder.mkdir(parents=True, exist_ok=True)
    stages = run_stages(paths)
    result = measured(paths, stages.seconds)
    (paths.root / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    page = write_page(paths, result)
    click.echo(f"\n{kl_table(result).as_text()}\n\n{time_table(result).as_text()}\n\n{page}")
    require_progress(result)


if __name__ == "__main__":
    run(demo)
