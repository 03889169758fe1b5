"""The steps of the study through the public commands, or the functions right under them; each done once.

`lopd precompute` runs as its users run it. Training calls `trainer.loop.train` in this process, for a run of half a
minute should not wait ten seconds for its imports.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.study.arms import Extent
from benchmarks.study.cells import Cells
from benchmarks.study.setting.measure import entropy, measure
from benchmarks.study.setting.networks import IDS
from benchmarks.study.setting.pretraining import make_base, make_teachers
from benchmarks.study.setting.task import Question, question
from common.config import load_section
from common.errors import LopdError
from trainer.config import SftConfig
from trainer.loop import train
from trainer.world import World

RECIPE = Path(__file__).with_name("study.toml")
SETTING = sorted(Path(__file__).with_name("setting").glob("*.py"))
"""Whose text is part of what a result depends on."""
HELD_OUT, ANSWERED, ANSWERED_AFRESH, ROLLED_OUT, LIVE = 10**6, 2 * 10**6, 25 * 10**5, 3 * 10**6, 5 * 10**6
"""Where the seeds of the questions begin, for measuring, SFT, more SFT, precompute and live distillation."""
BETWEEN = 10**5
"""Seeds of questions that each seed of the study has for its own."""


class CommandFailed(LopdError):
    """A command of ours failed; it has said why."""


class Lab:
    """All that is made below `root`, found again when it is there."""

    def __init__(self, root: Path, extent: Extent, world: World, say: Callable[[str], None]) -> None:
        setting = f"{extent} {RECIPE.read_text()} " + " ".join(file.read_text() for file in SETTING)
        self.root = root / hashlib.sha256(setting.encode()).hexdigest()[:8]
        """Another setting begins anew, beside what there is."""
        self.extent, self.world = extent, world
        self.cells = Cells(self.root / "cells", say)
        self._made: dict[Path, dict[str, Any]] = {}

    def teacher(self, name: str) -> Path:
        """Teacher `a` or `b`."""
        folder = self.root / "teachers"
        steps = self.extent.teacher_steps

        def make() -> dict[str, Any]:
            make_teachers(folder, steps, lambda *progress: None)
            return {}

        self.cells.get("teachers", {"steps": steps}, make)
        return folder / name

    def base(self) -> Path:
        """The student before SFT."""
        folder, steps, noise = self.root / "base", self.extent.base_steps, self.extent.noise

        def make() -> dict[str, Any]:
            make_base(folder, steps, noise, lambda *progress: None)
            return {}

        self.cells.get("base", {"steps": steps, "noise": noise}, make)
        return folder

    def softness(self, name: str) -> dict[str, Any]:
        """Accuracy and entropy of a teacher on its own answers."""

        def make() -> dict[str, Any]:
            model = opened(self.teacher(name))
            found = measure(model, model, model, self.held_out, seed=0)
            return {"accuracy": found.accuracy, "entropy": entropy(model, self.held_out, seed=0)}

        return self.cells.get(f"teacher-{name}", {"steps": self.extent.teacher_steps}, make)

    @property
    def vocabulary(self) -> int:
        """Tokens that the networks know."""
        return len(IDS)

    @cached_property
    def held_out(self) -> list[Question]:
        """The questions on which everything is measured, and nothing is trained."""
        return [question(random.Random(HELD_OUT + index)) for index in range(self.extent.held_out)]

    def questions(self, first: int, count: int) -> list[Question]:
        """Questions to train on: the same for the same `first`."""
        held_out = set(self.held_out)
        return list(islice((one for one in _questions(first) if one not in held_out), count))

    def live_questions(self, seed: int, rows: int) -> Callable[[int], list[Question]]:
        """Fresh questions of a step of live distillation, by its number."""
        first = LIVE + seed * BETWEEN
        return lambda step: self.questions(first + step * 2 * rows, rows)

    def answers(self) -> Path:
        """Teacher A's answers that every student is fine-tuned on."""
        return self._answers("answers", ANSWERED, self.extent.answers)

    def fresh_answers(self) -> Path:
        """As many of teacher A's answers to other questions as there are rollouts in a precompute."""
        return self._answers("fresh-answers", ANSWERED_AFRESH, self.extent.rollouts)

    def _answers(self, name: str, first: int, count: int) -> Path:
        cache = self.root / name
        prompts = self._prompts(name, self.questions(first, count))
        self._command("sft-data", cache, model=self.teacher("a"), prompts=prompts)
        return cache

    def student(self, seed: int) -> Path:
        """A student fine-tuned on teacher A's answers for as long as it gains; the seed is of the order of the rows."""
        return self.fine_tuned(f"seed-{seed}/sft", self.base(), self.answers(), self.extent.sft_steps, seed)

    def fine_tuned(self, name: str, model: Path, answers: Path, steps: int, seed: int, **settings: float) -> Path:
        """`model` after SFT on these answers."""
        output = self.root / name

        def make() -> dict[str, Any]:
            given = {"model": model, "data": answers, "output": output, "max_steps": steps, "seed": seed, **settings}
            words = [f"{key}={value}" for key, value in given.items()]
            train(load_section(SftConfig, RECIPE, "sft", words), self.world, quiet)
            return {}

        self.cells.get(f"{name}-student", {"seed": seed, "steps": steps, **settings}, make)
        return output / "export"

    def rollouts(self, name: str, model: Path, seed: int, rows: int, first: int = 0, **sampling: float) -> Path:
        """Rollouts of `model`; `first` moves on to fresh questions of the same seed."""
        cache = self.root / name
        asked = self.questions(ROLLED_OUT + seed * BETWEEN + first, rows)
        settings = [word for key, value in sampling.items() for word in ("--set", f"sampling.{key}={value}")]
        self._command("rollouts", cache, *settings, model=model, prompts=self._prompts(f"{name}-prompts", asked))
        return cache

    def scored(self, name: str, rollouts: Path, teacher: str, topk: int = 0) -> Path:
        """The rollouts with the grades of teacher `a`, their SFT teacher, or of `b`."""
        cache = self.root / name
        other = () if teacher == "a" else ("--allow-teacher-mismatch",)
        self._command("score", cache, *other, rollouts=rollouts, teacher=self.teacher(teacher), topk=topk)
        return cache

    def precompute(self, cache: Path) -> dict[str, float]:
        """What it took to make a dataset: `seconds` in all, `working_s` without the engine's start, and `tokens`."""
        status = self._made[cache]["status"]
        working = status["tokens"] / status["tokens_per_s"]
        return {"seconds": status["seconds"], "working_s": working, "tokens": status["tokens"]}

    def _prompts(self, name: str, asked: Sequence[Question]) -> Path:
        file = self.root / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": f"{index:05d}", "prompt": one.prompt, "answer": one.answer} for index, one in enumerate(asked)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def _command(self, phase: str, cache: Path, *more: str, **flags: Any) -> None:
        """`lopd precompute <phase>` into `cache`, unless that is finished; its own seconds are kept in a cell."""
        flags = {key: str(value) for key, value in flags.items()}

        def make() -> dict[str, Any]:
            words = [word for key, value in flags.items() for word in (f"--{key}", value)]
            command = [sys.executable, "-m", "common.cli", "precompute", phase, "--config", str(RECIPE), *words, *more]
            status = cache.with_name(f"{cache.name}-status.json")
            log = cache.with_name(f"{cache.name}.log")
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as stderr:
                done = subprocess.run(
                    [*command, "--cache", str(cache), "--status", str(status)],
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            if done.returncode:
                raise CommandFailed(f"{phase} failed with {done.returncode}", where=str(log), fix="Run again to resume")
            return {"status": json.loads(status.read_text())}

        name = f"{cache.relative_to(self.root)}/precompute"
        self._made[cache] = self.cells.get(
            name, {"phase": phase, "more": more, **flags, "recipe": RECIPE.read_text()}, make
        )


def opened(folder: Path) -> PreTrainedModel:
    """The network in `folder`, to be asked and not trained."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _questions(first: int) -> Iterator[Question]:
    number = first
    while True:
        yield question(random.Random(number))
        number += 1


def quiet(line: str) -> None:
    """The cells say what is done; a run's own lines stand in its folder."""
