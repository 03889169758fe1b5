"""What bad input gets: its exit code and one line on stderr, before any engine starts."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.config import load_section
from common.dataset_writer import create_dataset
from common.prompts import load_prompts
from precompute.config import Generate
from precompute.fleet.devices import built_for_cpu
from precompute.plan import plan_generation
from tests.precompute import tiny
from tests.precompute.checks.test_remote_code import OWN, with_config
from tests.precompute.commands import finish, refused, run_words
from tests.precompute.conftest import Models
from tests.precompute.disk import no_room_for_files_above
from tests.precompute.rows import make_writer

if TYPE_CHECKING:
    from tests.conftest import S3Server

USAGE, DATA, IO = 64, 65, 74
SHORT = ("--max-tokens", "8")
"""So that rows fit the context of a tiny model."""


def _one_line(error: str) -> str:
    assert error.count("\n") == 1, error
    return error


def test_a_missing_model_flag_is_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, error = refused(capfd, "run", "--prompts", "p.jsonl", "--cache", str(tmp_path))
    assert code == USAGE
    assert "MODEL" in _one_line(error)


def test_a_missing_cache_flag_is_named(capfd: pytest.CaptureFixture[str], models: Models) -> None:
    code, error = refused(capfd, "run", "--prompts", "p.jsonl", "--model", str(models.student))
    assert code == USAGE
    assert "CACHE" in _one_line(error)


def test_a_missing_cache_is_named_when_the_recipe_holds_the_model(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[rollouts]\nmodel = "org/model"\nprompts = "p.jsonl"\n')
    code, error = refused(capfd, "run", "--config", str(recipe))
    assert code == USAGE
    assert "CACHE" in _one_line(error) and "MODEL" not in error


@pytest.mark.parametrize("command", ["rollouts", "sft-data"])
def test_a_phase_alone_names_what_is_not_set(capfd: pytest.CaptureFixture[str], command: str, models: Models) -> None:
    code, error = refused(capfd, command, "--model", str(models.student), "--prompts", "p.jsonl")
    assert code == USAGE
    assert "cache is not set" in _one_line(error)


def test_a_model_that_does_not_exist(capfd: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path) -> None:
    code, error = refused(capfd, *run_words(tmp_path / "nowhere", prompts, str(tmp_path / "cache")))
    assert code == USAGE
    assert "no such model" in _one_line(error)


def test_a_model_folder_without_config(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.student, broken)
    (broken / "config.json").unlink()
    code, error = refused(capfd, *run_words(broken, prompts, str(tmp_path / "cache")))
    assert code == DATA
    assert "no config.json" in _one_line(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("", "no prompts"),
        ('{"prompt": "fine"}\n{"prompt": \n', "prompts.jsonl:2"),
        ('{"quest": "what?"}\n', "Did you mean 'quest'?"),
        ('{"prompt": "  "}\n', "the prompt is empty"),
    ],
    ids=["missing", "empty", "bad JSON", "wrong column", "blank prompt"],
)
def test_a_bad_prompt_file(
    capfd: pytest.CaptureFixture[str], models: Models, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    column = ["--prompt-column", "question"] if content and "quest" in content else []
    code, error = refused(capfd, *run_words(models.student, file, str(tmp_path / "cache"), *column))
    assert code == DATA
    assert said in _one_line(error)


def test_an_unknown_setting_names_the_nearest(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    words = run_words(models.student, prompts, str(tmp_path), "--set", "rollouts.sampling.temprature=0.7")
    code, error = refused(capfd, *words)
    assert code == USAGE
    assert "Did you mean 'temperature'?" in _one_line(error)


def test_a_setting_without_phase_is_asked_for_one(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    code, error = refused(capfd, *run_words(models.student, prompts, str(tmp_path), "--set", "topk=3"))
    assert code == USAGE
    assert "names no phase" in _one_line(error)


def test_the_model_may_stand_in_the_recipe(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[rollouts]\nmodel = "{models.orphan}"\nprompts = "{prompts}"\n')
    code, error = refused(capfd, "run", "--config", str(recipe), "--cache", str(tmp_path / "cache"), *SHORT)
    assert code == USAGE
    assert "lineage names none" in _one_line(error)


def test_a_text_flag_that_reads_like_a_number_stays_text(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, error = refused(capfd, "rollouts", "--model", "1e3", "--prompts", "p.jsonl", "--cache", str(tmp_path))
    assert code == DATA
    code, error = refused(capfd, *run_words(Path("1e3"), tmp_path / "true", str(tmp_path)))
    assert "1000" not in error


def test_a_student_without_lineage_needs_a_teacher(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    code, error = refused(capfd, *run_words(models.orphan, prompts, str(cache), *SHORT))
    assert code == USAGE
    assert "lopd attest" in _one_line(error)
    words = run_words(models.orphan, prompts, str(cache), "--teacher", str(models.teacher), *SHORT)
    code, error = refused(capfd, *words)
    assert code == DATA
    assert "does not say which teacher" in _one_line(error)
    assert not cache.exists()


def test_another_teacher_is_refused_in_two_columns_and_nothing_is_sampled(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    words = run_words(models.student, prompts, str(cache), "--teacher", str(models.other_teacher), *SHORT)
    code, error = refused(capfd, *words)
    first, *comparison = error.splitlines()
    assert code == DATA
    assert "teacher consistency" in first
    assert "--allow-teacher-mismatch" in first
    assert [line.split()[1] for line in comparison if "≠" in line] == ["tensors_sha256"]
    assert not cache.exists()


def test_a_tokenizer_with_another_vocabulary_is_refused(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    stranger = tiny.make_teacher(tmp_path / "stranger", extra=("zq",))
    words = run_words(models.student, prompts, str(tmp_path / "cache"), "--teacher", str(stranger), *SHORT)
    code, error = refused(capfd, *words, "--allow-teacher-mismatch")
    assert code == DATA
    assert "differ in 2 tokens" in _one_line(error)


def test_a_tokenizer_with_other_merges_is_refused(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    stranger = tiny.make_teacher(tmp_path / "stranger", merges=tiny.OTHER_MERGES)
    words = run_words(models.student, prompts, str(tmp_path / "cache"), "--teacher", str(stranger), *SHORT)
    code, error = refused(capfd, *words, "--allow-teacher-mismatch")
    assert code == DATA
    assert "encode 'The quick brown fox jumps over the lazy dog.' differently" in _one_line(error)


@pytest.mark.slow
def test_a_prompt_longer_than_the_context_ends_the_whole_run(models: Models, tmp_path: Path) -> None:
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"id": "endless", "prompt": "word " * 60}) + "\n")
    done = finish(*run_words(models.student, prompts, str(tmp_path / "cache"), "--max-tokens", "8"))
    assert done.returncode == DATA
    assert "prompt endless" in _one_line(done.stderr)
    assert done.stdout == ""
    assert not (tmp_path / "cache").exists()


def test_weights_changed_after_their_provenance(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(models.student, changed)
    shutil.copy(models.other_teacher / "model.safetensors", changed / "model.safetensors")
    code, error = refused(capfd, *run_words(changed, prompts, str(tmp_path / "cache")))
    assert code == DATA
    assert "changed after their provenance" in _one_line(error)


def test_rollouts_that_are_not_there_or_not_finished(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--cache", str(tmp_path / "scored")]
    code, error = refused(capfd, "score", "--rollouts", str(tmp_path / "none"), *words)
    assert code == DATA
    assert "no dataset here" in _one_line(error)
    make_writer(tmp_path / "half", "rollouts", shards=3)
    code, error = refused(capfd, "score", "--rollouts", str(tmp_path / "half"), *words)
    assert code == DATA
    assert "0 of 3 shards" in _one_line(error)


def test_another_plan_at_the_url_names_the_key_that_differs(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    _make_plan(models, prompts, str(tmp_path / "cache"))
    code, error = refused(capfd, *_rollout_words(models, prompts, str(tmp_path / "cache")), "--seed", "1")
    first, *comparison = error.splitlines()
    assert code == DATA
    assert "it differs in sampling.seed (" in first
    assert comparison[-1].split() == ["sampling.seed", "0", "1"]


def test_a_full_disk(capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path) -> None:
    with no_room_for_files_above(600):
        code, error = refused(capfd, *_rollout_words(models, prompts, str(tmp_path / "cache")))
    assert code == IO
    assert "no space left" in _one_line(error)


def test_a_cache_below_a_file(capfd: pytest.CaptureFixture[str], models: Models, prompts: Path) -> None:
    code, error = refused(capfd, *_rollout_words(models, prompts, str(prompts / "cache")))
    assert code == IO
    assert str(prompts) in _one_line(error)


@pytest.mark.slow
def test_a_bucket_that_does_not_exist(
    capfd: pytest.CaptureFixture[str], s3: str, models: Models, prompts: Path
) -> None:
    code, error = refused(capfd, *_rollout_words(models, prompts, "s3://no-such-bucket-here/run"))
    assert code == IO
    assert "bucket" in _one_line(error)


@pytest.mark.slow
def test_a_store_without_credentials(
    capfd: pytest.CaptureFixture[str],
    s3: str,
    models: Models,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    code, error = refused(capfd, *_rollout_words(models, prompts, f"{s3}/run"))
    assert code == IO
    assert "credentials" in _one_line(error)


@pytest.mark.slow
def test_a_store_that_may_only_be_read(
    capfd: pytest.CaptureFixture[str],
    s3: str,
    s3_server: "S3Server",
    models: Models,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    code, error = refused(capfd, *_rollout_words(models, prompts, f"{s3}/run"))
    assert code == IO
    assert "no permission" in _one_line(error)
    assert "canary" not in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": "a", "prompt": "hi"}\n{"id": "b", "prompt": "ho"}\n{"id": "a", "prompt": "hey"}\n', "'a' stands 2"),
        ('{"prompt": "hi"}\n{"prompt": ""}\n', "prompts.jsonl:2"),
        ('{"messages": []}\n', "prompts.jsonl:1"),
    ],
    ids=["the same id twice", "an empty prompt", "no messages"],
)
def test_prompts_that_repeat_or_say_nothing(
    capfd: pytest.CaptureFixture[str], models: Models, tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    code, error = refused(capfd, *_in_cache(models.student, file, tmp_path))
    assert code == DATA
    assert said in _one_line(error)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rollouts.engine.tensor_parallel=2"], "tensor_parallel = 2, but there is no GPU here"),
        (["score.engine.tensor_parallel=2"], "tensor_parallel = 2, but there is no GPU here"),
        (["rollouts.engine.cpu_kv_gib=900000"], "are missing"),
        (["score.engine.cpu_kv_gib=900000"], "are missing"),
    ],
)
@pytest.mark.skipif(not built_for_cpu(), reason="vLLM is built for GPUs here")
def test_engines_that_cannot_run_here(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path, settings: list[str], said: str
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    code, error = refused(capfd, *_in_cache(models.student, prompts, tmp_path), *words)
    assert code == USAGE
    assert said in _one_line(error)
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_brings_code_is_refused_until_it_is_pinned(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    odd = with_config(tmp_path / "odd", models.teacher, **OWN)
    words = _in_cache(models.student, prompts, tmp_path, "--teacher", str(odd), "--allow-teacher-mismatch")
    code, error = refused(capfd, *words)
    assert code == USAGE
    assert "needs code of its own (odd.py)" in _one_line(error)
    code, error = refused(capfd, *words, "--set", "score.engine.trust_remote_code=true")
    assert code == USAGE
    assert "no version of it is pinned" in _one_line(error)
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_cannot_hold_a_rollout(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    short = tiny.make_teacher(tmp_path / "short", context=32)
    words = _in_cache(models.student, prompts, tmp_path, "--teacher", str(short), "--allow-teacher-mismatch")
    code, error = refused(capfd, *words)
    assert code == DATA
    assert "the teacher's context takes 31" in _one_line(error)
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_cannot_read_all_ids(
    capfd: pytest.CaptureFixture[str], models: Models, prompts: Path, tmp_path: Path
) -> None:
    narrow = tiny.make_teacher(tmp_path / "narrow", vocab_size=200, stop=False)
    words = _in_cache(models.student, prompts, tmp_path, "--teacher", str(narrow), "--allow-teacher-mismatch")
    code, error = refused(capfd, *words)
    assert code == DATA
    assert "token id 261, the teacher 200 rows" in _one_line(error)
    assert not (tmp_path / "cache").exists()


def _in_cache(model: Path, prompts: Path, folder: Path, *more: str) -> list[str]:
    return run_words(model, prompts, str(folder / "cache"), *SHORT, *more)


def _rollout_words(models: Models, prompts: Path, cache: str) -> list[str]:
    return [
        "rollouts", "--model", str(models.student), "--prompts", str(prompts), "--cache", cache, "--max-tokens", "8",
    ]  # fmt: skip


def _make_plan(models: Models, prompts: Path, cache: str) -> None:
    """Begin the dataset that `_rollout_words` would make."""
    settings = [f"model={models.student}", f"prompts={prompts}", f"cache={cache}", "sampling.max_tokens=8"]
    config = load_section(Generate, None, "rollouts", settings)
    create_dataset(cache, plan_generation("rollouts", config, load_prompts(str(prompts))).plan)
