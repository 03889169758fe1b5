"""What is refused before an engine starts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from common.chat import Template
from common.dataset import Dataset, open_dataset
from common.errors import DataError, UsageError
from common.lineage import Provenance, identify, write_provenance
from common.plans import content, dataset_id
from common.prompts import load_prompts
from common.records import check_plan
from common.schema import to_table
from precompute.config import Generate, Score
from precompute.plan import Job, choose_template, plan_generation, plan_scoring, resolve_teacher
from tests.precompute import tiny
from tests.precompute.conftest import Models
from tests.precompute.rows import make_rollout, make_writer


def _plan(model: Path, prompts: Path, *, kind: str = "rollouts", topk: int = 0, **sampling: Any) -> Job:
    words = {"model": str(model), "prompts": str(prompts), "cache": "unused", "topk": topk}
    config = Generate.model_validate({**words, "sampling": {"max_tokens": 16, **sampling}})
    return plan_generation(kind, config, load_prompts(config.prompts))


def _rollouts(
    folder: Path,
    models: Models,
    highest: int = tiny.VOCAB,
    vocab_size: int = tiny.VOCAB,
    rollout_topk: int = 0,
    highest_topk: int = tiny.VOCAB,
) -> Dataset:
    lineage = Provenance(role="attested", teacher=identify(models.teacher, str(models.teacher)))
    policy = identify(models.student, str(models.student)).model_dump()
    writer = make_writer(
        folder,
        "rollouts",
        policy=policy,
        lineage=lineage.model_dump(mode="json"),
        vocab_size=vocab_size,
        **({"rollout_topk": rollout_topk} if rollout_topk else {}),
    )
    row = make_rollout("p/0", highest=highest)
    ids = np.minimum(np.arange(rollout_topk * len(row.completion_ids)) * 9, min(highest_topk, vocab_size) - 1)
    own = ids.reshape(-1, rollout_topk) if rollout_topk else None
    writer.commit(0, to_table([replace(row, rollout_topk_ids=own)], 0, rollout_topk))
    writer.finalize()
    return open_dataset(str(folder))


def _score(rollouts: Dataset, **settings: Any) -> Job:
    return plan_scoring(Score.model_validate({"rollouts": rollouts.url, "cache": "unused", **settings}), rollouts)


def test_the_plan_pins_policy_lineage_prompts_and_stop_ids(models: Models, prompts: Path) -> None:
    job = _plan(models.student, prompts)
    assert job.plan["policy"] == identify(models.student, str(models.student)).model_dump()
    assert job.plan["lineage"]["teacher"]["weights_sha256"] == identify(models.teacher, "").weights_sha256
    assert job.plan["prompts"]["count"] == 4
    assert job.plan["sampling"]["stop_ids"] == [tiny.STOP_ID]
    assert job.max_model_len <= tiny.CONTEXT


def test_a_plan_does_not_depend_on_how_the_box_runs_it(models: Models, prompts: Path) -> None:
    base = {"model": str(models.student), "prompts": str(prompts), "cache": "a", "sampling": {"max_tokens": 16}}
    box = {"cache": "b", "engine": {"max_num_seqs": 3, "gpu_memory_utilization": 0.5, "cpu_kv_gib": 2.0}}
    plans = [
        plan_generation("rollouts", Generate.model_validate({**base, **more}), load_prompts(str(prompts))).plan
        for more in ({}, box)
    ]
    assert content(plans[0]) == content(plans[1])


def test_a_repacked_student_joins_the_plan_and_finds_its_teacher_repacked(
    models: Models, prompts: Path, tmp_path: Path
) -> None:
    student, teacher = (_repacked(model, tmp_path / model.name) for model in (models.student, models.teacher))
    plan, same = _plan(models.student, prompts).plan, _plan(student, prompts).plan
    assert plan["policy"]["weights_sha256"] != same["policy"]["weights_sha256"]
    assert dataset_id(plan) == dataset_id(same)

    rollouts = _rollouts(tmp_path / "rollouts", models)
    plan, same = (_score(rollouts, teacher=str(folder)).plan for folder in (models.teacher, teacher))
    assert dataset_id(plan) == dataset_id(same) and same["overrides"] == []


def test_a_plan_without_the_students_top_k_says_nothing_of_it(models: Models, prompts: Path, tmp_path: Path) -> None:
    """So that datasets begun before it was known are resumed."""
    plan = _plan(models.student, prompts).plan
    assert not {"rollout_topk", "topk_support"} & {*plan, *_score(_rollouts(tmp_path / "r", models)).plan}


def test_the_students_top_k_is_in_the_plan_until_it_is_graded(models: Models, prompts: Path, tmp_path: Path) -> None:
    assert _plan(models.student, prompts, topk=5).plan["rollout_topk"] == 5
    rollouts = _rollouts(tmp_path / "rollouts", models, rollout_topk=4)
    by_student = _score(rollouts, topk=3, topk_support="student").plan
    by_teacher = _score(rollouts, topk=3).plan
    assert (by_student["topk"], by_student["topk_support"]) == (3, "student")
    assert (by_teacher["topk"], "topk_support" in by_teacher) == (3, False)
    assert "rollout_topk" not in {*by_student, *by_teacher}
    for plan in (by_student, by_teacher):
        check_plan(plan, "plan")


@pytest.mark.parametrize(("stored", "asked"), [(0, 2), (2, 3), (2, 0)])
def test_the_students_support_needs_as_many_ids_as_are_stored(
    models: Models, tmp_path: Path, stored: int, asked: int
) -> None:
    rollouts = _rollouts(tmp_path / "rollouts", models, rollout_topk=stored)
    with pytest.raises(UsageError, match=f"asks for {asked} ids a position, the rollouts hold {stored}"):
        _score(rollouts, topk=asked, topk_support="student")


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}])
def test_a_truncated_distribution_has_no_top_k_to_store(
    models: Models, prompts: Path, sampling: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="cut off ids that the student's top-k should hold"):
        _plan(models.student, prompts, topk=4, **sampling)


def test_only_rollouts_have_a_students_top_k_and_none_wider_than_its_vocabulary(models: Models, prompts: Path) -> None:
    with pytest.raises(UsageError, match="the teacher's own answers have no student's top-k"):
        _plan(models.student, prompts, kind="sft", topk=4)
    with pytest.raises(UsageError, match=rf"topk {tiny.VOCAB + 1} exceeds the student's vocabulary of {tiny.VOCAB}"):
        _plan(models.student, prompts, topk=tiny.VOCAB + 1)


def test_ids_of_the_students_top_k_that_the_teacher_lacks_are_refused_where_it_should_grade_them(
    models: Models, tmp_path: Path
) -> None:
    rollouts = _rollouts(tmp_path / "rollouts", models, vocab_size=tiny.VOCAB + 8, rollout_topk=2, highest_topk=330)
    assert _score(rollouts, topk=2).plan["vocab_size"] == tiny.VOCAB
    with pytest.raises(DataError, match=r"the rollouts hold token id 32\d, the teacher .* has only 320 rows"):
        _score(rollouts, topk=2, topk_support="student")


def _repacked(model: Path, folder: Path) -> Path:
    """A copy with its weights in several files, as transformers splits them."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_a_prompt_longer_than_the_context_is_named(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text('{"id": "fine", "prompt": "hi"}\n{"id": "endless", "prompt": "' + "word " * 40 + '"}\n')
    with pytest.raises(DataError, match=r"context of 128 \(prompt endless\).*lower sampling.max_tokens"):
        _plan(models.student, file)


def test_the_longest_prompt_that_fits_is_taken(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "fits.jsonl"
    file.write_text('{"prompt": "hi"}\n')
    length = _plan(models.student, file).max_model_len - 16 - 1
    assert _plan(models.student, file, max_tokens=tiny.CONTEXT - length - 1).max_model_len == tiny.CONTEXT
    with pytest.raises(DataError):
        _plan(models.student, file, max_tokens=tiny.CONTEXT - length)


def test_a_stop_id_outside_the_vocabulary_is_refused(models: Models, prompts: Path) -> None:
    with pytest.raises(UsageError, match="stop id 5000"):
        _plan(models.student, prompts, stop_ids=[3, 5000])


def test_a_model_without_end_of_sequence_needs_stop_ids(models: Models, prompts: Path, tmp_path: Path) -> None:
    model = tiny.make_teacher(tmp_path / "endless", stop=False)
    with pytest.raises(UsageError, match="stop_ids"):
        _plan(model, prompts)
    assert _plan(model, prompts, stop_ids=[3]).plan["sampling"]["stop_ids"] == [3]


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path, prompts: Path) -> None:
    model = tiny.make_teacher(tmp_path / "narrow", vocab_size=100, stop=False)
    with pytest.raises(DataError, match=r"token id \d+, the model has only 100 rows"):
        _plan(model, prompts, stop_ids=[3])


def test_the_teacher_of_the_lineage_is_taken_unless_one_is_given(models: Models, tmp_path: Path) -> None:
    rollouts = _rollouts(tmp_path / "rollouts", models)
    job = _score(rollouts)
    assert job.folder == models.teacher
    assert job.plan["teacher"]["name"] == str(models.teacher)
    assert job.plan["parent"] == rollouts.manifest_sha256
    assert job.plan["overrides"] == []


def test_a_student_without_lineage_needs_a_teacher() -> None:
    with pytest.raises(UsageError, match="lopd attest"):
        resolve_teacher(None, None, "student")


def test_the_teacher_of_the_lineage_is_taken_at_its_revision(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two snapshots lie in the Hub's cache, and `main` has moved on since the student was tuned."""
    then, now = "1" * 40, "2" * 40
    repo = tmp_path / "models--org--teacher"
    tiny.make_teacher(repo / "snapshots" / then)
    tiny.make_teacher(repo / "snapshots" / now, seed=9)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(now)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("org/teacher", "org/teacher@main"):
        teacher = identify(repo / "snapshots" / then, name)
        folder, _ = resolve_teacher(None, Provenance(role="sft", teacher=teacher), "student")
        assert folder.name == then


def test_a_teacher_of_another_machine_is_asked_for(models: Models) -> None:
    teacher = identify(models.teacher, "/home/else/teacher")
    with pytest.raises(
        UsageError, match=r"SFT teacher is not to be had here.*\(/home/else/teacher\).*--teacher"
    ) as said:
        resolve_teacher(None, Provenance(role="sft", teacher=teacher), "student")
    assert teacher.tensors_sha256[:16] in str(said.value) and "TEACHER=" in str(said.value)


def test_another_teacher_is_refused_with_both_in_two_columns(models: Models, tmp_path: Path) -> None:
    rollouts = _rollouts(tmp_path / "rollouts", models)
    with pytest.raises(DataError) as refusal:
        _score(rollouts, teacher=str(models.other_teacher))
    assert "SFT teacher" in refusal.value.detail
    assert "≠ tensors_sha256" in refusal.value.detail


def test_an_allowed_mismatch_is_stamped_into_the_plan(models: Models, tmp_path: Path) -> None:
    rollouts = _rollouts(tmp_path / "rollouts", models)
    job = _score(rollouts, teacher=str(models.other_teacher), allow_teacher_mismatch=True)
    assert job.plan["overrides"] == ["teacher-mismatch"]


def test_a_topk_larger_than_the_vocabulary_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="topk 400 exceeds"):
        _score(_rollouts(tmp_path / "rollouts", models), topk=400)


def test_a_teacher_with_fewer_rows_may_score_what_it_can_read(models: Models, tmp_path: Path) -> None:
    """Models of one family pad their vocabulary to different sizes; only ids in the padding are unreadable."""
    narrow = tiny.make_teacher(tmp_path / "narrow", vocab_size=300)
    settings = {"teacher": str(narrow), "allow_teacher_mismatch": True}
    readable = _rollouts(tmp_path / "readable", models, highest=300)
    assert _score(readable, **settings).plan["vocab_size"] == 300
    with pytest.raises(DataError, match="has only 300 rows"):
        _score(_rollouts(tmp_path / "padded", models, highest=tiny.VOCAB), **settings)


def test_a_teacher_with_a_shorter_context_is_refused(models: Models, tmp_path: Path) -> None:
    short = tiny.make_teacher(tmp_path / "short", context=32)
    with pytest.raises(DataError, match="context of 32"):
        _score(_rollouts(tmp_path / "rollouts", models), teacher=str(short), allow_teacher_mismatch=True)


def test_a_teacher_of_another_tokenizer_is_refused_even_when_a_mismatch_is_allowed(
    models: Models, tmp_path: Path
) -> None:
    stranger = tiny.make_teacher(tmp_path / "stranger", merges=tiny.OTHER_MERGES)
    with pytest.raises(DataError, match="tokenizer"):
        _score(_rollouts(tmp_path / "rollouts", models), teacher=str(stranger), allow_teacher_mismatch=True)


def test_the_plan_holds_the_text_of_the_chat_template(models: Models, prompts: Path) -> None:
    assert _plan(models.student, prompts).plan["chat_template"] == tiny.CHAT_TEMPLATE


def _tuned_with(folder: Path, models: Models, template: dict[str, Any]) -> Path:
    student = tiny.make_student(folder, models.teacher, attested=False)
    write_provenance(student, Provenance(role="sft", teacher=identify(models.teacher, "teacher"), template=template))
    return student


def test_a_student_is_prompted_as_it_was_tuned(models: Models, prompts: Path, tmp_path: Path) -> None:
    tuned = Template(system="Be brief.").model_dump(mode="json")
    student = _tuned_with(tmp_path / "tuned", models, tuned)
    base = {"model": str(student), "prompts": str(prompts), "cache": "unused", "sampling": {"max_tokens": 16}}
    plain, same = Generate.model_validate(base), Generate.model_validate({**base, "template": tuned})
    loaded = load_prompts(str(prompts))

    assert plan_generation("rollouts", plain, loaded).plan["template"] == tuned
    plans = [plan_generation("rollouts", config, loaded).plan for config in (same, plain)]
    assert content(plans[0]) == content(plans[1])
    assert plan_generation("sft", plain, loaded).plan["template"] == Template().model_dump(mode="json")
    other = Generate.model_validate({**base, "template": {"arguments": {"enable_thinking": False}}})
    with pytest.raises(DataError, match=r"differs in system, arguments \(.*tuned\).*Be brief") as refusal:
        plan_generation("rollouts", other, loaded)
    assert "\n" not in str(refusal.value)


def test_without_a_template_in_the_lineage_the_given_one_or_the_default_holds() -> None:
    raw = Template(mode="raw")
    assert choose_template(raw, Provenance(role="attested"), "student") == raw
    assert choose_template(None, None, "student") == Template()
    with pytest.raises(DataError, match="malformed template in the lineage: mode"):
        choose_template(None, Provenance(role="sft", template={"mode": "x"}), "student")
