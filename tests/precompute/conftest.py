"""Tiny models that the tests of precompute share; they only read them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.precompute import tiny


@dataclass(frozen=True)
class Models:
    """A teacher, the student that was tuned on its answers, and a teacher of the same family that was not asked."""

    teacher: Path
    student: Path
    other_teacher: Path
    orphan: Path  # a student without lineage


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    teacher = tiny.make_teacher(root / "teacher")
    return Models(
        teacher=teacher,
        student=tiny.make_student(root / "student", teacher),
        other_teacher=tiny.make_student(root / "other-teacher", teacher, attested=False, seed=2),
        orphan=tiny.make_student(root / "orphan", teacher, attested=False, seed=3),
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tiny.write_prompts(tmp_path / "prompts.jsonl", 4)
