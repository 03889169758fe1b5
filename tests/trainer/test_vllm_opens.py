"""vLLM opens what the trainer exports, of every architecture, and finds the log-probs of the exported model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from common.lineage import Provenance, identify
from tests.trainer import build
from trainer.batch import pack
from trainer.export import Spec, export
from trainer.header import Header
from trainer.model import load_sharded
from trainer.step import score

TOLERANCE = 2e-3  # nats
SIZES: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 32}
"""Heads of 32, the smallest that vLLM's CPU attention takes."""
SCORE = """
import json, sys
from pathlib import Path
import numpy as np
from precompute.config import Engine as EngineConfig
from precompute.engine.door import Engine
from precompute.engine.requests import ScoreRequest

config = EngineConfig(dtype="float32", max_num_seqs=4, cpu_kv_gib=0.25, compile=False)
engine = Engine(Path(sys.argv[1]), config, max_model_len=64)
rows = [[np.array(ids, np.int32) for ids in row] for row in json.loads(Path(sys.argv[2]).read_text())]
scores = engine.score(ScoreRequest(number, *row, uid=str(number)) for number, row in enumerate(rows))
found = {score.key: score.logprobs.tolist() for score in scores}
Path(sys.argv[2]).write_text(json.dumps([found[number] for number in range(len(rows))]))
"""
"""In a process of its own, for vLLM and the trainer's process group do not share one."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3-moe"])
def test_vllm_scores_an_export_as_the_trainer_does(example, alone, tmp_path, kind):
    source = build.make_kind(tmp_path / "source", kind, **SIZES)
    model = load_sharded(source, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)  # trained: vLLM must not find the weights it began with
    start = identify(source, str(source))
    spec = Spec(Header(1, 0, 1, "m", "s", {}), "float32", Provenance(role="sft"), start, stop_ids=[build.EOS])
    export(model, source, str(tmp_path), alone, spec)
    with torch.no_grad():
        batch = pack(example.rows[:6])
        ours = batch.per_row(score(model, batch, temperature=1.0, chunk=64).chosen)
    theirs = scored_by_vllm(tmp_path / "export", example.rows[:6], tmp_path / "rows.json")
    largest = max(float(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True))
    assert largest <= TOLERANCE
    assert_hub_keys(tmp_path / "export", kind)


def scored_by_vllm(model: Path, rows: Any, file: Path) -> list[np.ndarray]:
    file.write_text(json.dumps([[row.prompt_ids.tolist(), row.completion_ids.tolist()] for row in rows]))
    command = [sys.executable, "-c", SCORE, str(model), str(file)]
    result = subprocess.run(command, env=build.environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [np.array(logprobs, np.float32) for logprobs in json.loads(file.read_text())]


def assert_hub_keys(export: Path, kind: str) -> None:
    """The names that the Hub's own files of this architecture have."""
    with safe_open(export / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) == (kind != "qwen3")  # which is tied
    experts = {name for name in names if ".experts." in name}
    per_expert = {f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(4)}
    assert per_expert <= experts if kind == "qwen3-moe" else not experts
