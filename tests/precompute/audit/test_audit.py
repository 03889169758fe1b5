"""`lopd precompute audit` as a user runs it: honest datasets pass, and each way of being wrong is told.

The fast tests store log-probs of a forward pass of their own; the slow ones those of the real engine.
"""

import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from common import cli
from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.lineage import identify
from common.schema import Rollout, to_rows, to_table, widths_in
from precompute.audit.run import draw_rows
from tests.precompute import tiny
from tests.precompute.commands import ROOT, SMALL_ENGINE, finish, refused, run_words
from tests.precompute.conftest import Models
from tests.precompute.rows import make_rollout, make_writer

OK, USAGE, DATA = 0, 64, 65
TOPK = 3
FLOAT32 = {"version": "vllm 0.0.0", "dtype": "float32", "head_dtype": "model"}
Change = Callable[[Rollout], Rollout]


def audit(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and stdout of `lopd precompute audit <words>`, run here."""
    capfd.readouterr()
    code = cli.guard(lambda: cli.group.main(args=["precompute", "audit", *words], standalone_mode=False))
    return code, capfd.readouterr().out


def as_json(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out = audit(capfd, *words, "--json")
    found = json.loads(out)
    assert found["passed"] == (code == OK)
    return found


@torch.no_grad()
def at_ids(model: Path, row: Rollout, wanted: np.ndarray | None) -> np.ndarray:
    """Log-probs of `wanted`, (tokens, k), before each token of the completion."""
    assert wanted is not None
    ids = torch.tensor(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
    logits = LlamaForCausalLM.from_pretrained(model).eval()(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(wanted.astype(np.int64))).numpy()


@torch.no_grad()
def grade(rows: list[Rollout], policy: Path, teacher: Path | None) -> list[Rollout]:
    """The rows with the log-probs of both models, and the teacher's top k."""
    networks = [LlamaForCausalLM.from_pretrained(each).eval() if each else None for each in (policy, teacher)]
    graded = []
    for row in rows:
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
        start = len(row.prompt_ids)
        tables = [n(ids[None]).logits[0, start - 1 : -1].log_softmax(-1) if n else None for n in networks]
        chosen = [t.gather(-1, ids[start:, None])[:, 0].numpy() if t is not None else None for t in tables]
        top = tables[1].topk(TOPK) if tables[1] is not None else None
        graded.append(
            replace(
                row,
                rollout_logprobs=chosen[0],
                teacher_logprobs=chosen[1],
                topk_ids=top.indices.numpy().astype(np.int32) if top else None,
                topk_logprobs=top.values.numpy() if top else None,
            )
        )
    return graded


def store(url: Path, rows: list[Rollout], policy: Path, teacher: Path | None, /, **plan: Any) -> str:
    """A finished dataset, a shard a row, of these rows."""
    said = {
        "policy": identify(policy, str(policy)).model_dump(),
        "teacher": identify(teacher, str(teacher)).model_dump() if teacher else None,
        "engine": FLOAT32,
        **({"scoring_engine": FLOAT32, "topk": TOPK} if teacher else {}),
    }
    kind = "scored" if teacher else "rollouts"
    writer = make_writer(url, kind, shards=len(rows), **{**said, **plan})
    for shard, row in enumerate(rows):
        writer.commit(shard, to_table([row], *widths_in(writer.plan)))
    writer.finalize()
    return str(url)


@pytest.fixture(scope="module")
def rows(models: Models) -> list[Rollout]:
    """Eight graded rows."""
    drawn = [make_rollout(f"p{index}/0", seed=index) for index in range(8)]
    return grade(drawn, models.student, models.teacher)


@pytest.fixture
def honest(rows: list[Rollout], models: Models, tmp_path: Path) -> str:
    return store(tmp_path / "honest", rows, models.student, models.teacher)


def test_an_honest_scored_dataset_passes_for_teacher_and_rollout(
    capfd: pytest.CaptureFixture[str], honest: str
) -> None:
    found = as_json(capfd, honest)
    assert found["passed"] and found["skipped"] == {}
    assert [column["column"] for column in found["columns"]] == ["teacher_logprobs", "rollout_logprobs"]
    for column in found["columns"]:
        assert column["found"]["largest"] < 1e-4
        assert min(column["found"][side]["mean"] for side in ("before", "after")) > 0.5
        assert (column["limits_of"], column["limits"]["largest"]) == ("float32", 2e-3)
    assert found["columns"][0]["found"]["topk"]["k"] == TOPK


def test_the_students_top_k_is_judged_by_its_log_probs_and_not_by_their_rank(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path
) -> None:
    by_student = grade(rows, models.student, models.student)
    graded = [
        replace(row, topk_ids=own.topk_ids, topk_logprobs=at_ids(models.teacher, row, own.topk_ids))
        for row, own in zip(rows, by_student, strict=True)
    ]
    said = as_json(
        capfd,
        store(tmp_path / "s", graded, models.student, models.teacher, topk_support="student"),
        "--which",
        "teacher",
    )
    topk = said["columns"][0]["found"]["topk"]
    assert said["passed"] and topk["shortfall"] is None and topk["largest"] < 1e-4
    wrong = store(tmp_path / "t", graded, models.student, models.teacher)
    assert "are not the 3 most likely" in as_json(capfd, wrong, "--which", "teacher")["columns"][0]["faults"][0]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_top_k_of_rollouts_is_held_against_their_policy(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path, wrong: bool
) -> None:
    """Those of another model at the same positions are found out."""
    top = grade(rows, models.student, models.other_teacher if wrong else models.student)
    bare = [
        replace(row, teacher_logprobs=None, topk_ids=None, topk_logprobs=None, rollout_topk_ids=own.topk_ids)
        for row, own in zip(rows, top, strict=True)
    ]
    found = as_json(capfd, store(tmp_path / "rollouts", bare, models.student, None, rollout_topk=TOPK))
    assert found["passed"] == (not wrong)
    assert found["columns"][0]["found"]["topk"]["mean"] is None


def test_rollouts_alone_are_audited_against_their_policy(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path
) -> None:
    bare = [replace(row, teacher_logprobs=None, topk_ids=None, topk_logprobs=None) for row in rows]
    data = store(tmp_path / "rollouts", bare, models.student, None)
    code, out = audit(capfd, data, "--rows", "5", "--worst", "2")
    assert code == OK, out
    assert f"{data}: 5 of 8 rows (seed 0), 200 completion tokens" in out
    assert "limits                mean 0.0005, max 0.002 (for float32)" in out
    assert out.splitlines()[-1] == "OK"
    assert len([line for line in out.splitlines() if line.startswith("  p")]) == 2
    code, error = refused(capfd, "audit", data, "--which", "teacher")
    assert (code, "no teacher_logprobs" in error) == (USAGE, True)


def shifted(row: Rollout) -> Rollout:
    assert row.teacher_logprobs is not None
    return replace(row, teacher_logprobs=np.roll(row.teacher_logprobs, 1))


def swapped_topk(row: Rollout) -> Rollout:
    assert row.topk_ids is not None
    return replace(row, topk_ids=(row.topk_ids + 1) % tiny.VOCAB)


def warmer(row: Rollout) -> Rollout:
    return replace(row, rollout_logprobs=row.rollout_logprobs * np.float32(0.99))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shifted, "the stored log-probs fit better one token later"),
        (swapped_topk, "top-k ids are not the 3 most likely"),
        (warmer, "mean |d| 0.0"),
    ],
)
def test_a_column_that_is_wrong_fails(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path, change: Change, said: str
) -> None:
    data = store(tmp_path / "wrong", [change(row) for row in rows], models.student, models.teacher)
    code, out = audit(capfd, data)
    assert code == DATA
    assert f"  FAILED: {said}" in out
    assert out.splitlines()[-1] == "FAILED"


def test_limits_can_be_given(capfd: pytest.CaptureFixture[str], honest: str) -> None:
    assert audit(capfd, honest, "--max-difference", "1e-9")[0] == DATA
    code, out = audit(capfd, honest, "--max-difference", "1", "--mean-difference", "0.5")
    assert (code, "mean 0.5, max 1 (for float32)" in out) == (OK, True)


@pytest.mark.parametrize("limit", ["nan", "inf"])
@pytest.mark.parametrize("flag", ["--max-difference", "--mean-difference"])
def test_a_limit_that_nothing_is_over_is_refused(
    capfd: pytest.CaptureFixture[str], honest: str, flag: str, limit: str
) -> None:
    code, error = refused(capfd, "audit", honest, flag, limit)
    assert (code, f"{flag} is {limit}" in error) == (USAGE, True)


def test_a_model_that_gives_no_numbers_fails(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path
) -> None:
    broken = LlamaForCausalLM.from_pretrained(models.teacher)
    broken.model.norm.weight.data[:] = torch.nan
    folder = tmp_path / "model"
    shutil.copytree(models.teacher, folder)
    broken.save_pretrained(folder)
    data = store(tmp_path / "data", rows, models.student, folder)
    [column] = as_json(capfd, data, "--which", "teacher")["columns"]
    assert column["faults"] == ["320 tokens came back NaN or infinite from the model"]
    assert audit(capfd, data, "--which", "teacher")[0] == DATA


def test_nothing_that_a_stranger_wrote_is_obeyed_by_the_terminal(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path
) -> None:
    evil = "\x1b[2J\x9b\u202e\rOK\n"
    named = {
        who: {**identify(folder, str(folder)).model_dump(), "name": f"/nowhere/{who}{evil}"}
        for who, folder in (("policy", models.student), ("teacher", models.teacher))
    }
    stamp = {**FLOAT32, "version": f"vllm{evil}"}
    strange = [replace(row, uid=row.uid + evil) for row in rows]
    data = store(tmp_path / "evil", strange, models.student, models.teacher, scoring_engine=stamp, **named)
    code, out = audit(capfd, data, "--model", str(models.teacher), "--worst", "8")
    assert (code, out.splitlines()[-1]) == (OK, "OK")
    error = refused(capfd, "audit", data)[1]
    assert [character for character in out + error if unicodedata.category(character) in ("Cc", "Cf")] == ["\n"] * (
        out + error
    ).count("\n")
    assert out.count("␛[2J") >= 10


def test_the_limits_follow_the_engines_dtype(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path
) -> None:
    noisy = [replace(row, teacher_logprobs=row.teacher_logprobs - np.float32(0.01)) for row in rows]  # type: ignore[operator]
    for dtype, code in {"float32": DATA, "bfloat16": OK, "auto": OK}.items():  # vLLM runs a float32 checkpoint in bf16
        data = store(
            tmp_path / dtype, noisy, models.student, models.teacher, scoring_engine={**FLOAT32, "dtype": dtype}
        )
        assert audit(capfd, data, "--which", "teacher")[0] == code


def test_a_dataset_scored_by_another_model_fails(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path
) -> None:
    other = grade(rows, models.student, models.other_teacher)
    data = store(tmp_path / "other", other, models.student, models.teacher)
    code, out = audit(capfd, data, "--which", "teacher")
    assert code == DATA
    assert "FAILED: mean |d|" in out and "fit better one token" not in out
    assert audit(capfd, data, "--which", "rollout")[0] == OK


def test_another_model_than_the_plans_is_refused_in_two_columns(
    capfd: pytest.CaptureFixture[str], honest: str, models: Models
) -> None:
    code, error = refused(capfd, "audit", honest, "--model", str(models.other_teacher))
    first, *comparison = error.splitlines()
    assert code == DATA
    assert "this is not the model of teacher_logprobs" in first
    assert "tensors_sha256" in [line.split()[1] for line in comparison if "≠" in line]


def test_a_copy_elsewhere_is_named_and_a_policy_that_is_gone_is_left_out(
    capfd: pytest.CaptureFixture[str], rows: list[Rollout], models: Models, tmp_path: Path
) -> None:
    names = {
        who: {**identify(folder, str(folder)).model_dump(), "name": f"/nowhere/{who}"}
        for who, folder in (("policy", models.student), ("teacher", models.teacher))
    }
    data = store(tmp_path / "moved", rows, models.student, models.teacher, **names)
    code, error = refused(capfd, "audit", data)
    assert code == USAGE
    assert "not to be had here" in error and "--model" in error
    found = as_json(capfd, data, "--model", str(models.teacher))
    assert [column["column"] for column in found["columns"]] == ["teacher_logprobs"]
    assert "not to be had here" in found["skipped"]["rollout_logprobs"]
    both = ["--model", str(models.teacher), "--model", str(models.student)]
    assert len(as_json(capfd, data, *both)["columns"]) == 2
    code, error = refused(capfd, "audit", data, "--model", str(models.teacher), "--which", "both")
    assert (code, "rollout_logprobs" in error) == (USAGE, True)


def test_ids_outside_the_models_vocabulary_name_the_row(
    capfd: pytest.CaptureFixture[str], models: Models, tmp_path: Path
) -> None:
    row = make_rollout("p7/0")
    row.completion_ids[3] = tiny.VOCAB + 5
    data = store(tmp_path / "outside", [row], models.student, None, vocab_size=tiny.VOCAB + 10)
    code, error = refused(capfd, "audit", data)
    assert code == DATA
    assert "token id 325 is outside the vocabulary of 320" in error and "row p7/0" in error


def test_a_dataset_that_is_not_finished(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_writer(tmp_path / "half", "rollouts", shards=3)
    code, error = refused(capfd, "audit", str(tmp_path / "half"))
    assert (code, "0 of 3 shards" in error) == (DATA, True)


def test_rows_are_drawn_by_the_seed_from_the_shards_that_hold_them_alone(honest: str) -> None:
    dataset = open_dataset(honest)
    whole = [row.uid for row in draw_rows(dataset, 100, seed=0)]
    assert whole == [f"p{index}/0" for index in range(8)]
    drawn = [tuple(row.uid for row in draw_rows(dataset, 3, seed)) for seed in range(6)]
    assert drawn[2] == tuple(row.uid for row in draw_rows(dataset, 3, seed=2))
    assert len(set(drawn)) > 3
    assert all(len(set(uids)) == 3 and list(uids) == sorted(uids) for uids in drawn)
    [left] = [row.uid for row in draw_rows(dataset, 1, seed=4)]
    for commit in dataset.shards:
        if commit.shard != int(left[1]):
            (Path(honest) / commit.file).unlink()
    assert [row.uid for row in draw_rows(open_dataset(honest), 1, seed=4)] == [left]


def without(package: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `lopd precompute <words>` where `package` cannot be imported."""
    code = f"import sys; sys.modules[{package!r}] = None; from common.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "precompute", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_it_runs_where_vllm_is_not_installed(honest: str) -> None:
    done = without("vllm", "audit", honest)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (OK, "OK"), done.stderr


@pytest.mark.slow
def test_without_pytorch_it_says_what_to_install(honest: str) -> None:
    done = without("torch", "audit", honest)
    assert done.returncode == USAGE
    last = done.stderr.splitlines()[-1]  # transformers has warned before
    assert last == "error: PyTorch is not installed. Install lightning-opd[train], or run `make setup`"


@pytest.fixture(scope="module")
def engines(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rollouts` and `scored`, by the real engine in float32."""
    root = tmp_path_factory.mktemp("engines")
    prompts = tiny.write_prompts(root / "prompts.jsonl", 8)
    done = finish(*run_words(models.student, prompts, str(root), "--max-tokens", "48", "--topk", str(TOPK)))
    assert done.returncode == OK, done.stderr
    return root


@pytest.mark.slow
def test_the_real_engines_scores_pass(capfd: pytest.CaptureFixture[str], engines: Path) -> None:
    found = as_json(capfd, str(engines / "scored"))
    assert found["passed"]
    for column in found["columns"]:
        assert column["found"]["largest"] < 2e-3
        assert column["found"]["here"]["mean"] < 1e-4
    assert found["columns"][0]["found"]["topk"]["largest"] < 2e-3


@pytest.mark.slow
def test_the_real_engines_scores_shifted_by_one_token_fail_although_their_mean_fits(
    capfd: pytest.CaptureFixture[str], engines: Path, tmp_path: Path
) -> None:
    source = open_dataset(str(engines / "scored"))
    writer = create_dataset(str(tmp_path / "shifted"), source.plan)
    for shard in range(source.num_shards):
        writer.commit(shard, to_table([shifted(row) for row in to_rows(source.read_shard(shard))], TOPK))
    writer.finalize()
    [column] = as_json(capfd, str(tmp_path / "shifted"), "--which", "teacher")["columns"]
    assert abs(column["found"]["signed"]) < 0.05
    assert column["found"]["here"]["mean"] > 0.5
    assert column["found"]["after"]["mean"] < 1e-4
    assert column["faults"][0] == "the stored log-probs fit better one token later"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.05},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_log_probs_of_the_real_engines_sampling_pass_and_fit_no_other(
    capfd: pytest.CaptureFixture[str], models: Models, tmp_path: Path, sampling: dict[str, float]
) -> None:
    prompts, data = tiny.write_prompts(tmp_path / "prompts.jsonl", 8), tmp_path / "rollouts"
    settings = [f"sampling.{key}={value}" for key, value in sampling.items()]
    settings += [f"engine.{setting}" for setting in SMALL_ENGINE]
    done = finish(
        "rollouts", "--model", str(models.student), "--prompts", str(prompts), "--cache", str(data),
        "--max-tokens", "48", *(word for setting in settings for word in ("--set", setting)),
    )  # fmt: skip
    assert done.returncode == OK, done.stderr
    [column] = as_json(capfd, str(data))["columns"]
    found = column["found"]
    assert found["largest"] < 2e-3
    assert (found["outside"], found["blurred"] <= 0.1 * found["tokens"]) == (0, True)
    source = open_dataset(str(data))
    plan = {**source.plan, "sampling": {**source.plan["sampling"], "temperature": 0.9, "top_p": 0.95}}
    writer = create_dataset(str(tmp_path / "claimed"), plan)
    for shard in range(source.num_shards):
        writer.commit(shard, source.read_shard(shard))
    writer.finalize()
    assert audit(capfd, str(tmp_path / "claimed"))[0] == DATA
