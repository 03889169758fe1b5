"""`python -m benchmarks.precompute`: our rollouts and scores beside the bare engine, the usual recipe and transformers.

All sides run here, on the same requests. benchmarks/README.md says how each figure is taken.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import processor
from benchmarks.precompute.sides import ALWAYS, FORWARDS, GROWING, Bench, Row, Task, measure, require_same_work, url_of
from benchmarks.precompute.tables import say_tables
from benchmarks.precompute.work import Extent, sampling_of, to_sample, to_score, write_prompt_file
from benchmarks.s3 import s3_server
from common.cli import run
from common.errors import UsageError
from precompute.config import Engine
from precompute.engine.vllm_settings import engine_version, usual_window

ROOT = Path("runs/bench")
ON_CPU = Extent(Engine(dtype="bfloat16", max_num_seqs=16, cpu_kv_gib=0.25), rows=48, tokens=64, prompt_characters=240)
ON_GPU = Extent(Engine(dtype="bfloat16"), rows=1024, tokens=512, prompt_characters=2000, shard_rows=256, batch=16)
QUICK = replace(
    ON_CPU,
    engine=Engine(dtype="float32", max_num_seqs=8, cpu_kv_gib=0.1),
    **{"rows": 32, "tokens": 32, "prompt_characters": 24, "times": (1, 4), "rounds": 1, "shard_rows": 16},
)
"""With a tiny network: that everything runs, not how fast."""
SEED = 7


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Folder of a model; else SmolLM2-135M.")
@click.option("--rows", type=click.IntRange(min=1), help="Of the smallest run.  [default: 48, on a GPU 1,024]")
@click.option("--tokens", type=click.IntRange(min=1), help="Longest completion.  [default: 64, on a GPU 512]")
@click.option("--rounds", type=click.IntRange(min=1), help="Runs of each side for speed.  [default: 2]")
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Of every side, on a CPU.")
@click.option("--cuda", is_flag=True, help="On this machine's GPU, with vLLM as it is there.")
@click.option("--quick", is_flag=True, help="A tiny network, in minutes: that everything runs, not how fast.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write machine and rows here.")
def precompute(
    model: Path | None, threads: int, cuda: bool, quick: bool, json_file: Path | None, **given: int | None
) -> None:
    """Measure, print the tables, and say which goals are reached."""
    disable_progress_bar()
    _require_device(cuda)
    extent = QUICK if quick else ON_GPU if cuda else ON_CPU
    extent = replace(extent, **{key: value for key, value in given.items() if value is not None})
    if extent.rows <= usual_window(extent.engine):
        fix = f"--rows must be above {usual_window(extent.engine)}"
        raise UsageError(f"{extent.rows} rows are no more than the engine holds at once", fix=fix)
    root = ROOT.absolute()
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix="scratch-") as scratch, s3_server(Path(scratch) / "s3") as bucket:
        folder = model.absolute() if model else _model(root, Path(scratch), quick)
        bench = Bench(folder, Path(scratch), bucket, extent, None if cuda else threads)
        found: dict[str, Any] = {"benchmark": "precompute", "machine": {**_machine(bench), "quick": quick}, "rows": []}
        for label, measure_part in _parts(bench):
            click.echo(label, err=True)
            found["rows"].append(measure_part())
            if json_file is not None:  # after every part: a run of an hour may be broken off
                json_file.parent.mkdir(parents=True, exist_ok=True)
                json_file.write_text(json.dumps(found, indent=1) + "\n")
        for phase, times in {(row["phase"], row["times"]): None for row in found["rows"]}:
            require_same_work([row for row in found["rows"] if (row["phase"], row["times"]) == (phase, times)])
        say_tables(found)


def _parts(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """One run after another: a label, and what makes it. The sides take turns, in the order A B C A B C."""
    extent = bench.extent
    for make in (_to_sample, _to_score):
        for times in sorted({*extent.times, extent.timed}):
            task, timed = make(bench, times), times == extent.timed
            sides = [*(ALWAYS if timed else GROWING), *(FORWARDS if timed and task.sampling is None else ())]
            for turn in range(extent.rounds if timed else 1):
                for side in sides:
                    label = f"{task.phase}, {len(task.requests.rows):,} rows, round {turn + 1}: {side}"
                    yield label, lambda task=task, side=side, turn=turn: measure(bench, task, side, turn)


def _to_sample(bench: Bench, times: int) -> Task:
    extent, sampling = bench.extent, sampling_of(bench.model, bench.extent, SEED)
    file = bench.scratch / f"prompts-{times}.jsonl"
    write_prompt_file(file, times * extent.rows, extent.prompt_characters)
    return Task("rollouts", times, to_sample(bench.model, file, sampling), str(file), sampling)


def _to_score(bench: Bench, times: int) -> Task:
    """The rollouts that ours has just sampled."""
    url = url_of(bench, "rollouts", times)
    return Task("score", times, to_score(url), url, None)


def _require_device(cuda: bool) -> None:
    import torch

    if torch.cuda.is_available() != cuda:
        what, fix = ("no GPU is here", "Leave --cuda out") if cuda else ("a GPU is here", "Write --cuda")
        raise UsageError(what, fix=fix)


def _model(root: Path, scratch: Path, quick: bool) -> Path:
    """SmolLM2-135M-Instruct, made once; with `quick` the tiny network of our tests."""
    if quick:
        from tests.precompute.tiny import make_teacher

        return make_teacher(scratch / "tiny")
    from recipes.demo.models import build_teacher

    model = root / "models" / "smollm2"
    if not (model / "config.json").exists():
        build_teacher(model)
    return model


def _machine(bench: Bench) -> dict[str, Any]:
    import torch

    return {
        **processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": bench.threads,
        "load": os.getloadavg()[0],
        "engine": engine_version(),
        "model": bench.model.name,
        "settings": bench.extent.engine.model_dump(),
        "extent": {key: value for key, value in vars(bench.extent).items() if key != "engine"},
        **{name: version(name) for name in ("torch", "transformers")},
    }


if __name__ == "__main__":
    run(precompute)
