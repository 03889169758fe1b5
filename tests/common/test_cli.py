import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from common import cli
from common.errors import DataError, LopdError, RetryLater, StorageError, UsageError
from common.lineage import Provenance, identify, read_provenance, require_teacher, write_provenance
from common.models import publish, resolve
from tests.common import scripts

LOPD = "from common.cli import main; main()"
LOADED_MODULES = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def lopd(*arguments: str) -> int | str | None:
    """Run `lopd` in this process; returns its exit code."""
    with pytest.raises(SystemExit) as raised:
        cli.run(cli.group, list(arguments))
    return raised.value.code


def commands(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every group and command below `group`, by the words that name it."""
    context = click.Context(group)
    found = [words]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = (*words, name)
        found += commands(command, inner) if isinstance(command, click.Group) else [inner]
    return found


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(cli.group)
    assert {(), ("attest",), ("precompute",), ("cache", "verify"), ("completion",)} <= {*found}
    for words in found:
        assert lopd(*words, "--help") == 0
        usage, *rest = capsys.readouterr().out.splitlines()
        assert usage.startswith("Usage: ") and " ".join(words) in usage and len(rest) > 3


def test_the_help_of_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(cli.group):
        lopd(*words, "--help")
        shown = capsys.readouterr().out
        assert " ".join(["lopd", *words]) in shown.partition("Usage: ")[2].partition("\n")[2], words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_and_how_to_install_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lopd("completion", shell) == 0
    assert "_LOPD_COMPLETE" in capsys.readouterr().out
    assert lopd("completion", "--help") == 0
    assert f"lopd completion {shell}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("lopd ", {"attest", "cache", "completion", "precompute"}),
        ("lopd cache ", {"ls", "status", "verify", "copy", "gc", "inspect", "export"}),
        ("lopd cache verify --f", {"--fast", "--full"}),
        ("lopd completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_what_is_typed_is_completed_by_what_there_is(typed: str, offered: set[str]) -> None:
    words = typed.split(" ")
    variables = {"_LOPD_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    ran = scripts.run('import sys; sys.argv = ["lopd"]; from common.cli import main; main()', env=variables)
    assert ran.returncode == 0
    assert offered <= {line.partition(",")[2] for line in ran.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_by_the_script_as_it_is_installed() -> None:
    """In bash itself: the script is sourced as the help says, and the function that it binds is asked."""
    beside_python = str(Path(sys.executable).parent)
    script = """
eval "$(lopd completion bash)"
COMP_WORDS=(lopd cache ve) COMP_CWORD=2
_lopd_completion lopd
echo "${COMPREPLY[@]}"
"""
    ran = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": f"{beside_python}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert ran.stdout.strip() == "verify", ran.stderr


def test_without_v_nothing_is_logged_and_with_it_what_is_done_is(tmp_path: Path) -> None:
    script = """
import logging, sys
from common.logs import show_logs
show_logs(int(sys.argv[1]))
for name in ("common.storage", "botocore.auth", "some.library"):
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger(name), level)(f"{name} {level}")
"""
    heard = [
        {" ".join(line.split()[-2:]) for line in scripts.run(script, str(v)).stderr.splitlines()} for v in (0, 1, 2, 3)
    ]
    warnings = {f"{name} warning" for name in ("common.storage", "botocore.auth", "some.library")}
    assert heard[0] == warnings
    assert heard[1] == warnings | {"common.storage info"}
    assert heard[2] == heard[1] | {"common.storage debug", "botocore.auth info", "some.library info"}
    assert heard[3] == heard[2]  # however often: DEBUG of botocore prints the Authorization header


def test_a_claim_is_recorded_and_satisfies_the_rule(
    student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lopd("attest", str(student), "--teacher", str(teacher)) == 0

    assert "attested" in capsys.readouterr().out
    provenance = read_provenance(student)
    assert provenance is not None and provenance.role == "attested"
    assert require_teacher(provenance, identify(teacher, "t"), student="s", allow_mismatch=False) == ()
    assert lopd("attest", str(student), "--teacher", str(teacher)) == 0  # a claim may be made again


def test_a_claim_is_not_silently_turned_into_another(
    student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lopd("attest", str(student), "--teacher", str(teacher)) == 0

    assert lopd("attest", str(student), "--teacher", str(student)) == 64

    assert f"another claim is recorded: fine-tuned on {teacher}" in capsys.readouterr().err
    provenance = read_provenance(student)
    assert provenance is not None and provenance.teacher is not None and provenance.teacher.name == str(teacher)


def test_a_recorded_teacher_is_not_overwritten_by_a_claim(
    student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = write_provenance(student, Provenance(role="sft", teacher=identify(student, "other")))
    assert lopd("attest", str(student), "--teacher", str(teacher)) == 64
    assert "already recorded by its training" in capsys.readouterr().err
    assert read_provenance(student) == recorded


def test_a_claim_about_a_model_at_a_url_lies_at_that_url(
    s3: str, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(student, s3)
    assert lopd("attest", s3, "--teacher", str(teacher)) == 0

    monkeypatch.setenv("LOPD_CACHE_DIR", str(tmp_path / "cache of another machine"))
    provenance = read_provenance(resolve(s3))
    assert provenance is not None and provenance.role == "attested"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["attest", "nowhere", "--teacher", "x"], 64, "there is no such model (nowhere)"),
        (["attest", "org/name", "--teacher", "x"], 64, "a claim cannot be written to the Hub (org/name)"),
        (["attest", "org/name@v1", "--teacher", "x"], 64, "Give a folder or URL"),
        (["attest"], 64, "Missing argument 'MODEL'"),
        (["attest", "x"], 64, "Missing option '--teacher'"),
        (["attest", "x", "--teecher", "y"], 64, "--teacher"),
        (["atest"], 64, "atest"),
        (["--nothing"], 64, "--nothing"),
    ],
)
def test_a_usage_error_is_one_line_on_stderr(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lopd(*arguments) == code

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_a_model_without_config_is_bad_data(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert lopd("attest", str(tmp_path / "empty"), "--teacher", str(teacher)) == 65
    assert capsys.readouterr().err.startswith("error: the model has no config.json")


def test_the_real_command_ends_with_its_code_and_no_traceback(tmp_path: Path) -> None:
    result = scripts.run(LOPD, "attest", str(tmp_path))
    assert result.returncode == 64
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", [UsageError, DataError, StorageError, RetryLater])
def test_our_errors_become_their_line_and_exit_code(kind: type[LopdError], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise kind("it broke", where="here", fix="Do that")

    codes = {UsageError: 64, DataError: 65, StorageError: 74, RetryLater: 75}
    assert cli.guard(fail) == codes[kind]
    assert capsys.readouterr().err == "error: it broke (here). Do that\n"


def test_a_bug_of_ours_is_not_hidden() -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guard(fail)


def test_an_output_that_finds_no_space_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "common.cli", "cache", "ls", str(tmp_path), "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=scripts.ROOT,
        )
    assert ended.returncode == 74
    assert "error: no space left for the output" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["ls", "gc"])
def test_a_folder_that_is_not_there_is_not_one_without_datasets(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lopd("cache", command, str(tmp_path / "none")) == 64
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, click.Abort])
def test_an_interruption_says_that_nothing_is_lost(
    interruption: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise interruption

    assert cli.guard(interrupt) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_a_dataset_is_read_and_help_is_shown_without_torch_or_vllm() -> None:
    files = sorted((scripts.ROOT / "common").rglob("*.py"))
    modules = [".".join(file.relative_to(scripts.ROOT).with_suffix("").parts) for file in files]
    result = scripts.run(LOADED_MODULES, *modules)

    loaded = set(json.loads(result.stdout))
    assert {"common.dataset", "common.cache.verify"} <= loaded
    assert not loaded & {"torch", "transformers", "vllm", "precompute", "trainer"}
