"""The files that start precompute on many boxes: their commands are ours, and what they promise of exit codes holds."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from common import cli
from tests.deploy.shell import ROOT

DEPLOY = ROOT / "deploy"
PLACES = {"MODEL": "s3://bucket/model", "PROMPTS": "p.jsonl", "CACHE": "s3://bucket/run"}


def options(words: list[str]) -> dict[str, Any]:
    """What `lopd <words>` makes of its options; click's own error where it makes nothing of them."""
    command: click.Command = cli.group
    for depth, word in enumerate(words):
        if not isinstance(command, click.Group):
            return command.make_context(word, words[depth:]).params
        found = command.get_command(click.Context(command), word)
        assert found is not None, word
        command = found
    raise AssertionError(words)


def words_of(shell: str, environment: dict[str, str], folder: Path) -> list[str]:
    """The words that a shell gives to `lopd`, which here only notes them."""
    fake(folder, "lopd", 'printf "%s\\n" "$@" > words')
    subprocess.run(["bash", "-euc", shell], env=bare(folder) | environment, cwd=folder, check=True)
    return (folder / "words").read_text().splitlines()


def fake(folder: Path, name: str, script: str) -> None:
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    program = folder / ".venv" / "bin" / name
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)


def bare(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder}/.venv/bin:{os.environ['PATH']}", "HOME": str(folder)}


def document(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def slurm(folder: Path, lopd: str, **further: str) -> "subprocess.Popen[str]":
    """The batch script as Slurm starts it, with stand-ins for `lopd` and `scontrol`."""
    fake(folder, "lopd", f'printf "%s\\n" "$@" > words; {lopd}')
    fake(folder, "scontrol", 'echo "$@" > requeued')
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_JOB_ID": "77"}
    return subprocess.Popen(
        ["bash", str(DEPLOY / "slurm" / "precompute.sbatch"), "--topk", "8"],
        env=bare(folder) | PLACES | task | further,
        cwd=folder,
        text=True,
    )


def test_slurms_command_is_ours(tmp_path: Path) -> None:
    assert slurm(tmp_path, "exit 0").wait(20) == 0
    given = options((tmp_path / "words").read_text().splitlines())
    assert (given["worker_index"], given["worker_count"], given["topk"]) == (2, 4, 8)
    assert given["grace_s"] + 20 < 120  # of the signal before the end of the time
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "restarts", "again"), [(75, "0", True), (75, "20", False), (65, "0", False)])
def test_slurm_begins_again_after_what_passes_and_not_for_ever(
    tmp_path: Path, code: int, restarts: str, again: bool
) -> None:
    assert slurm(tmp_path, f"exit {code}", SLURM_RESTART_COUNT=restarts).wait(20) == code
    assert (tmp_path / "requeued").exists() == again


def test_the_end_of_the_time_is_one_sigterm_and_the_job_goes_on_later(tmp_path: Path) -> None:
    told = "trap 'echo told >> signals; (( $(wc -l < signals) > 1 )) || { sleep 1; exit 143; }' TERM"
    process = slurm(tmp_path, f"{told}; touch ready; while :; do sleep 0.1; done", SLURM_RESTART_COUNT="50")
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # as Slurm does besides, to all processes
    assert process.wait(20) == 143
    assert (tmp_path / "signals").read_text() == "told\n"
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_the_command_of_the_kubernetes_job_is_ours_and_its_numbers_agree(tmp_path: Path) -> None:
    job = document("kubernetes/precompute.yaml")["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert container["command"][:2] == ["sh", "-c"]
    words = words_of(container["command"][2], environment | {"JOB_COMPLETION_INDEX": "3"}, tmp_path)
    given = options(words)
    assert (given["worker_index"], given["worker_count"]) == (3, job["completions"])
    assert given["grace_s"] + 20 < pod["terminationGracePeriodSeconds"]
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    ends = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert [(each["containerName"], each["values"]) for each in ends] == [(container["name"], [64, 65, 74])]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_command_of_the_skypilot_task_is_ours(tmp_path: Path) -> None:
    task = document("skypilot/precompute.yaml")
    given = options(words_of(task["run"], task["envs"] | PLACES, tmp_path))
    assert (given["worker_index"], given["worker_count"], given["cache"]) == (0, 1, PLACES["CACHE"])
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 143]
    assert shlex.split(task["setup"])[:2] == ["make", "setup"]
