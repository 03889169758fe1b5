"""Runs of the trainer on the example: their settings, their course, and processes that are watched and killed."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.trainer import build
from trainer.config import OpdConfig

LASTING = ("loss", "kl/teacher_k1", "ratio/max", "entropy", "optim/lr", "data/tokens")
"""Metrics that do not depend on the clock."""


def config(example: Any, output: Path | str, **settings: Any) -> OpdConfig:
    """Six steps with a checkpoint after every second one."""
    defaults = {
        "model": str(example.student),
        "data": example.scored,
        "output": str(output),
        "compute": "float32",
        "rows_per_step": 7,
        "token_budget": 90,
        "max_steps": 6,
        "lr": 1e-3,
        "save_every": 2,
        "export_dtype": "float32",
    }
    return OpdConfig(**{**defaults, **settings})


def words(settings: OpdConfig) -> list[str]:
    """The settings as the command line takes them."""
    values = settings.model_dump(exclude_unset=True).items()
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values]


def course(output: Path) -> list[list[float]]:
    """Step and lasting metrics, line by line."""
    return course_of(build.read_metrics(output))


def course_of(records: list[dict[str, Any]]) -> list[list[float]]:
    return [[record[key] for key in ("step", *LASTING)] for record in records]


def saved_steps(output: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(marker.parent.name[5:]) for marker in output.glob("checkpoints/step-*/.metadata"))


def quiet(line: str) -> None:
    pass


@contextmanager
def started(
    settings: OpdConfig, *, ranks: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A run in a session of its own, with its stderr to read; whatever is left of it is killed at the end."""
    process = subprocess.Popen(
        build.trainer_command("opd", *words(settings), ranks=ranks),
        env={**build.environment(), **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def await_step(process: "subprocess.Popen[str]", step: int) -> None:
    """Return when the line of that step, or of one after it, is read; the process must not end before."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        if (told := re.match(r"step (\d+)/", line)) and int(told[1]) >= step:
            return
        said.append(line)
    raise AssertionError(f"it ended before step {step}:\n{''.join(said)}")


def kill(process: "subprocess.Popen[str]") -> None:
    """End the launcher and its ranks, which have sessions of their own, by SIGKILL: none may yet save or write."""
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        launcher.suspend()  # it may start no further rank meanwhile
        family = [launcher, *launcher.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
