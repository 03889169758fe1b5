"""One teacher, one student and one scored dataset for all tests of the trainer; they only read them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.schema import Rollout
from tests.trainer import build
from trainer.world import World, joined


@dataclass(frozen=True)
class Example:
    """A teacher, a student that is nearly it, its rollouts, and the datasets of them."""

    teacher: Path
    student: Path
    rows: list[Rollout]  # graded
    scored: str
    sft: str


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("example")
    teacher = build.make_model(root / "teacher")
    student = build.make_student(root / "student", teacher)
    rows = build.graded(build.open_model(teacher), build.sample(build.open_model(student), prompts=12))
    answers = build.sample(build.open_model(teacher), prompts=12, seed=5)
    return Example(
        teacher=teacher,
        student=student,
        rows=rows,
        scored=build.make_dataset(root / "scored", rows, kind="scored", policy=student, teacher=teacher),
        sft=build.make_dataset(root / "sft", answers, kind="sft", policy=teacher),
    )


@pytest.fixture
def alone() -> Iterator[World]:
    """A process group of one."""
    with joined("cpu") as world:
        yield world
