"""Our trainer and TRL's on the same rows, one after the other, each in an interpreter and an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.trainer.probes import PHASES
from benchmarks.trainer.rows import make_rows, write_ours, write_peers
from common.errors import LopdError

Row = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
MADE_UP = {"parity": "report", "parity_rows": 1, "allow_teacher_mismatch": True}
"""Settings that let a run of `opd` go on although no model has sampled its rows."""


class SideFailed(LopdError):
    """One side of the comparison ended with an error; it has said which."""


@dataclass(frozen=True)
class Bench:
    """What stays the same for every run."""

    model: Path
    scratch: Path
    device: str
    clock: str
    threads: int
    peer: Path | None
    """The Python of the environment with TRL; None leaves TRL out."""
    compute: str = "bfloat16"


@dataclass(frozen=True)
class Size:
    """How much one run processes: a row a step, so that a step is `length` tokens."""

    length: int
    steps: int
    """Optimizer steps of a run; the first warms up and is not counted."""
    rounds: int = 1
    """Runs of each side, which take turns."""


def compare(bench: Bench, kind: str, size: Size, variants: dict[str, dict[str, Any]]) -> list[Row]:
    """A row for each variant of ours and for TRL, the median over rounds in which the sides take turns."""
    places = _write(bench, kind, size)
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(size.rounds):
        for side in sides(bench, variants):
            job = _job(
                bench, kind, size, places[side != "TRL"], _settings(kind, variants.get(side, {})), f"{side}-{turn}"
            )
            found.setdefault(side, []).append(measure(bench, job, trl=side == "TRL"))
    return [_row(kind, size, side, runs) for side, runs in found.items()]


def sides(bench: Bench, variants: dict[str, dict[str, Any]]) -> list[str]:
    """The sides by name."""
    return [*variants, *(["TRL"] if bench.peer else [])]


def measure(bench: Bench, job: dict[str, Any], *, trl: bool = False) -> dict[str, Any]:
    """Run one side in a process of its own; what it found.

    Raises:
        SideFailed: it ended with an error.
    """
    Path(job["output"]).parent.mkdir(parents=True)
    file = Path(job["output"]).with_name("job.json")
    file.write_text(json.dumps(job))
    python, module = (str(bench.peer), "trl_side") if trl else (sys.executable, "ours")
    command = [python, "-m", f"benchmarks.trainer.{module}", str(file)]
    ran = subprocess.run(command, env=environment(bench.threads), capture_output=True, text=True, cwd=REPOSITORY)
    if ran.returncode:
        raise SideFailed(f"{' '.join(command)} failed", where=job["data"], detail=ran.stderr[-2000:])
    shutil.rmtree(job["output"])  # its checkpoint: dozens of them would fill a disk
    return json.loads(Path(job["found"]).read_text())


def environment(threads: int) -> dict[str, str]:
    """The same for every side: no network, no threads but those counted."""
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {**os.environ, **fixed, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}


def ours_alone(bench: Bench, kind: str, size: Size, settings: dict[str, Any]) -> Row:
    """A row of our step by itself."""
    job = _job(bench, kind, size, _write(bench, kind, size)[True], _settings(kind, settings), "alone")
    return _row(kind, size, "ours", [measure(bench, job)])


def _settings(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """With what rows of made-up log-probs need."""
    return {**settings, "validation_share": 0.0, **(MADE_UP if kind == "opd" else {})}


def _write(bench: Bench, kind: str, size: Size) -> dict[bool, Path]:
    """The rows as our dataset (True) and as a peer's file (False); twice as many as a run reads ahead."""
    folder = _folder(bench, kind, size)
    if not folder.exists():
        folder.mkdir(parents=True)
        rows = make_rows(bench.model, size.length, size.steps + 1)
        write_ours(folder / "ours", rows, bench.model, "scored" if kind == "opd" else kind)
        write_peers(folder / "rows.jsonl", rows)
    return {True: folder / "ours", False: folder / "rows.jsonl"}


def _folder(bench: Bench, kind: str, size: Size) -> Path:
    return bench.scratch / bench.model.name / f"{kind}-{size.length}"


def _job(bench: Bench, kind: str, size: Size, data: Path, settings: dict[str, Any], name: str) -> dict[str, Any]:
    folder = _folder(bench, kind, size) / name.replace(" ", "-")
    return {
        "kind": kind,
        "model": str(bench.model),
        "data": str(data),
        "output": str(folder / "run"),
        "found": str(folder / "found.json"),
        "device": bench.device,
        "clock": bench.clock,
        "length": size.length,
        "steps": size.steps,
        "settings": settings,
    }


def _row(kind: str, size: Size, side: str, runs: list[dict[str, Any]]) -> Row:
    steps = [step for run in runs for step in run["steps"]]
    middle = {phase: median(step[phase] for step in steps) for phase in (*PHASES, "teacher", "step")}
    peak = max(step["peak_bytes"] for step in steps)
    return {
        "table": "versus",
        "kind": kind,
        "side": side,
        "length": size.length,
        "steps": len(steps),
        # A teacher that the other side has not is left out of the time.
        "tokens_per_s": size.length / (middle["step"] - middle["teacher"]),
        "slowest_tokens_per_s": size.length / max(step["step"] - step["teacher"] for step in steps),
        "fastest_tokens_per_s": size.length / min(step["step"] - step["teacher"] for step in steps),
        **{f"{phase}_s": value for phase, value in middle.items()},
        "peak_bytes": peak,
        "above_imports_bytes": peak - max(run["imported_bytes"] for run in runs),
    }


def over_ranks(bench: Bench, kind: str, size: Size, ranks: tuple[int, ...]) -> Iterator[Row]:
    """A row a number of ranks, by the command and its own metrics: tokens a second of all ranks together."""
    data = _write(bench, kind, size)[True]
    for count in ranks:
        folder = bench.scratch / f"{kind}-ranks-{count}"
        # As many rows a step as ranks, so that a rank's share of a step stays the same.
        settings = {
            **{"model": bench.model, "data": data, "output": folder, "device": bench.device},
            **{"token_budget": size.length, "rows_per_step": count, "max_steps": size.steps},
            **_settings(kind, {}),
        }
        words = [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "trainer", "--ranks", str(count), kind, *words]
        threads = max(1, bench.threads // count)
        ran = subprocess.run(command, env=environment(threads), capture_output=True, text=True, cwd=REPOSITORY)
        if ran.returncode:
            raise SideFailed(f"{' '.join(command)} failed", where=str(data), detail=ran.stderr[-2000:])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        speed = median(line["perf/tokens_per_s"] for line in lines[1:])
        yield {"table": "ranks", "kind": kind, "ranks": count, "threads_a_rank": threads, "length": size.length,
               "tokens_per_s": speed}  # fmt: skip
