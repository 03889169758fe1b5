"""The ways to distil, each to a cell: offline and live, the control, and the student before any of it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.study.arms import IMPORTANCE
from benchmarks.study.lab import RECIPE, Lab, opened, quiet
from benchmarks.study.live import Live, live, write_weights
from benchmarks.study.setting.measure import measure
from common.config import load_section
from common.dataset import open_dataset
from common.storage import Store
from trainer.config import OpdConfig
from trainer.loop import optimizer_of, train
from trainer.model import load_sharded
from trainer.reader import Reader, step_batches
from trainer.run import rules_of
from trainer.step import train_step
from trainer.watch.sinks import stored_records

WATCHED = ("kl/teacher_k1", "kl/rollout_k3", "ratio/ess", "ratio/clipped", "entropy")
"""Metrics of the trainer that are kept of every step."""
CONTROL_NATS = 0.5
"""Advantage of every token in the control: of the order of a mean |advantage| after SFT, and negative."""

Figures = dict[str, Any]


def before(lab: Lab, seed: int) -> Figures:
    """The figures of a student that is not distilled yet, against teacher A."""
    start = lab.student(seed)
    return lab.cells.get(f"seed-{seed}/sft", _of(lab, start, "a"), lambda: _figures(lab, start, start, "a"))


def more_sft(lab: Lab, name: str, answers: Path, stops: Sequence[int], seed: int) -> list[Figures]:
    """What further SFT comes to after each of `stops` steps, at the learning rate of distillation."""
    start = lab.student(seed)
    inputs = {**_of(lab, start, "a"), "data": _sha256(answers / "MANIFEST.json"), "lr": lab.extent.lr}

    def to(stop: int) -> Figures:
        student = lab.fine_tuned(f"{name}-{stop}", start, answers, stop, seed, lr=lab.extent.lr)
        return {"step": stop, **_figures(lab, student, start, "a")}

    return [lab.cells.get(f"{name}/{stop}", {**inputs, "stop": stop}, lambda stop=stop: to(stop)) for stop in stops]


def offline(
    lab: Lab,
    name: str,
    start: Path,
    data: Path,
    teacher: str,
    stops: Sequence[int],
    seed: int,
    settings: Mapping[str, Any],
    since: Path | None = None,
) -> list[Figures]:
    """What offline distillation comes to after each of `stops` steps: the figures, and the trainer's metrics.

    Args:
        since: the SFT model, of a later round; `start` unless given.
    """
    words = _words(lab, seed, settings)
    output = lab.root / name

    def to(stop: int) -> Figures:
        places = [f"model={start}", f"data={data}", f"output={output}", f"max_steps={stop}"]
        allowed = [f"allow_teacher_mismatch={str(teacher != 'a').lower()}"]
        train(load_section(OpdConfig, RECIPE, "opd", [*places, *allowed, *words]), lab.world, quiet)
        records = stored_records(Store(str(output)))
        return {
            "step": stop,
            **_figures(lab, output / "export", since or start, teacher),
            "step_seconds": sorted(record["time/step"] for record in records)[len(records) // 2],
            "trained": sum(record["data/tokens"] for record in records),
            "metrics": {key: [record.get(key) for record in records] for key in WATCHED},
        }

    inputs = {**_of(lab, start, teacher), "data": _sha256(data / "MANIFEST.json"), "settings": words}
    return [lab.cells.get(f"{name}/{stop}", {**inputs, "stop": stop}, lambda stop=stop: to(stop)) for stop in stops]


def alive(
    lab: Lab, name: str, start: Path, teacher: str, stops: Sequence[int], seed: int, settings: Mapping[str, Any]
) -> list[Figures]:
    """What live distillation comes to after each of `stops` steps, with the seconds of its parts until then."""
    words = _words(lab, seed, settings)

    def make() -> Figures:
        found = []

        def reached(run: Live) -> None:
            folder = lab.root / name / f"step-{run.step}"
            write_weights(run.model, start, folder, lab.world)
            figures = _figures(lab, folder, start, teacher)
            found.append({"step": run.step, **figures, "parts": asdict(run.seconds)})

        config = load_section(OpdConfig, RECIPE, "opd", ["model=-", "data=-", "output=-", *words])
        scratch = lab.root / name / "now"
        questions = lab.live_questions(seed, config.rows_per_step)
        live(lab.world, start, lab.teacher(teacher), config, questions, stops, reached, scratch)
        return {"stops": found}

    return lab.cells.get(name, {**_of(lab, start, teacher), "settings": words, "stops": stops}, make)["stops"]


def control(lab: Lab, name: str, start: Path, data: Path, steps: int, seed: int) -> Figures:
    """The same rows, steps and optimizer, but every token gets one negative advantage, and the teacher no say.

    What this gains comes of being trained on one's own answers at all.
    """
    words = _words(lab, seed, IMPORTANCE)
    config = load_section(OpdConfig, RECIPE, "opd", [f"model={start}", f"data={data}", "output=-", *words])

    def make() -> Figures:
        model = load_sharded(
            start, lab.world, compute=config.compute, attention=config.attention, checkpoint_activations=False
        )
        optimizer = optimizer_of(model, config)
        dataset = open_dataset(str(data))
        reader = Reader(dataset, dataset.row_lengths())
        rules = replace(rules_of(config), loss=lambda tokens: CONTROL_NATS * tokens.student)
        for batches in step_batches(reader, config, lab.world, first=0, stop=steps, topk=0):
            train_step(model, optimizer, batches, rules, lab.world)
        write_weights(model, start, lab.root / name, lab.world)
        return _figures(lab, lab.root / name, start, "a")

    inputs = {**_of(lab, start, "a"), "data": _sha256(data / "MANIFEST.json"), "steps": steps, "settings": words}
    return lab.cells.get(name, inputs, make)


def _words(lab: Lab, seed: int, settings: Mapping[str, Any]) -> list[str]:
    """Settings of [opd] that an arm adds to the recipe's."""
    return [f"{key}={value}" for key, value in {"seed": seed, "lr": lab.extent.lr, **settings}.items()]


def _figures(lab: Lab, student: Path, start: Path, teacher: str) -> dict[str, float]:
    """Accuracy, distances and length, as `measure` gives them."""
    return asdict(measure(opened(student), opened(lab.teacher(teacher)), opened(start), lab.held_out, seed=0))


def _of(lab: Lab, start: Path, teacher: str) -> dict[str, Any]:
    """What everything that begins with this student depends on."""
    models = {"start": start, "teacher": lab.teacher(teacher)}
    return {name: _sha256(folder / "model.safetensors") for name, folder in models.items()}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
