import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from common.fingerprint import fingerprint
from common.lineage import (
    TEACHER_MISMATCH,
    DatasetRef,
    Provenance,
    compare_tokenizers,
    identify,
    read_provenance,
    require_policy,
    require_teacher,
    safetensors_metadata,
    same_model,
    write_provenance,
)
from tests.common.tiny_models import OTHER_MERGES, TEMPLATE, make_model, make_tensors, make_weights, repack


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_model(tmp_path / "teacher", seed=1)


@pytest.fixture
def student(tmp_path: Path, teacher: Path) -> Path:
    folder = make_model(tmp_path / "student", seed=2)
    write_provenance(folder, Provenance(role="sft", teacher=identify(teacher, "org/teacher")))
    return folder


def test_an_identity_is_the_content_wherever_it_lies(teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(teacher, tmp_path / "copy")
    one, other = identify(teacher, "org/teacher"), identify(copy, "another name")

    assert one == identify(teacher, "org/teacher")
    assert same_model(one, other)
    assert one.name == "org/teacher"


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"seed": 5}, {"weights_sha256", "tensors_sha256"}),
        ({"merges": OTHER_MERGES}, {"tokenizer_sha256"}),
        ({"words": ("th", "he", "ov", "zz"), "vocab_size": 265}, {"tokenizer_sha256"}),
        ({"template": TEMPLATE + " "}, {"chat_template_sha256"}),
        ({"template": None}, {"chat_template_sha256"}),
        ({"rope_theta": 5e5}, {"config_sha256"}),
        ({"architectures": ["LlamaForCausalLM"]}, {"config_sha256"}),
    ],
)
def test_an_identity_changes_in_the_part_that_changed(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], keys: set[str]
) -> None:
    before = identify(teacher, "x").model_dump()
    after = identify(make_model(tmp_path / "other", **{"seed": 1, **changes}), "x").model_dump()

    assert {name for name in before if before[name] != after[name]} == keys


def test_who_saved_a_config_does_not_count(teacher: Path, tmp_path: Path) -> None:
    saved = {"_name_or_path": "x", "transformers_version": "9", "torch_dtype": "float32", "text_config": {}}
    again = make_model(tmp_path / "a", seed=1, **saved)
    later = make_model(tmp_path / "b", seed=1, text_config={"dtype": "bfloat16"})
    assert same_model(identify(again, "x"), identify(later, "x"))
    assert not same_model(identify(again, "x"), identify(teacher, "x"))  # it has no text_config


def test_another_config_is_another_teacher_and_is_shown(student: Path, tmp_path: Path) -> None:
    other = identify(make_model(tmp_path / "other", seed=1, sliding_window=32), "org/teacher")
    with pytest.raises(DataError, match="≠ config_sha256"):
        require_teacher(read_provenance(student), other, student="x", allow_mismatch=False)


def test_a_hub_snapshot_knows_its_revision(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "models--org--name" / "snapshots" / ("0123456789" * 4))
    assert identify(folder, "org/name").revision == "0123456789" * 4
    assert identify(make_model(tmp_path / "plain"), "plain").revision is None


def test_a_model_without_safetensors_is_refused(teacher: Path) -> None:
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    with pytest.raises(DataError, match="no safetensors weights.*pickled weights are not opened"):
        identify(teacher, "x")


def test_provenance_is_read_as_it_was_written(student: Path, teacher: Path) -> None:
    parent = read_provenance(student)
    written = write_provenance(
        student,
        Provenance(
            role="opd",
            base_model=identify(teacher, "base"),
            teacher=identify(teacher, "org/teacher"),
            sft_data=DatasetRef(manifest_sha256="f" * 64, url="s3://bucket/sft"),
            scored_data=DatasetRef(manifest_sha256="e" * 64, url="s3://bucket/scored"),
            parent=parent,
            overrides=(TEACHER_MISMATCH,),
            created_by="test",
        ),
    )

    assert read_provenance(student) == written
    assert (written.weights_sha256, written.tensors_sha256) == fingerprint(student)
    assert written.parent == parent is not None


def test_a_model_without_provenance_has_none(teacher: Path) -> None:
    assert read_provenance(teacher) is None


def test_weights_changed_after_their_provenance_are_refused(student: Path) -> None:
    make_weights(student, seed=9)
    with pytest.raises(DataError, match="changed after their provenance was written .*student.*lopd attest"):
        read_provenance(student)


@pytest.mark.parametrize("files", [1, 3])
def test_a_repacked_student_keeps_its_provenance(student: Path, tmp_path: Path, files: int) -> None:
    """As does one whose provenance knows only its files, as long as these stay."""
    packed = repack(student, tmp_path / "packed", files, make_tensors(seed=2))
    assert read_provenance(packed) == read_provenance(student)

    written = json.loads((student / "provenance.json").read_text())
    for folder in (student, packed):
        (folder / "provenance.json").write_text(json.dumps(written | {"tensors_sha256": None}))
    assert read_provenance(student) is not None
    with pytest.raises(DataError, match="changed after their provenance"):
        read_provenance(packed)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"role": 1, "unknown": 2}', "\x00", '{"role": "sft", "schema_id": "lopd.provenance/1"}',
        '{"role": "sft", "teacher": {"name": "of an older version", "weights_sha256": "a"}}',
    ],
)  # fmt: skip
def test_malformed_provenance_is_one_line(student: Path, text: str) -> None:
    (student / "provenance.json").write_text(text)
    with pytest.raises(DataError, match="malformed provenance.*provenance.json.*remove provenance.json") as raised:
        read_provenance(student)
    assert "\n" not in str(raised.value)


def test_the_metadata_of_a_weights_file_holds_all_but_its_own_hashes(student: Path) -> None:
    provenance = read_provenance(student)
    assert provenance is not None
    metadata = safetensors_metadata(provenance)

    restored = Provenance.model_validate_json(metadata["lopd_provenance"])
    assert restored == provenance.model_copy(update={"weights_sha256": None, "tensors_sha256": None})
    assert all(isinstance(value, str) for value in metadata.values())


def test_the_sft_teacher_is_accepted_under_any_name(student: Path, teacher: Path) -> None:
    for allow in (False, True):
        accepted = require_teacher(
            read_provenance(student), identify(teacher, "s3://b/teacher"), student="x", allow_mismatch=allow
        )
        assert accepted == ()


@pytest.mark.parametrize("files", [1, 2, 4])
def test_the_sft_teacher_is_accepted_in_any_packing(student: Path, teacher: Path, tmp_path: Path, files: int) -> None:
    packed = identify(repack(teacher, tmp_path / "packed", files, make_tensors(seed=1)), "packed")
    assert packed.weights_sha256 != identify(teacher, "org/teacher").weights_sha256
    assert require_teacher(read_provenance(student), packed, student="x", allow_mismatch=False) == ()
    require_policy(packed, identify(teacher, "x"), dataset="s3://b/x")


def test_another_teacher_is_refused_with_both_in_two_columns(student: Path, tmp_path: Path) -> None:
    other = identify(make_model(tmp_path / "other", seed=3), "org/other")
    with pytest.raises(DataError, match="teacher consistency") as raised:
        require_teacher(read_provenance(student), other, student="my-student", allow_mismatch=False)

    first, header, *rows = str(raised.value).splitlines()
    assert "my-student" in first and "--allow-teacher-mismatch" in first and "allow_teacher_mismatch=true" in first
    assert header.split() == ["SFT", "teacher", "this", "teacher"]
    assert [row.split()[1] for row in rows if "≠" in row] == ["tensors_sha256"]
    assert any("org/teacher" in row and "org/other" in row for row in rows)
    assert raised.value.exit_code == 65


def test_only_what_makes_it_another_teacher_is_marked(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Not its name, its revision or its packing, though both columns show them."""
    snapshot = tmp_path / "models--org--teacher" / "snapshots" / ("1" * 40)
    snapshot.parent.mkdir(parents=True)
    repack(make_model(tmp_path / "other", seed=1, rope_theta=5e5), snapshot, 2, make_tensors(seed=1))
    with pytest.raises(DataError, match="teacher consistency") as raised:
        require_teacher(read_provenance(student), identify(snapshot, "org/x"), student="x", allow_mismatch=False)

    shown = {row[4:].split()[0]: row for row in str(raised.value).splitlines()[2:]}
    differing = {key for key, row in shown.items() if len(set(row[4:].split()[1:])) > 1}
    assert differing == {"name", "revision", "weights_sha256", "config_sha256"}
    assert [key for key, row in shown.items() if "≠" in row] == ["config_sha256"]


def test_a_mismatch_may_be_allowed_and_is_then_stamped(student: Path, tmp_path: Path) -> None:
    other = identify(make_model(tmp_path / "other", seed=3), "org/other")
    for provenance in (read_provenance(student), None, Provenance(role="sft")):
        stamped = require_teacher(provenance, other, student="x", allow_mismatch=True)
        assert stamped == (TEACHER_MISMATCH,)


@pytest.mark.parametrize("provenance", [None, Provenance(role="sft")])
def test_a_student_without_lineage_is_refused_with_the_ways_out(teacher: Path, provenance: Provenance | None) -> None:
    with pytest.raises(DataError, match="does not say which teacher.*lopd attest.*--allow-teacher-mismatch"):
        require_teacher(provenance, identify(teacher, "t"), student="x", allow_mismatch=False)


def test_rollouts_of_another_model_are_refused(student: Path, teacher: Path) -> None:
    ours = identify(student, "student")
    require_policy(ours, identify(student, "another name"), dataset="s3://b/x")
    with pytest.raises(DataError, match="sampled by another model .*s3://b/x") as raised:
        require_policy(identify(teacher, "teacher"), ours, dataset="s3://b/x")
    assert "≠ tensors_sha256" in str(raised.value)


def test_equal_tokenizers_may_score_each_other(student: Path, teacher: Path) -> None:
    compare_tokenizers(student, teacher)


def test_another_vocabulary_is_refused_with_an_example(student: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", words=("th", "he", "ov", "zz"))
    with pytest.raises(DataError, match=r"differ in 1 tokens: 'zz' is None here and \d+ there.*same family"):
        compare_tokenizers(student, other)


def test_equal_vocabularies_with_other_merges_are_refused(student: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", merges=OTHER_MERGES)
    with pytest.raises(DataError, match="encode 'The quick brown fox .*' differently"):
        compare_tokenizers(student, other)


def test_the_written_file_is_for_people_too(student: Path) -> None:
    text = (student / "provenance.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["teacher"]["name"] == "org/teacher"
