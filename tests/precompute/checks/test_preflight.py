"""The checks before an engine starts: what they tell when all is well, and what they refuse."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.errors import DataError, LopdError, RetryLater, StorageError, UsageError
from common.prompts import load_prompts
from common.safetensors_header import TensorEntry
from common.storage import Store
from precompute.checks import room
from precompute.checks.memory import BESIDE, Checkpoint, need_of_gpu
from precompute.checks.preflight import Check, Place, check_generation, check_run, require, summary_lines
from precompute.checks.rights import try_rights
from precompute.checks.room import host_room, require_room
from precompute.config import Engine, Generate, Score
from precompute.fleet.devices import Gpu
from precompute.fleet.replica import Slot
from precompute.plan import plan_generation
from tests.precompute import tiny
from tests.precompute.checks.test_remote_code import OWN, with_config
from tests.precompute.conftest import Models

GIB = 1 << 30
CPU = Place((Slot("0", ()),), ())
H100 = Gpu(0, "GPU-aa", "H100", 79 * GIB, 80 * GIB)


def _sections(
    models: Models, prompts: Path, cache: Path, teacher: Path | None = None, **scoring: Any
) -> tuple[Generate, Score]:
    generation = {"model": str(models.student), "prompts": str(prompts), "cache": str(cache / "rollouts")}
    places = {"rollouts": str(cache / "rollouts"), "cache": str(cache / "scored")}
    named = {"teacher": str(teacher)} if teacher else {}
    return (
        Generate.model_validate({**generation, "sampling": {"max_tokens": 16}, "engine": {"cpu_kv_gib": 0.1}}),
        Score.model_validate({**places, **named, "engine": {"cpu_kv_gib": 0.1}, **scoring}),
    )


def _checks(sections: tuple[Generate, Score], place: Place = CPU) -> list[Check]:
    generation, scoring = sections
    prompts = load_prompts(generation.prompts)
    return check_run(generation, prompts, plan_generation("rollouts", generation, prompts), scoring, (place, place))


def _wrong(checks: list[Check]) -> dict[str, LopdError]:
    return {check.name: check.problem for check in checks if check.problem is not None}


def test_all_that_was_looked_at_is_told_in_a_line_each(models: Models, prompts: Path, tmp_path: Path) -> None:
    checks = _checks(_sections(models, prompts, tmp_path / "cache"))
    require(checks)
    lines = [check.line for check in checks]
    assert all(": ok, " in line and "\n" not in line for line in lines)
    names = [check.name for check in checks]
    wanted = ["prompts", "context", "template", "stop ids", "weights", "head", "heads", "memory", "teacher"]
    assert names[: len(wanted)] == wanted and names[-2:] == ["storage", "storage"]
    assert "teacher: ok, " + f"{models.teacher}, the student's SFT teacher" in lines
    assert "stop ids: ok, 261" in lines


def test_when_all_is_well_one_line_is_shown_and_one_for_each_warning_and_a_log_has_all(
    models: Models, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checks = _checks(_sections(models, prompts, tmp_path / "cache"))
    with caplog.at_level(logging.INFO, logger="precompute"):
        require(checks)
    assert summary_lines(checks) == [f"preflight: {len(checks)} checks ok"]
    assert caplog.messages == [check.line for check in checks]
    odd = [Check("memory", "of other nodes is not known here", warning=True), Check("template", "odd", warning=True)]
    assert summary_lines([*checks, *odd]) == [
        f"preflight: {len(checks)} checks ok, 2 warnings",
        "memory: warning: of other nodes is not known here",
        "template: warning: odd",
    ]


def test_what_may_pass_by_itself_does_not_hide_what_must_be_mended() -> None:
    held = Check("memory", "", problem=RetryLater("the GPU is not free"))
    wrong = Check("teacher", "", problem=UsageError("it is none"))
    with pytest.raises(UsageError, match=r"it is none\nalso memory: the GPU is not free"):
        require([held, wrong])


def test_nothing_is_written_by_looking(models: Models, prompts: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    require(_checks(_sections(models, prompts, tmp_path / "cache")))
    assert sorted(tmp_path.rglob("*")) == before


def test_all_problems_are_told_at_once_and_the_stores_are_left_alone(
    models: Models, prompts: Path, tmp_path: Path
) -> None:
    short = tiny.make_teacher(tmp_path / "short", context=32)
    sections = _sections(models, prompts, tmp_path / "cache", teacher=short, topk=400)
    checks = _checks(sections)
    assert set(_wrong(checks)) == {"teacher", "teacher's context", "teacher's top-k"}
    assert "storage" not in [check.name for check in checks]
    with pytest.raises(DataError, match="teacher consistency") as refusal:
        require(checks)
    assert "also teacher's context: a rollout may have" in str(refusal.value)
    assert "≠ config_sha256" in str(refusal.value)


def test_a_rollout_that_the_teacher_could_not_read_is_refused_before_it_is_sampled(
    models: Models, prompts: Path, tmp_path: Path
) -> None:
    short = tiny.make_teacher(tmp_path / "short", context=32)
    sections = _sections(models, prompts, tmp_path / "cache", teacher=short, allow_teacher_mismatch=True)
    [problem] = _wrong(_checks(sections)).values()
    assert "the teacher's context takes 31" in str(problem) and "Lower sampling.max_tokens" in str(problem)


def test_ids_outside_the_teachers_vocabulary_are_refused(models: Models, prompts: Path, tmp_path: Path) -> None:
    narrow = tiny.make_teacher(tmp_path / "narrow", vocab_size=200, stop=False)
    sections = _sections(models, prompts, tmp_path / "cache", teacher=narrow, allow_teacher_mismatch=True)
    wrong = _wrong(_checks(sections))
    assert "token id 261, the teacher 200 rows" in str(wrong["teacher's tokenizer"])


def test_a_top_k_of_the_student_that_the_rollouts_would_not_hold_is_refused_before_they_are_sampled(
    models: Models, prompts: Path, tmp_path: Path
) -> None:
    generation, scoring = _sections(models, prompts, tmp_path / "cache", topk=4, topk_support="student")
    problem = _wrong(_checks((generation, scoring)))["teacher's top-k"]
    assert "asks for 4 ids a position, the rollouts hold 0" in str(problem) and "[rollouts] topk" in str(problem)
    assert not _wrong(_checks((generation.model_copy(update={"topk": 4}), scoring)))


def test_a_teacher_that_needs_code_is_refused_before_the_rollouts(
    models: Models, prompts: Path, tmp_path: Path
) -> None:
    odd = with_config(tmp_path / "odd", models.teacher, **OWN)
    sections = _sections(models, prompts, tmp_path / "cache", teacher=odd, allow_teacher_mismatch=True)
    assert "needs code of its own (odd.py)" in str(_wrong(_checks(sections))["teacher's code"])


def test_a_quantised_teacher_is_told_and_needs_a_plain_head(models: Models, prompts: Path, tmp_path: Path) -> None:
    fp8 = with_config(tmp_path / "fp8", models.teacher, quantization_config={"quant_method": "fp8"})
    sections = _sections(models, prompts, tmp_path / "cache", teacher=fp8, allow_teacher_mismatch=True)
    checks = _checks(sections)
    assert not _wrong(checks)
    assert "teacher's weights: ok, fp8, 8 bits" in [check.line for check in checks]

    save_file({"lm_head.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, fp8 / "head.safetensors")
    assert "output head is quantised" in str(_wrong(_checks(sections))["teacher's head"])
    sections = _sections(
        models, prompts, tmp_path / "cache", teacher=fp8, allow_teacher_mismatch=True,
        engine={"head_dtype": "model", "cpu_kv_gib": 0.1},
    )  # fmt: skip
    assert not _wrong(_checks(sections))


def test_texts_that_repeat_are_counted(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Count to {i % 3}."}) + "\n" for i in range(5)))
    lines = [check.line for check in _checks(_sections(models, file, tmp_path / "cache"))]
    assert "repeated prompts: warning: 2 stand more than once, in 4 rows (first p0): each is sampled anew" in lines


def test_an_end_that_does_not_stop_is_told(models: Models, prompts: Path, tmp_path: Path) -> None:
    generation, _ = _sections(models, prompts, tmp_path / "cache")
    other = generation.model_copy(update={"sampling": generation.sampling.model_copy(update={"stop_ids": (3,)})})
    loaded = load_prompts(str(prompts))
    checks = check_generation(other, loaded, plan_generation("rollouts", other, loaded), CPU)
    odd = [check.said for check in checks if check.name == "stop ids" and check.warning]
    assert [said.partition(" does not")[0] for said in odd] == [
        "the model's own end-of-sequence id 261",
        "its tokenizer's own end-of-sequence id 261",
    ]


@pytest.mark.parametrize(
    ("heads", "keys", "span", "fit"),
    [(2, 2, 2, True), (32, 8, 8, True), (32, 4, 8, True), (32, 8, 3, False), (16, 8, 5, False)],
)
def test_tensor_parallel_must_divide_the_heads(
    models: Models,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    keys: int,
    span: int,
    fit: bool,
) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 64 * GIB)  # of a host with eight GPUs
    folder = with_config(tmp_path / "model", models.student, num_attention_heads=heads, num_key_value_heads=keys)
    generation, _ = _sections(models, prompts, tmp_path / "cache")
    wide = generation.model_copy(update={"engine": Engine(tensor_parallel=span)})
    loaded = load_prompts(str(prompts))
    job = replace(plan_generation("rollouts", generation, loaded), folder=folder)
    gpus = [replace(H100, index=index) for index in range(span)]
    checks = check_generation(wide, loaded, job, Place((Slot("0", tuple(range(span))),), gpus))
    assert set(_wrong(checks)) == (set() if fit else {"heads"})


def _qwen3_32b() -> Checkpoint:
    """Its shape, and its 65.5 GB of weights as one tensor."""
    weights = TensorEntry(dtype="BF16", shape=[65_500_000_000 // 2], data_offsets=(0, 65_500_000_000))
    config = {"num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    return Checkpoint(config, {"w": weights})


def test_what_a_gpu_must_hold_is_its_part_of_the_weights_and_a_row() -> None:
    whole, half = (need_of_gpu(_qwen3_32b(), Engine(), 4096, span) for span in (1, 2))
    assert whole.weights == 65_500_000_000 and half.weights == whole.weights // 2
    assert whole.cache == 4096 * 64 * 2 * 8 * 128 * 2 == 2 * half.cache  # 256 KiB a token
    assert whole.total == whole.weights + whole.cache + BESIDE


def test_no_room_on_a_gpu_says_how_much_is_missing_and_what_would_do() -> None:
    slots, small = (Slot("0", (0,)),), replace(H100, total=40 * GIB, free=39 * GIB)
    assert "63.0 GiB (weights 61.0 GiB, KV cache of a row 1.0 GiB) at least, of 72.0 GiB" in require_room(
        _qwen3_32b(), Engine(), 4096, slots, [H100]
    )
    with pytest.raises(UsageError, match=r"63.0 GiB .* may take 36.0 GiB .*; 27.0 GiB are missing.*parallel to 2"):
        require_room(_qwen3_32b(), Engine(), 4096, slots, [small])
    with pytest.raises(UsageError, match="parallel to 8"):
        require_room(_qwen3_32b(), Engine(), 4096, slots, [replace(small, total=12 * GIB)])


def test_a_gpu_that_others_hold_is_named_with_what_they_leave() -> None:
    taken = replace(H100, index=3, free=30 * GIB)
    said = r"asks for 72.0 GiB.*30.0 GiB are left; 42.0 GiB.*GPU 3.*nvidia-smi.*run the same command again"
    with pytest.raises(RetryLater, match=said):
        require_room(_qwen3_32b(), Engine(), 4096, (Slot("0", (3,)),), [H100, taken])
    assert require_room(_qwen3_32b(), Engine(), 4096, (Slot("0", (0,)),), [H100, taken])


def test_a_share_of_a_gpu_that_its_driver_never_leaves_is_not_waited_for() -> None:
    slots = (Slot("0", (0,)),)
    with pytest.raises(UsageError, match=r"utilization = 0.99 asks for 79.2 GiB .*Lower the share to 0.98$") as refusal:
        require_room(_qwen3_32b(), Engine(gpu_memory_utilization=0.99), 4096, slots, [H100])
    assert "again" not in str(refusal.value)
    taken = replace(H100, free=30 * GIB)
    with pytest.raises(UsageError, match=r"Lower the share to 0.97$"):
        require_room(_qwen3_32b(), Engine(gpu_memory_utilization=0.98), 4096, slots, [taken])
    with pytest.raises(RetryLater):
        require_room(_qwen3_32b(), Engine(gpu_memory_utilization=0.97), 4096, slots, [taken])


def test_no_room_on_the_host_says_how_much_is_missing(models: Models, prompts: Path, tmp_path: Path) -> None:
    generation, scoring = _sections(models, prompts, tmp_path / "cache")
    huge = scoring.model_copy(update={"engine": Engine(cpu_kv_gib=1e6)})
    problem = str(_wrong(_checks((generation, huge)))["teacher's memory"])
    assert "no room for the model" in problem and "are missing" in problem
    need = replace(need_of_gpu(_qwen3_32b(), Engine(), 0, 64), beside=GIB)
    with pytest.raises(UsageError, match="3 x .*fleet.replicas to 2"):
        host_room(need, 3, 5 * GIB, 6 * GIB)


def test_memory_of_the_host_that_others_hold_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    need = replace(need_of_gpu(_qwen3_32b(), Engine(), 0, 64), beside=GIB)
    with pytest.raises(RetryLater, match="3 x .*run the same command again when that has ended. Or: set fleet.replic"):
        host_room(need, 3, 5 * GIB, 64 * GIB)
    slots = (Slot("0", (0,)),)
    monkeypatch.setattr(room, "free_memory", lambda: GIB)
    for whole, error in ((64 * GIB, RetryLater), (2 * GIB, UsageError), (None, UsageError)):
        monkeypatch.setattr(room, "whole_memory", lambda whole=whole: whole)
        with pytest.raises(error, match=r"2 processes take about 3.0 GiB .* 2.0 GiB are missing"):
            require_room(_qwen3_32b(), Engine(), 4096, slots, [H100])


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        try_rights(str(tmp_path / "file" / "cache"), single_writer=False)
    assert "can be listed, read and written" in try_rights(str(tmp_path / "a" / "b"), single_writer=False)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_store_is_tried_by_one_object_however_often(s3: str) -> None:
    for _ in range(2):
        try_rights(f"{s3}/run", single_writer=False)
    try_rights(f"{s3}/run", single_writer=True)
    assert len(Store(f"{s3}/run").list()) == 1


def test_job_of_a_cluster_says_that_its_memory_is_not_known(models: Models, prompts: Path, tmp_path: Path) -> None:
    checks = _checks(_sections(models, prompts, tmp_path / "cache"), Place((), (), elsewhere=True))
    assert "memory: warning: of other nodes is not known here" in [check.line for check in checks]
