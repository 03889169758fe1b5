"""The ways to distil, each to a cell: offline and live; SFT that goes on, controls, and the student before."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.study import live as live_distillation
from benchmarks.study import live_engine
from benchmarks.study.arms import IMPORTANCE, Arm
from benchmarks.study.cells import Inputs, digest
from benchmarks.study.lab import Lab, manifest, weights
from benchmarks.study.live import Live, live, write_weights
from common.dataset import open_dataset
from common.errors import DataError
from common.storage import Store
from trainer.config import OpdConfig
from trainer.loop import optimizer_of
from trainer.model import load_sharded
from trainer.objectives import Tokens, importance
from trainer.reader import Reader, step_batches
from trainer.run import rules_of
from trainer.step import train_step
from trainer.watch.sinks import stored_records

WATCHED = ("kl/teacher_k1", "kl/rollout_k3", "ratio/ess", "ratio/clipped", "entropy")
"""Metrics of the trainer that are kept of every step."""
LIKE_OPD = {"schedule": "constant", "warmup": 0.0, "betas": [0.9, 0.98], "weight_decay": 0.0}
"""SFT with the optimizer of distillation."""
PUSH_NATS = 0.1
"""Advantage of every token in one of the controls: about the mean |advantage| after SFT, and negative."""

Result = dict[str, Any]
"""Of an arm after some steps: `step`, the figures of `measure`, and what is told of how it came there."""


def before(lab: Lab, seed: int) -> Result:
    """The figures of a student that is not distilled yet, against teacher A."""
    start = lab.student(seed)
    return lab.cells.get(
        f"seed-{seed}/before", _of(lab, start, "a", seed), lambda: lab.figures(start, start, "a", seed)
    )


def more_sft(lab: Lab, name: str, answers: Path, stops: Sequence[int], seed: int) -> list[Result]:
    """What SFT comes to that goes on, on these answers, with learning rate and optimizer of distillation."""
    start = lab.student(seed)

    def to(stop: int) -> Result:
        student, identity = lab.fine_tuned(
            f"seed-{seed}/{name}", start, answers, stop, seed, lr=lab.extent.lr, **LIKE_OPD
        )

        def figures() -> Result:
            if weights(student) != identity:
                raise DataError(
                    f"this student has gone on beyond step {stop}", where=str(student), fix="Delete it and its cells"
                )
            return lab.figures(student, start, "a", seed)

        inputs = {**_of(lab, start, "a", seed), "student": identity}
        return {"step": stop, **lab.cells.get(f"seed-{seed}/{name}-{stop}-figures", inputs, figures)}

    return [to(stop) for stop in stops]


def offline(
    lab: Lab,
    name: str,
    start: Path,
    data: Path,
    teacher: str,
    arm: Arm,
    stops: Sequence[int],
    seed: int,
    since: Path | None = None,
    **more: Any,
) -> list[Result]:
    """What offline distillation comes to after each of `stops` steps, and the trainer's metrics until then.

    Args:
        since: the SFT model, of a later round; `start` unless given.
        more: settings beside those of the arm.
    """
    settings = {**arm.settings, "allow_teacher_mismatch": teacher != "a", **more}
    since = since or start
    inputs = {
        **_of(lab, start, teacher, seed),
        "since": weights(since),
        "data": manifest(data),
        "settings": lab.settings("opd", seed, settings),
    }
    output = lab.cells.place(f"{name}/{arm.slug}", inputs)

    def to(stop: int) -> Result:
        places = {"model": start, "data": data, "output": output, "max_steps": stop}
        lab.train("opd", seed, {**settings, **places})
        records = stored_records(Store(str(output)))
        return {
            "step": stop,
            **lab.figures(output / "export", since, teacher, seed),
            "export": str((output / "export").relative_to(lab.root)),
            "training_s": sum(record["time/step"] for record in records),
            "trained": sum(record["data/tokens"] for record in records),
            "metrics": {key: [record.get(key) for record in records] for key in WATCHED},
        }

    return [
        lab.cells.get(f"{name}/{arm.slug}-{stop}", {**inputs, "stop": stop}, lambda stop=stop: to(stop))
        for stop in stops
    ]


def alive(
    lab: Lab, name: str, start: Path, teacher: str, arm: Arm, stops: Sequence[int], seed: int, **more: Any
) -> list[Result]:
    """What live distillation comes to after each of `stops` steps, with the seconds of its parts until then."""
    settings = {**arm.settings, **more}
    questions = lab.live_questions(seed, lab.extent.rows_per_step)
    inputs = {
        **_of(lab, start, teacher, seed),
        "settings": lab.settings("opd", seed, settings),
        "stops": stops,
        "asked": [questions(step)[0].prompt for step in (0, stops[-1] - 1)],
        "by": text_of_live(),
    }
    place = lab.cells.place(f"{name}/live-{arm.slug}", inputs)

    def make() -> Result:
        found = []

        def reached(run: Live) -> None:
            folder = place / f"step-{run.step}"
            write_weights(run.model, start, folder, lab.world)
            figures = lab.figures(folder, start, teacher, seed)
            found.append({"step": run.step, **figures, "parts": asdict(run.seconds)})

        live(lab.world, start, lab.teacher(teacher), _config(lab, seed, settings), questions, stops, reached, place)
        return {"stops": found}

    return lab.cells.get(f"{name}/live-{arm.slug}", inputs, make)["stops"]


def text_of_live() -> str:
    """A hash of the code that live distillation is."""
    return digest(*(Path(str(module.__file__)) for module in (live_distillation, live_engine)))


def pushed_down(tokens: Tokens) -> Tensor:
    """A control: the loss `importance` with one negative advantage for all tokens instead of the teacher's."""
    return importance(tokens._replace(teacher=tokens.student.detach() - PUSH_NATS), 2.0)


def shuffled(tokens: Tokens) -> Tensor:
    """A control: the loss `importance` with the teacher's advantages dealt out anew among the tokens of a pack.

    What this gains is owed to no teacher: advantages of the same sizes, that say nothing of their tokens.
    """
    advantages = (tokens.teacher - tokens.student).detach()
    dealt = advantages[torch.randperm(len(advantages), generator=torch.Generator().manual_seed(len(advantages)))]
    return importance(tokens._replace(teacher=tokens.student.detach() + dealt), 2.0)


CONTROLS: Mapping[str, Callable[[Tokens], Tensor]] = {
    "control: one negative advantage for all tokens": pushed_down,
    "control: advantages shuffled among tokens": shuffled,
}
"""The loss is called for `logits_chunk` tokens at a time, so the second deals within these."""


def control(lab: Lab, name: str, start: Path, data: Path, steps: int, seed: int) -> Result:
    """The same rows, steps and optimizer as the arms, with a loss of CONTROLS."""
    loss = CONTROLS[name]
    inputs = {
        **_of(lab, start, "a", seed),
        "data": manifest(data),
        "steps": steps,
        "settings": lab.settings("opd", seed, IMPORTANCE.settings),
        "loss": inspect.getsource(loss),
        "push": PUSH_NATS,
    }
    place = f"seed-{seed}/a/{Arm(name).slug}"
    output = lab.cells.place(place, inputs)

    def make() -> Result:
        config = _config(lab, seed, {**IMPORTANCE.settings, "data": data})
        model = load_sharded(
            start, lab.world, compute=config.compute, attention=config.attention, checkpoint_activations=False
        )
        optimizer = optimizer_of(model, config)
        dataset = open_dataset(str(data))
        reader = Reader(dataset, dataset.row_lengths())
        rules = replace(rules_of(config), loss=loss)
        for batches in step_batches(reader, config, lab.world, first=0, stop=steps, topk=0):
            train_step(model, optimizer, batches, rules, lab.world)
        write_weights(model, start, output, lab.world)
        return lab.figures(output, start, "a", seed)

    return lab.cells.get(f"{place}-{steps}", inputs, make)


def _config(lab: Lab, seed: int, settings: Mapping[str, Any]) -> OpdConfig:
    return cast(OpdConfig, lab.config("opd", seed, {"model": "-", "data": "-", "output": "-", **settings}))


def _of(lab: Lab, start: Path, teacher: str, seed: int) -> Inputs:
    """What every figure of a student that begins with `start` depends on."""
    return {"start": weights(start), "teacher": weights(lab.teacher(teacher)), **lab.measured(seed)}
