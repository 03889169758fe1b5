"""Live on-policy distillation, the baseline: sample with the student of now, score with the teacher, train, repeat.

It is Lightning's loss, optimizer, batch and trainer step; only where the rows come from differs. That makes it the one
piece of the study that is no part of the product, and the reason why it is here and not in `trainer/`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from benchmarks.study.setting.networks import encode
from benchmarks.study.setting.task import Question
from common.errors import LopdError
from common.schema import Rollout
from precompute.generate import seed_of
from trainer import epoch
from trainer.batch import Batch, pack
from trainer.config import OpdConfig
from trainer.export import gather
from trainer.loop import optimizer_of
from trainer.metrics import distillation
from trainer.model import load_sharded
from trainer.run import rules_of
from trainer.step import train_step
from trainer.world import World

REPOSITORY = Path(__file__).parents[2]
SAME_POLICY = 1e-6
"""k3 in nats between engine and trainer on fresh rollouts: rounding gives 1e-9, the weights of a step ago over 1e-5."""


class EngineEnded(LopdError):
    """It has said why in its log."""


class EngineProcess:
    """An engine of `live_engine.py`, which lives while it is entered; what it prints goes to `log`."""

    def __init__(self, folder: Path, role: str, log: Path, topk: int = 0) -> None:
        self._command = [sys.executable, "-m", "benchmarks.study.live_engine", str(folder), role, str(topk)]
        self._log = log

    def __enter__(self) -> "EngineProcess":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as stderr:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=REPOSITORY
            )
        self._stdin, self._stdout = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._stdin.close()
        self._process.wait()

    def ask(self, what: str, given: Any) -> Any:
        """The rows it gives; None for `load`. Raises EngineEnded."""
        self._stdin.write(json.dumps({what: given}) + "\n")
        self._stdin.flush()
        return self._answer().get("rows")

    def _answer(self) -> Any:
        line = self._stdout.readline()
        if not line:
            raise EngineEnded("an engine of live distillation ended", where=str(self._log), fix="Run again to resume")
        return json.loads(line)


@dataclass
class Seconds:
    """Wall time of each part, in seconds; one part at a time has the machine."""

    weights: float = 0.0
    rollouts: float = 0.0
    scoring: float = 0.0
    training: float = 0.0
    tokens: int = 0
    """Trained on meanwhile."""


@dataclass
class Live:
    """A run of live distillation that can be taken further."""

    model: PreTrainedModel
    step: int = 0
    seconds: Seconds = field(default_factory=Seconds)


def live(
    world: World,
    start: Path,
    teacher: Path,
    config: OpdConfig,
    questions: Callable[[int], Sequence[Question]],
    stops: Sequence[int],
    reached: Callable[[Live], None],
    scratch: Path,
) -> None:
    """Distil `teacher` into the model in `start`.

    Args:
        config: its learning rate, objective, batch and seed count; its data and output do not.
        questions: those of a step, counted from 0.
        stops: after how many steps `reached` is called; the run ends with the last.
    """
    model = load_sharded(start, world, compute=config.compute, attention=config.attention, checkpoint_activations=False)
    optimizer = optimizer_of(model, config)
    run = Live(model)
    with ExitStack() as stack:
        student = stack.enter_context(EngineProcess(start, "sample", scratch / "student.log"))
        grader = stack.enter_context(EngineProcess(teacher, "score", scratch / "teacher.log", config.topk))
        for step in range(stops[-1]):
            rows = _rows(run, student, grader, questions(step), config, start, scratch, world)
            clock = time.monotonic()
            sums, _ = train_step(model, optimizer, _batches(rows, config), rules_of(config), world)
            run.seconds.training += time.monotonic() - clock
            _require_same_policy(distillation(sums)["kl/rollout_k3"], step)
            run.step = step + 1
            if run.step in stops:
                reached(run)


def _rows(
    run: Live,
    student: EngineProcess,
    grader: EngineProcess,
    questions: Sequence[Question],
    config: OpdConfig,
    start: Path,
    scratch: Path,
    world: World,
) -> list[Rollout]:
    """Fresh rollouts with the teacher's grades; adds to the run's seconds."""
    clock = [time.monotonic()]
    if run.step:
        write_weights(run.model, start, scratch, world)
        student.ask("load", str(scratch))
    clock.append(time.monotonic())
    prompts = [encode(question.prompt) for question in questions]
    seeds = [seed_of(config.seed, f"{run.step} {question.prompt}", 0) for question in questions]
    sampled = student.ask("sample", list(zip(prompts, seeds, strict=True)))
    clock.append(time.monotonic())
    graded = grader.ask("score", [(prompt, row["ids"]) for prompt, row in zip(prompts, sampled, strict=True)])
    clock.append(time.monotonic())
    weights, rollouts, scoring = np.diff(clock).tolist()
    run.seconds.weights += weights
    run.seconds.rollouts += rollouts
    run.seconds.scoring += scoring
    run.seconds.tokens += sum(len(row["ids"]) for row in sampled)
    return [
        Rollout(
            uid=str(number),
            prompt_id=str(number),
            sample_idx=0,
            prompt_ids=np.array(prompt, np.int32),
            completion_ids=np.array(row["ids"], np.int32),
            rollout_logprobs=np.array(row["logps"], np.float32),
            teacher_logprobs=np.array(grades["logprobs"], np.float32),
            topk_ids=np.array(grades["topk_ids"], np.int32) if "topk_ids" in grades else None,
            topk_logprobs=np.array(grades["topk_logprobs"], np.float32) if "topk_ids" in grades else None,
        )
        for number, (prompt, row, grades) in enumerate(zip(prompts, sampled, graded, strict=True))
    ]


def write_weights(model: PreTrainedModel, start: Path, folder: Path, world: World) -> None:
    """The student of now, in full precision, as the engine reads it; its config is that of `start`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes((start / "config.json").read_bytes())
    save_file(gather(model, torch.float32, world), folder / "model.safetensors", metadata={"format": "pt"})


def _batches(rows: Sequence[Rollout], config: OpdConfig) -> list[Batch]:
    lengths = np.array([len(row.prompt_ids) + len(row.completion_ids) for row in rows])
    bins = epoch.pack(np.arange(len(rows)), lengths, config.token_budget, ranks=1)
    return [pack([rows[index] for index in bin], topk=config.topk) for bin in bins]


def _require_same_policy(k3: float, step: int) -> None:
    if k3 > SAME_POLICY:
        raise AssertionError(f"step {step + 1}: the rollouts are not the student's own (k3 {k3:.1e} nats)")
