"""Ours and everybody else's on the same requests, one after another, each a command of its own, watched alike."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.precompute.events import VARIABLE, Events, read_events
from benchmarks.precompute.watch import ENGINE, SUPERVISOR, WORKER, Looks, watching
from benchmarks.precompute.work import Extent, Requests
from common.dataset import Dataset, open_dataset
from common.errors import LopdError
from precompute.config import Engine, Sampling
from precompute.engine.vllm_settings import usual_window

Row = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
ALWAYS = OURS, BARE, USUAL = "ours", "bare loop", "usual recipe"
GROWING = (OURS, USUAL)
"""Whose memory is measured at every size."""
FORWARDS = {"transformers, bfloat16": "bfloat16", "transformers, float32": "float32"}
ALIKE_NATS, ALIKE_TOKENS = 0.05, 0.05
"""By how much two sides' mean log-prob, and their share of sampled tokens, may differ if they did the same work."""
SAMPLED_NATS = 12.0
"""Over the square root of the tokens, the former where they are sampled: rounding sends two sides' completions apart,
and a token's log-prob varies by 2 nats or so."""


class SideFailed(LopdError):
    """One side of the comparison ended with an error, or did other work than it was asked for."""


@dataclass(frozen=True)
class Bench:
    """What stays the same for every run."""

    model: Path
    scratch: Path
    bucket: str
    extent: Extent
    threads: int | None
    """Of every side; None leaves it to them, as on a GPU."""


@dataclass(frozen=True)
class Task:
    """What every side is asked for once: to sample, or to score what `source` holds."""

    phase: str
    times: int
    requests: Requests
    source: str
    """The prompts' file, or the URL of the rollouts."""
    sampling: Sampling | None
    """How to sample; None when scoring."""


def measure(bench: Bench, task: Task, side: str, turn: int) -> Row:
    """One run of one side: what it took.

    Raises:
        SideFailed: it ended with an error, or made other requests than it was asked for.
    """
    row = _ours(bench, task, turn) if side == OURS else _peer(bench, task, side)
    return {**row, "round": turn}


def url_of(bench: Bench, phase: str, times: int, turn: int = 0) -> str:
    """Where ours puts what it makes."""
    return f"{bench.bucket}/{phase}-x{times}-{turn}"


def _ours(bench: Bench, task: Task, turn: int) -> Row:
    """Our command, the upload to an S3 server included."""
    url = url_of(bench, task.phase, task.times, turn)
    command = [sys.executable, "-m", "common.cli", *_words(bench, task, url)]
    seen = _run(bench, command, SUPERVISOR)
    dataset = open_dataset(url)
    return _row(bench, task, OURS, seen, dataset.num_tokens, _logprob_sum(dataset))


def _peer(bench: Bench, task: Task, side: str) -> Row:
    """One of the others, which keeps what it makes on this disk, if it keeps it at all."""
    folder = bench.scratch / "peer"
    folder.mkdir()
    job = {
        "kind": {BARE: "bare", USUAL: "usual"}.get(side, "forward"),
        "dtype": FORWARDS.get(side),
        "model": str(bench.model),
        "requests": str(task.requests.save(folder / "requests.npz")),
        "engine": bench.extent.engine.model_dump(),
        "max_model_len": task.requests.longest + 1,
        "sampling": task.sampling.model_dump() if task.sampling else None,
        "batch": bench.extent.batch,
        "output": str(folder / "rows.parquet"),
        "found": str(folder / "found.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    seen = _run(bench, [sys.executable, "-m", "benchmarks.precompute.peer", str(folder / "job.json")], WORKER)
    found = json.loads((folder / "found.json").read_text())
    shutil.rmtree(folder)
    return _row(bench, task, side, seen, task.requests.tokens or seen.events.sampled, found.get("logprob_sum"))


def require_same_work(rows: Sequence[Row]) -> None:
    """Raise unless all sides in `rows`, of one task, did the same work: else their times say nothing.

    Raises:
        SideFailed: one has sampled far more or fewer tokens than ours, or its log-probs are others.
    """
    ours = next(row for row in rows if row["side"] == OURS)
    for row in rows:
        if abs(row["tokens"] / ours["tokens"] - 1) > ALIKE_TOKENS:
            raise SideFailed(f"{row['tokens']} tokens on one side, {ours['tokens']} on ours", where=row["side"])
        alike = ALIKE_NATS if ours["phase"] == "score" else SAMPLED_NATS / math.sqrt(ours["tokens"])
        if row["mean_logprob"] is not None and abs(row["mean_logprob"] - ours["mean_logprob"]) > alike:
            found = f"{row['mean_logprob']:.4f} on one side, {ours['mean_logprob']:.4f} on ours"
            raise SideFailed(f"another mean log-prob: {found}", where=row["side"])


@dataclass(frozen=True)
class _Seen:
    """One command from its start to its end."""

    began: float
    ended: float
    events: Events
    looks: Looks


def _run(bench: Bench, command: list[str], role: str) -> _Seen:
    """Run and watch one side's command, whose own process is `role`."""
    events, log = bench.scratch / "events", bench.scratch / "log"
    events.unlink(missing_ok=True)
    environment = _environment(bench.threads, events)
    with open(log, "wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        try:
            with watching(process.pid, role) as looks:
                code = process.wait()
        finally:
            process.terminate()  # does nothing when it has ended
        ended = time.monotonic()
    found = read_events(events)
    if code or found is None:
        what = f"exit code {code}" if code else "no request was seen on its way to the engine"
        raise SideFailed(what, where=" ".join(command), detail=log.read_text(errors="replace")[-3000:])
    return _Seen(began, ended, found, looks)


def _environment(threads: int | None, events: Path) -> dict[str, str]:
    """The same for every side; the probe's folder stands first, so that Python finds its `sitecustomize`."""
    probe = Path(__file__).parent / "probe"
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    own = {VARIABLE: str(events), "PYTHONPATH": f"{probe}{os.pathsep}{REPOSITORY}"}
    return {**os.environ, **fixed, **own, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


def _words(bench: Bench, task: Task, url: str) -> list[str]:
    """Arguments of `lopd` for one task."""
    extent, sampling = bench.extent, task.sampling
    settings = _engine_settings(extent.engine)
    # One engine, as the others have; the self-test is a cost of starting up.
    settings += ["fleet.replicas=1", "fleet.self_test=false"]
    if sampling is None:
        own = ["score", "--rollouts", task.source, "--teacher", str(bench.model), "--allow-teacher-mismatch"]
    else:
        own = ["rollouts", "--model", str(bench.model), "--prompts", task.source]
        own += ["--max-tokens", str(sampling.max_tokens), "--seed", str(sampling.seed)]
        settings += [f"prompts_per_shard={extent.shard_rows}"]
    return ["precompute", *own, "--cache", url, *(word for setting in settings for word in ("--set", setting))]


def _engine_settings(engine: Engine) -> list[str]:
    """As words of our command, those that are not what they are anyway."""
    changed: Mapping[str, Any] = engine.model_dump(exclude_defaults=True)
    return [
        f"engine.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changed.items()
    ]


def _logprob_sum(dataset: Dataset) -> float:
    """Of what the run was to find: the teacher's log-probs when it scored."""
    column = "teacher_logprobs" if dataset.plan["kind"] == "scored" else "rollout_logprobs"
    tables = (dataset.read_shard(shard, columns=[column]) for shard in range(dataset.num_shards))
    return sum(float(table[column].combine_chunks().flatten().to_numpy().sum(dtype="float64")) for table in tables)


def _row(bench: Bench, task: Task, side: str, seen: _Seen, tokens: int, logprob_sum: float | None) -> Row:
    events, looks, asked = seen.events, seen.looks, len(task.requests.rows)
    if not events.given == len(events.out) == asked:
        what = f"{asked} requests were to be made; {events.given} were, {len(events.out)} came back"
        raise SideFailed(what, where=f"{side}, {task.phase}")
    first, last, workers = events.first_in, events.last_out, (WORKER, ENGINE)
    filling = usual_window(bench.extent.engine)
    warm = events.out[filling - 1][0]
    return {
        "table": "runs",
        "phase": task.phase,
        "side": side,
        "times": task.times,
        "rows": asked,
        "tokens": tokens,
        "mean_logprob": None if logprob_sum is None else logprob_sum / tokens,
        "start_s": first - seen.began,
        "fill_s": warm - first,
        "steady_s": last - warm,
        "steady_tokens": tokens * events.share_after(filling),
        "end_s": seen.ended - last,
        **{f"{role}_cpu_s": looks.cpu_seconds([role], warm, last) for role in (SUPERVISOR, *workers)},
        "whole_cpu_s": looks.cpu_seconds([SUPERVISOR, *workers], seen.began, seen.ended),
        "supervisor_peak_bytes": looks.peak_bytes([SUPERVISOR], seen.began),
        "worker_peak_bytes": looks.peak_bytes(workers, warm),  # later than compilers run, which would hide the rows
        "worker_ready_bytes": looks.bytes_at(workers, first),
    }
