"""A dataset made from the model of one round trains the next, and the lineage tells every round."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from common.lineage import Provenance, identify, read_provenance
from tests.trainer import build
from tests.trainer.runs import config, quiet
from trainer.loop import train
from trainer.world import World


def distilled(example: Any, world: World, student: Path, folder: Path, teacher: Path, **settings: Any) -> list[str]:
    """Train `student` on fresh rollouts of its own that `teacher` scored, into `folder/run`; what the run said."""
    rows = build.graded(build.open_model(teacher), build.sample(build.open_model(student), prompts=6, seed=3))
    data = build.make_dataset(folder / "data", rows, kind="scored", policy=student, teacher=teacher)
    said: list[str] = []
    train(config(example, folder / "run", model=str(student), data=data, max_steps=2, **settings), world, said.append)
    return said


def lineage_of(folder: Path) -> Provenance:
    found = read_provenance(folder)
    assert found is not None
    return found


def test_two_rounds_from_the_same_teacher(example, alone, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert distilled(example, alone, example.student, first, example.teacher)[0].startswith("round 1: ")
    assert distilled(example, alone, first / "run" / "export", second, example.teacher)[0].startswith("round 2: ")
    one, two = lineage_of(first / "run" / "export"), lineage_of(second / "run" / "export")
    assert (one.round, two.round) == (1, 2)
    assert two.parent == one and one.parent == read_provenance(example.student)
    assert two.teacher == identify(example.teacher, str(example.teacher))  # of the SFT, handed down
    assert one.scored_data is not None and two.scored_data is not None
    assert one.scored_data.manifest_sha256 != two.scored_data.manifest_sha256
    card = (second / "run" / "export" / "README.md").read_text()
    assert "round 2)" in card
    assert card.index(one.scored_data.manifest_sha256) < card.index(two.scored_data.manifest_sha256)


def test_another_teacher_in_the_second_round_is_refused_and_said_for_ever_where_allowed(example, alone, tmp_path):
    other = build.make_model(tmp_path / "other", seed=9)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    distilled(example, alone, example.student, first, example.teacher)
    student = first / "run" / "export"
    with pytest.raises(DataError, match="teacher consistency"):
        distilled(example, alone, student, second, other)
    allowed = distilled(example, alone, student, third, other, allow_teacher_mismatch=True)
    assert any("WARNING: override 'teacher-mismatch'" in line for line in allowed)
    found = lineage_of(third / "run" / "export")
    assert (found.round, found.overrides) == (2, ("teacher-mismatch",))
    assert "Overridden checks: `teacher-mismatch`" in (third / "run" / "export" / "README.md").read_text()


def test_the_rollouts_of_the_first_round_do_not_train_the_second(example, alone, tmp_path):
    distilled(example, alone, example.student, tmp_path, example.teacher)
    settings = config(example, tmp_path / "next", model=str(tmp_path / "run" / "export"))
    with pytest.raises(DataError, match="sampled by another model"):
        train(settings, alone, quiet)


def test_an_sft_begins_the_count_anew():
    sft = Provenance(role="sft")
    second = Provenance(role="opd", parent=Provenance(role="opd", parent=sft))
    assert (sft.round, second.round) == (0, 2)
    assert Provenance(role="sft", parent=second).round == 0
    assert Provenance(role="opd", parent=Provenance(role="attested")).round == 1
