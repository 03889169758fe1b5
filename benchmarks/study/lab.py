"""The steps of the study through the public commands, or the functions right under them; each done once.

`lopd precompute` runs as its users run it. Training calls `trainer.loop.train` in this process, for a run of half a
minute should not wait ten seconds for its imports.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.study import questions
from benchmarks.study.arms import Extent
from benchmarks.study.cells import Cells, Inputs, digest
from benchmarks.study.questions import ANSWERED, ANSWERED_AFRESH, BETWEEN, LIVE, ROLLED_OUT
from benchmarks.study.setting import measure as measuring
from benchmarks.study.setting import networks, pretraining, task
from benchmarks.study.setting.measure import entropy, measure
from benchmarks.study.setting.networks import IDS
from benchmarks.study.setting.pretraining import make_base, make_teachers
from benchmarks.study.setting.task import Question
from common.config import load_section
from common.errors import LopdError
from trainer.config import OpdConfig, SftConfig, TrainConfig
from trainer.loop import train
from trainer.world import World

RECIPE = Path(__file__).with_name("study.toml")
PRETRAINING = [Path(str(module.__file__)) for module in (task, networks, pretraining)]
"""Whose text makes the teachers and the base model what they are."""
TIMED = "timing/"
"""Begins the names of commands whose seconds count."""
Section = Literal["sft", "opd"]
SECTIONS: dict[Section, type[TrainConfig]] = {"sft": SftConfig, "opd": OpdConfig}
PLACES = {"model", "data", "output", "max_steps"}
"""Settings of the trainer that say where and how far, not how."""


class CommandFailed(LopdError):
    """A command of ours failed; it has said why."""


class Lab:
    """All that is made below `root`, found again when it is there."""

    def __init__(self, root: Path, extent: Extent, world: World, say: Callable[[str], None]) -> None:
        self.root, self.extent, self.world = root, extent, world
        self.cells = Cells(root, say)
        self._seconds = dict[Path, float]()

    def teacher(self, name: str) -> Path:
        """Teacher `a` or `b`."""
        inputs = {"steps": self.extent.teacher_steps, "by": digest(*PRETRAINING)}
        folder = self.cells.place("teachers", inputs)

        def make() -> dict[str, Any]:
            make_teachers(folder, self.extent.teacher_steps, lambda *progress: None)
            return {}

        self.cells.get("teachers", inputs, make)
        return folder / name

    def base(self) -> Path:
        """The student before SFT."""
        steps, noise = self.extent.base_steps, self.extent.noise
        inputs = {"steps": steps, "noise": noise, "by": digest(*PRETRAINING)}
        folder = self.cells.place("base", inputs)

        def make() -> dict[str, Any]:
            make_base(folder, steps, noise, lambda *progress: None)
            return {}

        self.cells.get("base", inputs, make)
        return folder

    @property
    def vocabulary(self) -> int:
        """Tokens that the networks know."""
        return len(IDS)

    def held_out(self, seed: int) -> Sequence[Question]:
        """The questions on which everything of this seed is measured; nobody is fine-tuned or distilled on any."""
        return questions.held_out(seed, self.extent.held_out)

    def questions(self, first: int, count: int) -> list[Question]:
        """Questions to train on: the same for the same `first`."""
        return questions.to_train_on(first, count, self.extent.held_out)

    def live_questions(self, seed: int, rows: int) -> Callable[[int], list[Question]]:
        """Fresh questions of a step of live distillation, by its number."""
        first = LIVE + seed * BETWEEN
        return lambda step: self.questions(first + step * 2 * rows, rows)

    def figures(self, student: Path, start: Path, teacher: str, seed: int) -> dict[str, float]:
        """What `student` is worth on the held-out questions of this seed, as `measure` gives it."""
        models = (opened(student), opened(self.teacher(teacher)), opened(start))
        return asdict(measure(*models, self.held_out(seed), seed))

    def measured(self, seed: int) -> Inputs:
        """What figures depend on beside the models."""
        return {
            "seed": seed,
            "held_out": self.extent.held_out,
            "by": digest(*PRETRAINING[:1], Path(measuring.__file__)),
        }

    def skill(self, name: str, seed: int) -> dict[str, float]:
        """Accuracy of a teacher, and entropy of its tokens in nats: how soft it is."""
        folder = self.teacher(name)

        def make() -> dict[str, Any]:
            model = opened(folder)
            found = measure(model, model, model, self.held_out(seed), seed)
            return {"accuracy": found.accuracy, "entropy": entropy(model, self.held_out(seed), seed)}

        return self.cells.get(f"seed-{seed}/teacher-{name}", {"teacher": weights(folder), **self.measured(seed)}, make)

    def answers(self) -> Path:
        """Teacher A's answers that every student is fine-tuned on."""
        return self._answers("answers", ANSWERED, self.extent.answers)

    def fresh_answers(self) -> Path:
        """As many of teacher A's answers to other questions as there are rollouts in a precompute."""
        return self._answers("fresh-answers", ANSWERED_AFRESH, self.extent.rollouts)

    def _answers(self, name: str, first: int, count: int) -> Path:
        return self._command(name, "sft-data", model=self.teacher("a"), prompts=self.questions(first, count))

    def student(self, seed: int) -> Path:
        """A student fine-tuned on teacher A's answers for as long as it gains; the seed is of the order of the rows."""
        folder, _ = self.fine_tuned(f"seed-{seed}/sft", self.base(), self.answers(), self.extent.sft_steps, seed)
        return folder

    def fine_tuned(
        self, name: str, model: Path, answers: Path, steps: int, seed: int, **settings: Any
    ) -> tuple[Path, str]:
        """Where `model` lies after so many steps of SFT on these answers, and its identity then: more steps, which are
        to be asked for later than fewer, put other weights there."""
        inputs = {
            "model": weights(model),
            "data": manifest(answers),
            "settings": self.settings("sft", seed, settings),
        }
        output = self.cells.place(name, inputs)

        def make() -> dict[str, Any]:
            places = {"model": model, "data": answers, "output": output}
            self.train("sft", seed, {**settings, **places, "max_steps": steps})
            return {"weights": weights(output / "export")}

        made = self.cells.get(f"{name}-{steps}", {**inputs, "steps": steps}, make)
        return output / "export", made["weights"]

    def rollouts(self, name: str, model: Path, seed: int, rows: int, first: int = 0, **sampling: float) -> Path:
        """Rollouts of `model`; `first` moves on to fresh questions of the same seed."""
        asked = self.questions(ROLLED_OUT + seed * BETWEEN + first, rows)
        more = [word for key, value in sampling.items() for word in ("--set", f"sampling.{key}={value}")]
        return self._command(f"{name}/rollouts", "rollouts", *more, model=model, prompts=asked)

    def scored(self, name: str, rollouts: Path, teacher: str, topk: int = 0) -> Path:
        """The rollouts with the grades of teacher `a`, their SFT teacher, or of `b`."""
        more = ["--topk", str(topk), *([] if teacher == "a" else ["--allow-teacher-mismatch"])]
        place = f"{name}/scored-{teacher}"
        return self._command(place, "score", *more, rollouts=rollouts, teacher=self.teacher(teacher))

    def settings(self, section: Section, seed: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """All that the trainer is told of how to train, defaults too."""
        config = self.config(section, seed, {**given, "model": "-", "data": "-", "output": "-"})
        return {key: value for key, value in config.model_dump(mode="json").items() if key not in PLACES}

    def config(self, section: Section, seed: int, given: Mapping[str, Any]) -> TrainConfig:
        """The recipe's section, over it what this extent says, over that what is given."""
        sizes = {"seed": seed, "rows_per_step": self.extent.rows_per_step}
        rate = {"lr": self.extent.lr} if section == "opd" else {}
        words = [
            f"{key}={value if isinstance(value, str | Path) else json.dumps(value)}"
            for key, value in {**sizes, **rate, **given}.items()
        ]
        return load_section(SECTIONS[section], RECIPE, section, words)

    def train(self, section: Section, seed: int, given: Mapping[str, Any]) -> None:
        """Train as `config` says."""
        train(self.config(section, seed, given), self.world, quiet)

    def _command(self, name: str, phase: str, *more: str, **given: Any) -> Path:
        """The dataset that `lopd precompute <phase>` makes of this, which it does unless it is there already."""
        inputs = {
            "phase": phase,
            "more": more,
            "recipe": RECIPE.read_text(),
            **{key: _content(value) for key, value in given.items()},
        }
        cache = self.cells.place(name, inputs)

        def make() -> dict[str, Any]:
            if name.startswith(TIMED):
                shutil.rmtree(cache, ignore_errors=True)  # the seconds of half a command are none
            cache.parent.mkdir(parents=True, exist_ok=True)
            flags = {key: _on_disk(value, cache) for key, value in given.items()}
            words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
            command = [sys.executable, "-m", "common.cli", "precompute", phase, "--config", str(RECIPE), *words, *more]
            log = cache.with_name(f"{cache.name}.log")
            with log.open("w") as stderr:
                done = subprocess.run(
                    [*command, "--cache", str(cache)],
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            if done.returncode:
                raise CommandFailed(f"{phase} failed with {done.returncode}", where=str(log), fix="Run again to resume")
            return {}

        self._seconds[cache] = self.cells.get(f"{name}-dataset", inputs, make)["seconds"]
        return cache

    def seconds(self, dataset: Path) -> float:
        """Wall time of the command that made a dataset which was asked for."""
        return self._seconds[dataset]


def weights(folder: Path) -> str:
    """Identity of the network in `folder`."""
    return digest(folder / "model.safetensors")


def manifest(dataset: Path) -> str:
    """Identity of a finished dataset."""
    return digest(dataset / "MANIFEST.json")


def opened(folder: Path) -> PreTrainedModel:
    """The network in `folder`, to be asked and not trained."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quiet(line: str) -> None:
    """The cells say what is done; a run's own lines stand in its folder."""


def _content(given: Path | Sequence[Question]) -> str:
    """Identity of what a command is given: a model, a dataset, or questions."""
    if isinstance(given, Path):
        return manifest(given) if (given / "MANIFEST.json").exists() else weights(given)
    return hashlib.sha256("\n".join(one.prompt for one in given).encode()).hexdigest()[:16]


def _on_disk(given: Path | Sequence[Question], cache: Path) -> Path:
    """The same, as a command takes it."""
    if isinstance(given, Path):
        return given
    file = cache.with_name(f"{cache.name}-prompts.jsonl")
    rows = [{"id": f"{index:05d}", "prompt": one.prompt, "answer": one.answer} for index, one in enumerate(given)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
