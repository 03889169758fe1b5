"""`lopd attest`: claims about models that were fine-tuned elsewhere."""

import json
from pathlib import Path

import pytest

from common import cli
from common.fingerprint import fingerprint
from common.lineage import Provenance, identify, read_provenance, require_teacher, write_provenance
from common.models import publish, resolve
from common.storage import Store
from tests.common.tiny_models import make_model, make_tensors, make_weights, repack
from tests.conftest import S3Server


def attest(model: str, teacher: Path | str, *more: str) -> int | str | None:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as raised:
        cli.run(cli.group, ["attest", model, "--teacher", str(teacher), *more])
    return raised.value.code


def test_a_claim_about_sharded_models_holds_for_their_other_packings(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    sharded_student = repack(student, tmp_path / "s", 3, make_tensors(seed=1))
    sharded_teacher = repack(teacher, tmp_path / "t", 2, make_tensors(seed=2))
    assert attest(str(sharded_student), sharded_teacher) == 0

    merged = repack(sharded_student, tmp_path / "merged", 1, make_tensors(seed=1))
    provenance = read_provenance(merged)
    assert provenance is not None and provenance.tensors_sha256 == fingerprint(student).tensors_sha256
    assert require_teacher(provenance, identify(teacher, "t"), student="s", allow_mismatch=False) == ()


def test_the_same_claim_changes_nothing(student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attest(str(student), teacher) == 0
    before = (student / "provenance.json").stat()
    assert attest(str(student), teacher) == 0

    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{student}/provenance.json: fine-tuned on {teacher} (attested)"
    assert second == f"{student}/provenance.json: fine-tuned on {teacher} (attested before)"
    assert (student / "provenance.json").stat() == before


def test_the_same_teacher_by_another_name_is_recorded_by_it(student: Path, teacher: Path, tmp_path: Path) -> None:
    """So that a claim made of a folder can be mended to a place that others can reach."""
    assert attest(str(student), teacher) == 0
    moved = repack(teacher, tmp_path / "moved", 2, make_tensors(seed=2))
    assert attest(str(student), moved) == 0

    provenance = read_provenance(student)
    assert provenance is not None and provenance.teacher == identify(moved, str(moved))


def test_programs_get_one_object(student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for new in (True, False):
        assert attest(str(student), teacher, "--json") == 0
        assert json.loads(capsys.readouterr().out) == {
            "model": str(student),
            "provenance": f"{student}/provenance.json",
            "role": "attested",
            "teacher": str(teacher),
            "new": new,
        }


def test_another_claim_is_refused_with_both_in_two_columns(
    student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attest(str(student), teacher) == 0
    other = make_model(tmp_path / "other", seed=3)
    assert attest(str(student), other, "--json") == 64

    said = capsys.readouterr()
    first, header, *rows = said.err.splitlines()
    assert f"another claim is recorded: fine-tuned on {teacher} ({student})" in first
    assert "remove provenance.json there and attest again" in first
    assert header.split() == ["recorded", "this", "claim"]
    assert [row.split()[1] for row in rows if "≠" in row] == ["tensors_sha256"]


def test_a_wrong_claim_is_mended_as_the_refusal_says(student: Path, teacher: Path, tmp_path: Path) -> None:
    assert attest(str(student), make_model(tmp_path / "other", seed=3)) == 0
    (student / "provenance.json").unlink()
    assert attest(str(student), teacher) == 0


def test_a_model_changed_after_its_claim_is_refused_and_mended_as_the_refusal_says(
    student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attest(str(student), teacher) == 0
    make_weights(student, seed=9)
    assert attest(str(student), teacher) == 65
    assert "remove provenance.json there and record a claim with `lopd attest`" in capsys.readouterr().err

    (student / "provenance.json").unlink()
    assert attest(str(student), teacher) == 0


def test_what_a_training_recorded_needs_no_claim(
    student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_provenance(student, Provenance(role="sft", teacher=identify(teacher, "teacher")))
    assert attest(str(student), teacher) == 64
    assert "already recorded by its training" in (said := capsys.readouterr().err) and "needs no claim" in said


def test_a_claim_about_a_model_at_a_url_is_made_once(s3: str, student: Path, teacher: Path) -> None:
    publish(student, f"{s3}/student")
    publish(teacher, f"{s3}/teacher")
    assert attest(f"{s3}/student/", f"{s3}/teacher") == 0
    (before,) = [entry for entry in Store(f"{s3}/student").list() if entry.name == "provenance.json"]
    assert attest(f"{s3}/student", f"{s3}/teacher") == 0

    provenance = read_provenance(resolve(f"{s3}/student"))
    assert provenance is not None and provenance.teacher == identify(teacher, f"{s3}/teacher")
    assert before in Store(f"{s3}/student").list()


def test_a_claim_that_the_store_refuses_is_made_nowhere(
    s3: str,
    s3_server: S3Server,
    student: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not in the local copy of the model either, which would then say more than the model does."""
    publish(student, s3)
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    assert attest(s3, teacher) == 74

    assert "no permission to write" in capsys.readouterr().err
    assert read_provenance(resolve(s3)) is None
