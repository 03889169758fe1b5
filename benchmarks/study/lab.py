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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.study.arms import Extent
from benchmarks.study.cells import Cells
from benchmarks.study.live import Live, live, write_weights
from benchmarks.study.measure import entropy, measure
from benchmarks.study.networks import IDS
from benchmarks.study.pretraining import make_base, make_teachers
from benchmarks.study.task import Question, question
from common.config import load_section
from common.dataset import open_dataset
from common.errors import LopdError
from common.storage import Store
from trainer.config import OpdConfig, SftConfig
from trainer.loop import optimizer_of, train
from trainer.model import load_sharded
from trainer.reader import Reader, step_batches
from trainer.run import rules_of
from trainer.step import train_step
from trainer.watch.sinks import stored_records
from trainer.world import World

RECIPE = Path(__file__).with_name("study.toml")
WATCHED = ("kl/teacher_k1", "kl/rollout_k3", "ratio/ess", "ratio/clipped", "entropy")
"""Metrics of the trainer that are kept of every step."""
HELD_OUT, ANSWERED, ROLLED_OUT, LIVE = 10**6, 2 * 10**6, 3 * 10**6, 5 * 10**6
"""Where the seeds of the questions begin, for measuring, SFT, precompute and live distillation."""
CONTROL_NATS = 0.5
"""Of the control: the mean |advantage| of a student after SFT is of this order."""
BETWEEN = 10**5
"""Seeds of questions that each seed of the study has for its own."""


class CommandFailed(LopdError):
    """A command of ours failed; it has said why."""


class Lab:
    """All that is made below `root`, found again when it is there."""

    def __init__(self, root: Path, extent: Extent, world: World, say: Callable[[str], None]) -> None:
        self.root, self.extent, self.world, self._say = root, extent, world, say
        self.cells = Cells(root / "cells", say)
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

    def sft_data(self) -> Path:
        """Teacher A's answers."""
        cache = self.root / "answers"
        prompts = self._prompts("answers", self.questions(ANSWERED, self.extent.answers))
        self._command("sft-data", cache, model=self.teacher("a"), prompts=prompts)
        return cache

    def student(self, seed: int) -> Path:
        """A student fine-tuned on teacher A's answers; the seed is of the order of the rows."""
        base, output = self.base(), self.root / f"seed-{seed}/sft"
        words = [f"model={base}", f"data={self.sft_data()}", f"output={output}", f"seed={seed}"]
        words.append(f"max_steps={self.extent.sft_steps}")
        train(load_section(SftConfig, RECIPE, "sft", words), self.world, _quiet)
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

    def distil(
        self,
        name: str,
        start: Path,
        data: Path,
        teacher: str,
        stops: Sequence[int],
        seed: int,
        since: Path | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """What offline distillation comes to after each of `stops` steps: the figures, and the trainer's metrics.

        Args:
            since: the SFT model, of a later round; `start` unless given.
        """
        sft = since or start
        return [self._distil_to(stop, name, start, sft, data, teacher, seed, settings) for stop in stops]

    def _distil_to(
        self,
        stop: int,
        name: str,
        start: Path,
        sft: Path,
        data: Path,
        teacher: str,
        seed: int,
        settings: Mapping[str, Any],
    ) -> dict[str, Any]:
        output, mismatch = self.root / name, teacher != "a"
        words = [f"{key}={value}" for key, value in {"lr": self.extent.lr, **settings}.items()]

        def make() -> dict[str, Any]:
            places = [f"model={start}", f"data={data}", f"output={output}", f"seed={seed}", f"max_steps={stop}"]
            allowed = [f"allow_teacher_mismatch={str(mismatch).lower()}"]
            train(load_section(OpdConfig, RECIPE, "opd", [*places, *allowed, *words]), self.world, _quiet)
            records = stored_records(Store(str(output)))
            return {
                "step": stop,
                **self.figures(output / "export", sft, teacher),
                "step_seconds": sorted(record["time/step"] for record in records)[len(records) // 2],
                "tokens": sum(record["data/tokens"] for record in records),
                "metrics": {key: [record.get(key) for record in records] for key in WATCHED},
            }

        inputs = {**self._of(start, teacher), "data": _manifest(data), "settings": words, "seed": seed, "stop": stop}
        return self.cells.get(f"{name}/{stop}", inputs, make)

    def live(
        self, name: str, start: Path, teacher: str, stops: Sequence[int], seed: int, **settings: Any
    ) -> list[dict[str, Any]]:
        """What live distillation comes to after each of `stops` steps, with the seconds of its parts until then."""
        words = [f"{key}={value}" for key, value in {"lr": self.extent.lr, **settings}.items()]

        def make() -> dict[str, Any]:
            found = []

            def reached(run: Live) -> None:
                folder = self.root / name / f"step-{run.step}"
                write_weights(run.model, start, folder, self.world)
                parts = {"parts": asdict(run.seconds)}
                found.append({"step": run.step, **self.figures(folder, start, teacher), **parts})

            config = load_section(OpdConfig, RECIPE, "opd", ["model=-", "data=-", "output=-", f"seed={seed}", *words])
            rows, first = self.extent.rows_per_step, LIVE + seed * BETWEEN
            live(
                self.world,
                start,
                self.teacher(teacher),
                config,
                lambda step: self.questions(first + step * 2 * rows, rows),
                stops,
                reached,
                self.root / name / "now",
            )
            return {"stops": found}

        inputs = {**self._of(start, teacher), "settings": words, "seed": seed, "stops": stops}
        return self.cells.get(name, inputs, make)["stops"]

    def control(self, name: str, start: Path, data: Path, steps: int, seed: int) -> dict[str, Any]:
        """The same rows, steps and optimizer, but every token gets one negative advantage, and the teacher no say.

        What this gains comes of being trained on one's own answers at all, and of no teacher.
        """
        words = [f"model={start}", f"data={data}", "output=-", f"seed={seed}", f"lr={self.extent.lr}"]
        config = load_section(OpdConfig, RECIPE, "opd", words)

        def make() -> dict[str, Any]:
            how = {"compute": config.compute, "attention": config.attention, "checkpoint_activations": False}
            model = load_sharded(start, self.world, **how)
            optimizer = optimizer_of(model, config)
            dataset = open_dataset(str(data))
            reader = Reader(dataset, dataset.row_lengths())
            rules = replace(rules_of(config), loss=lambda tokens: CONTROL_NATS * tokens.student)
            for batches in step_batches(reader, config, self.world, first=0, stop=steps, topk=0):
                train_step(model, optimizer, batches, rules, self.world)
            write_weights(model, start, self.root / name, self.world)
            return self.figures(self.root / name, start, "a")

        inputs = {**self._of(start, "a"), "data": _manifest(data), "seed": seed, "steps": steps, "words": words[4:]}
        return self.cells.get(name, inputs, make)

    def before(self, name: str, start: Path) -> dict[str, Any]:
        """The figures of a student that is not distilled yet, against teacher A."""
        return self.cells.get(f"{name}/figures", self._of(start, "a"), lambda: self.figures(start, start, "a"))

    def precompute(self, cache: Path) -> dict[str, float]:
        """What it took to make a dataset: `seconds` in all, `working_s` without the engine's start, and `tokens`."""
        status = self._made[cache]["status"]
        working = status["tokens"] / status["tokens_per_s"]
        return {"seconds": status["seconds"], "working_s": working, "tokens": status["tokens"]}

    def figures(self, student: Path, start: Path, teacher: str) -> dict[str, float]:
        """Accuracy, distances and length, as `measure` gives them."""
        return asdict(measure(opened(student), opened(self.teacher(teacher)), opened(start), self.held_out, seed=0))

    def _of(self, start: Path, teacher: str) -> dict[str, Any]:
        """What everything that begins with this student depends on."""
        return {"start": _weights(start), "teacher": _weights(self.teacher(teacher)), "held_out": self.extent.held_out}

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


def _manifest(data: Path) -> str:
    return hashlib.sha256((data / "MANIFEST.json").read_bytes()).hexdigest()[:16]


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def _quiet(line: str) -> None:
    """The cells say what is done; a run's own lines stand in its folder."""
