"""However a model is shared out over ranks, its gradient is that of the whole model on one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UsageError
from tests.trainer import build
from tests.trainer.parallel_ranks import PLAIN, gradient_of, gradients
from tests.trainer.test_cli import refused
from trainer.batch import pack
from trainer.model import load_plain, load_sharded
from trainer.world import joined

KINDS = ["llama", "qwen3", "qwen3-moe"]


def unsharded(folder: Path, rows: list[Any]) -> dict[str, torch.Tensor]:
    """The gradient of -mean log-prob of the completion tokens by transformers alone, a row at a time."""
    total = sum(len(row.completion_ids) for row in rows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in rows:
        prompt, ids = (torch.from_numpy(column).long() for column in (row.prompt_ids, row.completion_ids))
        logits = model(torch.cat([prompt, ids])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        (-logits.log_softmax(-1).gather(-1, ids[:, None]).sum() / total).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=2e-6, rtol=1e-4, msg=name)


def on_ranks(folder: Path, ranks: int, ways: list[tuple[str, Path, str, dict[str, Any], int]]) -> dict[str, Any]:
    """What parallel_ranks finds for each way, by its name."""
    cases, result = folder / "ways.json", folder / "result"
    cases.write_text(json.dumps([[name, str(model), *rest] for name, model, *rest in ways]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(build.ROOT / "tests/trainer/parallel_ranks.py"), str(cases), str(result)]
    subprocess.run([*launch, *script], env=build.environment(), check=True)
    return torch.load(result)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_has_the_gradient_of_the_plain_model(example, alone, tmp_path, kind):
    folder = build.make_kind(tmp_path / "model", kind)
    agree(gradients(alone, str(folder), example.scored, {}), unsharded(folder, example.rows[:8]))


@pytest.mark.parametrize("kind", build.KINDS)
def test_buffers_arrive_though_no_state_dict_has_them(alone, tmp_path, kind):
    folder = build.make_kind(tmp_path / "model", kind, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ours = dict(load_sharded(folder, alone, **PLAIN).named_buffers())
    theirs = dict(load_plain(folder, dtype=torch.float32, attention="sdpa").named_buffers())
    assert ours.keys() == theirs.keys() and len(theirs) > 0
    assert all(torch.equal(ours[name], expected) for name, expected in theirs.items())


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_the_plain_model_sharded_or_replicated(example, alone, tmp_path):
    folders = {kind: build.make_kind(tmp_path / kind, kind) for kind in KINDS}
    ways: list[tuple[str, Path, str, dict[str, Any], int]] = [
        (f"{kind} x{replicas}", folder, example.scored, {}, replicas)
        for kind, folder in folders.items()
        for replicas in (1, 2)
    ]
    lora = {"lora": {"rank": 3, "alpha": 6}}
    ways.append(("lora", folders["qwen3"], example.scored, lora, 1))
    found = on_ranks(tmp_path, 2, ways)
    for kind, folder in folders.items():
        truth = unsharded(folder, example.rows[:8])
        agree(found[f"{kind} x1"], truth)
        agree(found[f"{kind} x2"], truth)
    agree(found["lora"], gradients(alone, str(folders["qwen3"]), example.scored, lora))


@pytest.mark.slow
def test_two_replicas_of_two_ranks_have_the_gradient_of_one(example, tmp_path):
    folder = build.make_kind(tmp_path / "model", "qwen3-moe")
    found = on_ranks(tmp_path, 4, [("2x2", folder, example.scored, {}, 2)])
    agree(found["2x2"], unsharded(folder, example.rows[:8]))


def test_offload_to_the_host_is_refused_where_the_model_is_there_already(example, alone):
    with pytest.raises(UsageError, match="cpu_offload=true, but this run is on CPUs"):
        load_sharded(example.student, alone, **PLAIN, cpu_offload=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_to_the_host_changes_no_gradient(example):
    with joined("cuda") as world:
        ours = load_sharded(example.student, world, **PLAIN, cpu_offload=True)
        assert {weight.device.type for weight in ours.parameters()} == {"cpu"}
        assert {buffer.device.type for buffer in ours.buffers()} == {"cuda"}
        batches = [pack(example.rows[:8]).to(world.device)]
        offloaded = gradient_of(ours, batches, world)
        plain = gradient_of(load_sharded(example.student, world, **PLAIN), batches, world)
    agree({name: weight.cpu() for name, weight in offloaded.items()}, {n: weight.cpu() for n, weight in plain.items()})


def test_ranks_that_the_replicas_do_not_divide_are_one_line(example, tmp_path):
    words = [f"model={example.student}", f"data={example.sft}", f"output={tmp_path}", "replicas=2"]
    refused(build.run_trainer("sft", *words), 64, "1 ranks cannot be shared out among 2 replicas")
