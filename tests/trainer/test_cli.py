"""What a user sees who made a mistake: one line, an exit code, no traceback."""

import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from common.dataset_writer import create_dataset
from common.errors import DataError, UsageError
from common.schema import to_table
from tests.trainer import build
from trainer import cli
from trainer.cli import group, settings_from
from trainer.config import OpdConfig, SftConfig
from trainer.inputs import open_inputs
from trainer.launch import _code


def opd(example, **settings) -> OpdConfig:
    common = {"model": str(example.student), "data": example.scored, "output": "unused", "token_budget": 90}
    return OpdConfig(**{**common, **settings})


def refused(result: subprocess.CompletedProcess[str], code: int, *said: str) -> str:
    """Check the exit code and that stderr is one line with these words; returns it."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == code, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in lines[0] for word in said), lines[0]
    return lines[0]


def test_another_teacher_is_refused_with_both_columns(example, tmp_path):
    other = build.make_model(tmp_path / "other", seed=9)
    student = build.make_student(tmp_path / "student", example.teacher, stamp=other)
    rows = build.graded(build.open_model(example.teacher), build.sample(build.open_model(student), prompts=8))
    data = build.make_dataset(tmp_path / "data", rows, kind="scored", policy=student, teacher=example.teacher)
    words = [f"model={student}", f"data={data}", f"output={tmp_path / 'out'}", "token_budget=90", "compute=float32"]
    result = build.run_trainer("opd", *words)
    refused(result, 65, "teacher consistency")
    assert "SFT teacher" in result.stderr and "≠ tensors_sha256" in result.stderr
    allowed = build.run_trainer("opd", *words, "allow_teacher_mismatch=true", "max_steps=1")
    assert allowed.returncode == 0, allowed.stderr
    assert "WARNING" in allowed.stderr and "teacher-mismatch" in allowed.stderr
    assert '"teacher-mismatch"' in (tmp_path / "out" / "export" / "provenance.json").read_text()


def wrong_words(example, tmp_path) -> list[str]:
    return [f"model={example.teacher}", f"data={example.scored}", f"output={tmp_path / 'out'}", "token_budget=90"]


@pytest.mark.slow
def test_two_ranks_tell_one_line_and_exit_as_one(example, tmp_path):
    result = build.run_trainer("opd", *wrong_words(example, tmp_path), ranks=2)
    line = refused(result, 65, "sampled by another model")
    assert result.stderr.splitlines()[0] == line, "nothing is said before it"


@pytest.mark.slow
def test_torchrun_starts_the_ranks_too(example, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "trainer", "opd", *wrong_words(example, tmp_path)]
    result = subprocess.run(command, env=build.environment(), capture_output=True, text=True)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "sampled by another model" in errors[0]
    assert "exitcode  : 65" in result.stderr


@pytest.mark.slow
def test_under_torchrun_one_rank_plans_for_all(example):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [f"model={example.student}", f"data={example.scored}", "token_budget=90", "--dry-run"]
    command = [sys.executable, *torchrun, "-m", "trainer", "opd", *words]
    result = subprocess.run(command, env=build.environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("It fits.") == 1 and "a rank of 2" in result.stdout


@pytest.mark.parametrize("command", ["eval", "report"])
def test_eval_and_report_are_one_process(command):
    result = CliRunner().invoke(group, ["--ranks", "2", command, "model=m"])
    assert isinstance(result.exception, UsageError) and f"{command} runs in one process" in str(result.exception)


@pytest.mark.parametrize("words", [["--help"], ["--settings"], ["learning_rate=1"], ["--host-memory", "1TiB"]])
def test_no_rank_is_started_for_what_is_no_training(monkeypatch, words):
    monkeypatch.setattr(cli, "launch", lambda ranks, words: pytest.fail("ranks were started"))
    required = ["model=m", "data=d", "output=o"]
    result = CliRunner().invoke(group, ["--ranks", "2", "opd", *required, *words])
    assert result.exception is None or isinstance(result.exception, UsageError)


def test_a_killed_rank_is_told_by_the_launcher(capsys):
    assert _code(1, -signal.SIGKILL) == 137
    assert "error: rank 1 was killed by SIGKILL" in capsys.readouterr().err
    assert _code(0, 65) == 65 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learning_rate=1"], ["unknown key 'learning_rate'"]),
        (["max_step=1"], ["Did you mean 'max_steps'?"]),
        (["lr=-1"], ["lr"]),
        (["no-such.toml"], ["recipe not found", "no-such.toml"]),
    ],
)
def test_a_wrong_setting(example, words, said):
    required = [f"model={example.student}", f"data={example.scored}", "output=unused"]
    recipe = [word for word in words if "=" not in word]
    with pytest.raises(UsageError) as error:
        settings_from(OpdConfig, "opd", [*recipe, *required, *[word for word in words if "=" in word]])
    assert all(word in str(error.value) for word in said)


def test_a_recipe_a_variable_and_a_word_add_up(tmp_path, monkeypatch):
    (tmp_path / "run.toml").write_text('[opd]\nlr = 1e-5\nseed = 3\noutput = "a"\n[eval]\nmodel = "m"\n')
    monkeypatch.setenv("LOPD_OPD__SEED", "4")
    config = settings_from(OpdConfig, "opd", [str(tmp_path / "run.toml"), "model=m", "data=x", "output=b"])
    assert (config.lr, config.seed, config.output, config.objective) == (1e-5, 4, "b", "auto")


def test_a_model_folder_without_config(example, tmp_path):
    words = [f"model={tmp_path}", f"data={example.scored}", "output=unused"]
    refused(build.run_trainer("opd", *words), 65, "no config.json", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(example):
    words = [f"model={example.student}", f"data={example.scored}", "output=unused", "device=cuda"]
    refused(build.run_trainer("opd", *words), 64, "no CUDA device", "device=cpu")


def test_a_dataset_without_manifest_says_how_far_it_is(example, alone, tmp_path):
    plan = build.plan_of("scored", example.student, example.teacher, 3, build.TOPK)
    create_dataset(str(tmp_path), plan).commit(0, to_table(example.rows[:4], build.TOPK))
    with pytest.raises(DataError, match="not finished: 1 of 3 shards"):
        open_inputs(opd(example, data=str(tmp_path)), alone)


def test_a_dataset_of_another_kind(example, alone):
    with pytest.raises(UsageError, match="kind 'sft', 'scored' is needed"):
        open_inputs(opd(example, data=example.sft), alone)
    sft = SftConfig(model=str(example.student), data=example.scored, output="unused")
    with pytest.raises(UsageError, match="kind 'scored', 'sft' is needed"):
        open_inputs(sft, alone)


def test_a_row_longer_than_the_budget_is_named(example, alone):
    with pytest.raises(DataError, match=r"rows do not fit token_budget=10.*row p\d+-\d.*Set token_budget="):
        open_inputs(opd(example, token_budget=10), alone)


def test_more_topk_than_is_stored(example, alone):
    with pytest.raises(UsageError, match="asks for 9 teacher log-probs a token, the dataset stores 4"):
        open_inputs(opd(example, objective="topk", topk=9), alone)


def test_a_teacher_with_another_tokenizer(example, alone, tmp_path):
    student = build.make_student(tmp_path / "student", example.teacher)
    build.make_tokenizer(student, words=build.VOCAB - 1)
    config = SftConfig(model=str(student), data=example.sft, output="unused", token_budget=90)
    with pytest.raises(DataError, match="tokenizers of .* differ"):
        open_inputs(config, alone)


def test_an_altered_shard(example, alone, tmp_path):
    data = build.make_dataset(tmp_path, example.rows, kind="scored", policy=example.student, teacher=example.teacher)
    shard = sorted((tmp_path / "data").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-20] + b"\0" * 20)
    with pytest.raises(DataError, match="the shard was altered"):
        open_inputs(opd(example, data=data), alone)


def test_the_defaults_are_the_papers():
    sft, opd = (model(model="m", data="d", output="o") for model in (SftConfig, OpdConfig))
    assert (sft.lr, sft.schedule, sft.warmup, sft.betas, sft.weight_decay) == (8e-5, "cosine", 0.1, (0.9, 0.999), 0.0)
    assert (opd.lr, opd.schedule, opd.warmup, opd.betas, opd.weight_decay) == (2e-6, "constant", 0, (0.9, 0.98), 0.1)


def test_settings_are_documented():
    listed = CliRunner().invoke(group, ["opd", "--settings"]).output
    assert "max_importance_ratio  (default 2.0)\n    Bound of the importance weight" in listed
    for model in (SftConfig, OpdConfig):
        assert all(field.description for field in model.model_fields.values())
