"""The processes of a run: a worker fills one dataset and ends, a reader reads one and ends, unless they are killed."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import LopdError
from tests.chaos import naive, ours
from tests.chaos.content import Round

WRITERS = {"ours": ours, "naive": naive}
INTERRUPTED = 130


@dataclass(frozen=True)
class Task:
    """What one process shall do, and where it says what came of it."""

    role: str
    """`write` or `read`."""
    writer: str
    place: Round
    tag: int
    """The process's own number, from 1; its noise."""
    pace: float
    """Seconds of work in a shard."""
    environment: Mapping[str, str]
    folder: Path
    """The run's own; `<tag>.log` in it is the process's stderr, `<tag>.jsonl` what it did or read."""

    @property
    def log(self) -> Path:
        return self.folder / f"{self.tag}.log"

    @property
    def said(self) -> Path:
        return self.folder / f"{self.tag}.jsonl"


def main(task: Task) -> None:
    """Do the task; the exit code is that of our errors, or 1 with a traceback for what is none of ours."""
    with open(task.log, "wb") as log:
        os.dup2(log.fileno(), 2)
    os.environ.update(task.environment)
    try:
        _write(task) if task.role == "write" else _read(task)
    except LopdError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _write(task: Task) -> None:
    pin = WRITERS[task.writer].write(task.place, task.tag, task.pace)
    _say(task, {"round": task.place.number, "pin": pin})


def _read(task: Task) -> None:
    pin, read = WRITERS[task.writer].reader(task.place)
    _say(task, {"round": task.place.number, "pin": pin})
    for shard in range(task.place.shards):
        try:
            verdict = task.place.judge(shard, read(shard)).value
        except LopdError as error:
            verdict = "refused"
            sys.stderr.write(f"refused: {error}\n")
        _say(task, {"round": task.place.number, "shard": shard, "verdict": verdict})


def _say(task: Task, what: Mapping[str, object]) -> None:
    """One line, written at once, so that it outlives the process."""
    with open(task.said, "a") as file:
        file.write(json.dumps(what) + "\n")
