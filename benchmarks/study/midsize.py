"""`python -m benchmarks.study.midsize`: the objectives on a language model, to see whether their ranking carries over.

SmolLM2-135M-Instruct teaches itself with six of its thirty layers taken out, on real prompts: the setting of `make
demo`, with its models, prompts and commands. Every objective distils from the same scored rollouts, for as many steps
at the same learning rate, and is measured as there: the exact reverse KL at fresh rollouts on held-out prompts. One
seed, so the intervals are over prompts; they say nothing of other rollouts or another order of the rows.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.machine import processor
from benchmarks.study.arms import IMPORTANCE, PAPER, Arm
from benchmarks.study.cells import Cells
from benchmarks.study.midsize_finding import RESULT, finding
from benchmarks.study.results.pages import table_of
from common.cli import run
from common.config import load_section
from common.dataset import open_dataset
from common.errors import UsageError
from common.report import Table
from common.storage import Store
from precompute.engine.vllm_settings import engine_version
from recipes.demo.paths import Paths
from recipes.demo.run import EVAL_SEED, RECIPE, Stages, evaluate, precompute, train, write_inputs
from trainer.config import OpdConfig
from trainer.watch.sinks import stored_records

ARMS = (
    PAPER,
    Arm("paper, clipped at 1 nat", {"objective": "paper", "clip_advantage": 1.0}),
    Arm("proximal", {"objective": "proximal"}),
    IMPORTANCE,
    Arm("topk reverse, k = 4", {"objective": "topk", "topk": 4}),
    Arm("topk reverse, k = 16", {"objective": "topk", "topk": 16}),
    Arm("topk forward, k = 16", {"objective": "topk", "topk": 16, "kl": "forward"}),
)
SEED = 0
METRICS = {"ess": "ratio/ess", "rollout_k3": "kl/rollout_k3"}


@dataclass(frozen=True)
class Sizes:
    """How much is sampled and trained on; by default as the demo does, but for twice the held-out rollouts."""

    answers: int = 1
    """Of the teacher to each prompt, for SFT."""
    answer_tokens: int = 96
    sft_rows_per_step: int = 8
    rollouts: int = 2
    """Of the student to each prompt."""
    rollout_tokens: int = 64
    rows_per_step: int = 16
    held_out: int = 2
    """Fresh rollouts to each held-out prompt; what chance draws in them is most of a difference's interval."""
    token_budget: int = 1024


ON_CPU = Sizes()
ON_GPU = Sizes(
    answers=4,
    answer_tokens=256,
    sft_rows_per_step=16,
    rollouts=16,
    rollout_tokens=256,
    rows_per_step=64,
    held_out=4,
    token_budget=16384,
)


@dataclass(frozen=True)
class Check:
    """A run of it."""

    root: Path
    start: Paths
    """Where models, prompts, the student after SFT and its scored rollouts lie."""
    sizes: Sizes
    steps: int | None

    def config(self, arm: Arm) -> OpdConfig:
        """What the trainer is told of an arm."""
        words = [f"{key}={value}" for key, value in self.settings(arm).items()]
        return load_section(OpdConfig, RECIPE, "opd", ["model=-", "data=-", "output=-", *words])

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Those that go over the demo's recipe."""
        length = {} if self.steps is None else {"max_steps": self.steps}
        batch = {"rows_per_step": self.sizes.rows_per_step, "token_budget": self.sizes.token_budget}
        return {**batch, **length, "seed": SEED, **arm.settings}


def prepare(paths: Paths, sizes: Sizes) -> None:
    """The demo's stages up to the scored rollouts."""
    paths.root.mkdir(parents=True, exist_ok=True)
    stages, prompts, tuned = Stages(paths), paths.training_prompts, paths.model("sft")
    stages.run("models", "teacher, student, prompts", lambda: write_inputs(paths), result=paths.held_out_prompts)
    lengths = {"samples": sizes.answers, "max-tokens": sizes.answer_tokens}
    answers = paths.dataset("sft")
    stages.run(
        "sft-data",
        "the teacher's answers",
        precompute("sft-data", model=paths.model("teacher"), prompts=prompts, cache=answers, **lengths),
        result=answers / "MANIFEST.json",
    )
    batch = {"rows_per_step": sizes.sft_rows_per_step, "token_budget": sizes.token_budget}
    stages.run(
        "sft",
        "the student learns them",
        train("sft", model=paths.model("pruned"), data=answers, output=paths.root / "sft", **batch),
        result=tuned / "config.json",
    )
    lengths = {"samples": sizes.rollouts, "max-tokens": sizes.rollout_tokens}
    stages.run(
        "precompute",
        "its rollouts, and the teacher's scores",
        precompute("run", model=tuned, prompts=prompts, cache=paths.root / "cache", **lengths),
        result=paths.dataset("scored") / "MANIFEST.json",
    )


def measure(check: Check) -> dict[str, Any]:
    """All arms, of which none is made twice; the contents of midsize.json."""
    configs = [check.config(arm) for arm in ARMS]  # a wrong setting is told before hours of work
    shared = {
        "data": open_dataset(str(check.start.dataset("scored"))).manifest_sha256,
        "held_out": hashlib.sha256(check.start.held_out_prompts.read_bytes()).hexdigest(),
        "recipe": RECIPE.read_text(),
        "sizes": asdict(check.sizes),
    }
    made = Cells(check.root, lambda name: click.echo(f"[{name}]", err=True))
    base = made.get("sft", shared, lambda: _figures(check, check.start.model("sft"), made.place("sft", shared)))
    arms = []
    for arm in ARMS:
        inputs = {**shared, **check.settings(arm)}
        place = made.place(arm.slug, inputs)
        figures = made.get(arm.slug, inputs, lambda arm=arm, place=place: _distilled(check, arm, place))
        arms.append({"name": arm.name, "settings": check.settings(arm), "figures": figures})
    return {
        "seed": SEED,
        "lr": configs[0].lr,
        "sizes": asdict(check.sizes),
        "data": shared["data"],
        "sft": base,
        "arms": arms,
        "machine": {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, **processor()},
        "versions": {"engine": engine_version(), **{name: version(name) for name in ("torch", "transformers")}},
    }


def _distilled(check: Check, arm: Arm, place: Path) -> dict[str, Any]:
    """One arm: train, measure, and keep the model without its checkpoints of over a gigabyte."""
    given = {"model": check.start.model("sft"), "data": check.start.dataset("scored"), "output": place}
    train("opd", **given, **check.settings(arm))()
    figures = _figures(check, place / "export", place)
    records = stored_records(Store(str(place)))
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return {
        **figures,
        "steps": len(records),
        **{name: records[-1][metric] for name, metric in METRICS.items()},
        "spent": next((record["step"] for record in records if "spent" in record), None),
    }


def _figures(check: Check, model: Path, place: Path) -> dict[str, Any]:
    """The reverse KL of a student to its teacher at its own fresh rollouts on held-out prompts."""
    cache, output, sizes = place / "held-out", place / "kl.json", check.sizes
    place.mkdir(parents=True, exist_ok=True)
    lengths = {"samples": sizes.held_out, "max-tokens": sizes.rollout_tokens, "seed": EVAL_SEED}
    precompute("rollouts", model=model, prompts=check.start.held_out_prompts, cache=cache, **lengths)()
    teacher, budget = check.start.model("teacher"), sizes.token_budget
    evaluate(model=model, teacher=teacher, data=cache, output=output, token_budget=budget)()
    found = json.loads(output.read_text())
    return {key: found[key] for key in ("reverse_kl", "tokens", "rows", "prompts", "by_prompt")}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="[default: runs/study/midsize, with --cuda -cuda]")
@click.option("--from", "start", type=click.Path(exists=True, path_type=Path), help="A finished demo to begin from.")
@click.option("--steps", type=click.IntRange(min=1), help="Of each objective.  [default: once over the rollouts]")
@click.option("--cuda", is_flag=True, help="Larger sizes, on this machine's GPU.")
def midsize(output: Path | None, start: Path | None, steps: int | None, cuda: bool) -> None:
    """Make what is missing, print the table, write midsize.json."""
    if cuda and not torch.cuda.is_available():
        raise UsageError("no GPU is here", fix="Leave --cuda out")
    if cuda and start is not None:
        raise UsageError("a demo has the sizes of a CPU", where=f"--from {start}", fix="Leave --from or --cuda out")
    root = (output or Path(f"runs/study/midsize{'-cuda' if cuda else ''}")).absolute()
    sizes = ON_GPU if cuda else ON_CPU
    paths = Paths((start or root).absolute())
    if start is None:
        prepare(paths, sizes)
    elif not (paths.dataset("scored") / "MANIFEST.json").exists():
        raise UsageError("no finished demo", where=str(start), fix="Run `make demo`, or leave --from out")
    found = measure(Check(root, paths, sizes, steps))
    (root / RESULT).write_text(json.dumps(found, indent=1) + "\n")
    told = finding(root)
    assert told is not None
    click.echo(f"\n{Table(*table_of(told)).as_text()}\n\n{told.answer}\n\n{root / RESULT}")


if __name__ == "__main__":
    run(midsize)
