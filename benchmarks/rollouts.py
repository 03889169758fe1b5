"""The real rollouts that are measured: SmolLM2-135M-Instruct on HumanEval, sampled and graded by our own commands.

Nothing is trained from them, so any second network may grade: the model's own copy without six layers, which costs no
download and makes the two log-prob columns those of two networks, as they are in a run.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np

from common.dataset import Dataset, is_finished
from common.errors import LopdError
from common.schema import Rollout, to_rows

SAMPLES, MAX_TOKENS, TOPK, SEED = 4, 256, 16, 7
REMOVED_LAYERS = range(12, 18)
ENGINE = ("engine.max_num_seqs=128", "engine.cpu_kv_gib=1.0")


class DataFailed(LopdError):
    """`lopd precompute` could not make the rollouts; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__("the rollouts to measure could not be made", fix="See above; the same command resumes")
        self.exit_code = code


def scored_rollouts(root: Path) -> str:
    """URL of the scored dataset under `root`, made on first use: about seven minutes on two CPU cores."""
    scored = root / "cache" / "scored"
    if not is_finished(str(scored)):
        _make(root)
    return str(scored)


def _make(root: Path) -> None:
    from recipes.demo.models import build_teacher, prune_layers
    from recipes.demo.prompts import write_prompts

    model, pruned = root / "models" / "smollm2", root / "models" / "pruned"
    if not (pruned / "config.json").exists():
        build_teacher(model)
        prune_layers(model, pruned, REMOVED_LAYERS)
    prompts = root / "prompts"
    prompts.mkdir(parents=True, exist_ok=True)
    write_prompts(prompts / "a.jsonl", prompts / "b.jsonl", held_out_every=2)
    words = ["--model", model, "--prompts", prompts, "--samples", SAMPLES, "--max-tokens", MAX_TOKENS, "--seed", SEED]
    words += ["--teacher", pruned, "--topk", TOPK, "--allow-teacher-mismatch", "--cache", root / "cache"]
    words += [word for value in ENGINE for phase in ("rollouts", "score") for word in ("--set", f"{phase}.{value}")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "common.cli", "precompute", "run", *map(str, words)]
    code = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1]).returncode
    if code:
        raise DataFailed(code)


def read_all(dataset: Dataset) -> list[Rollout]:
    """Every row of the dataset, in memory."""
    return [row for shard in range(dataset.num_shards) for row in to_rows(dataset.read_shard(shard))]


def tiled(rows: Sequence[Rollout], tokens: int) -> Iterator[Rollout]:
    """The rows over and over, until `tokens` completion tokens are there; each has a uid and arrays of its own."""
    held = 0
    for copy in count():
        for row in rows:
            if held >= tokens:
                return
            arrays = {name: value.copy() for name, value in vars(row).items() if isinstance(value, np.ndarray)}
            yield replace(row, uid=f"{row.uid}~{copy}", **arrays)
            held += len(row.completion_ids)
