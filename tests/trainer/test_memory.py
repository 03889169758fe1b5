"""The memory plan says beforehand what torch allocates afterwards, and refuses what cannot fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from common.errors import DataError, UsageError
from common.models import publish, resolve_config
from tests.trainer import build
from trainer.cli import group, settings_from
from trainer.config import OpdConfig
from trainer.inputs import topk_of
from trainer.memory_plan.activations import measure
from trainer.memory_plan.device import Ranks, sharded, weights_of
from trainer.memory_plan.dry_run import Load, plan_memory
from trainer.memory_plan.host import bytes_of
from trainer.model import skeleton

TOO_LOW, TOO_HIGH = 0.9, 1.3
"""Plan over measurement: a run that dies for want of memory costs more than a machine that is a little too large."""
TOKENS = 1024
SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
ARCHITECTURES = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=16000, num_hidden_layers=8, tie_word_embeddings=True, **SHAPE)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=16000, num_hidden_layers=8, **SHAPE)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=8000,
            num_hidden_layers=4,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=256,
            **SHAPE,
        )
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A random model of each architecture, 20 to 30 million weights."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ARCHITECTURES}
    for name, folder in folders.items():
        ARCHITECTURES[name]().save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def configured(tmp_path_factory) -> Path:
    """A model of which there is nothing but its config.json."""
    folder = tmp_path_factory.mktemp("configured")
    Qwen3Config(architectures=["Qwen3ForCausalLM"], vocab_size=16000, num_hidden_layers=8, **SHAPE).save_pretrained(
        folder
    )
    return folder


def settings(folder: Path, *words: str) -> OpdConfig:
    return settings_from(OpdConfig, "opd", [f"model={folder}", "data=-", "output=-", *words])


def planned(folder: Path, words: list[str], ranks: int, kind: str = "cpu") -> int:
    config = settings(folder, *words)
    where = Ranks(shards=ranks // config.replicas, here=ranks, kind=kind)
    return plan_memory(config, folder, where, Load(2 * config.token_budget)).device.peak


def measured(folder: Path, words: list[str], ranks: int, device: str = "cpu") -> int:
    """Bytes. With several ranks the least of three runs: what a thread of gloo's releases late, or where no record sees
    it, counts as still there, so that every run is an upper bound, and the machine's load decides how close."""
    return min(measured_once(folder, words, ranks, device) for _ in range(3 if ranks > 1 else 1))


def measured_once(folder: Path, words: list[str], ranks: int, device: str) -> int:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "tests.trainer.peaks", str(folder), device, *words]
    result = subprocess.run(command, env=build.environment(), cwd=build.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["peak"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("qwen3-tied", 1, []),
        ("qwen3-tied", 1, ["activation_checkpointing=true"]),
        ("qwen3-tied", 1, ["attention=eager"]),
        ("qwen3-tied", 1, ["lora.rank=8"]),
        ("qwen3-moe", 1, ["activation_checkpointing=true", "logits_chunk=64"]),
        ("llama", 1, ["compute=float32"]),
        ("llama", 2, ["logits_chunk=64"]),
        ("llama", 2, ["activation_checkpointing=true"]),
    ],
)
def test_the_plan_is_what_torch_allocates(models, name, ranks, words):
    if any(word.startswith("lora") for word in words):
        pytest.importorskip("peft")
    words = [f"token_budget={TOKENS}", "logits_chunk=256", *words]
    ratio = planned(models[name], words, ranks) / measured(models[name], words, ranks)
    assert TOO_LOW < ratio < TOO_HIGH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-moe"])
@pytest.mark.parametrize("words", [[], ["activation_checkpointing=true"]])
def test_the_plan_is_what_cuda_allocates(models, name, words):
    words = ["token_budget=16384", "attention=varlen", *words]
    ratio = planned(models[name], words, 1, "cuda") / measured(models[name], words, 1, "cuda")
    assert TOO_LOW < ratio < TOO_HIGH


def test_checkpointing_keeps_the_input_of_a_layer_and_a_square_mask_is_counted(configured):
    rows = measure(configured, tokens=TOKENS, compute="bfloat16", attention="varlen")
    square = measure(configured, tokens=TOKENS, compute="bfloat16", attention="eager")
    assert len(rows.layers) == 8
    assert all(layer.entry == TOKENS * 384 * 2 for layer in rows.layers)
    assert rows.mask == 0 and square.mask == TOKENS**2 * 2
    probabilities = 6 * TOKENS**2 * 2
    assert square.layers[0].kept > rows.layers[0].kept + probabilities


def test_what_a_layer_keeps_grows_with_the_tokens_and_no_faster(configured):
    once, twice = (measure(configured, tokens=n * TOKENS, compute="bfloat16", attention="sdpa") for n in (1, 2))
    assert twice.layers[0].kept == pytest.approx(2 * once.layers[0].kept, rel=0.01)


def test_the_shards_of_all_ranks_are_the_model_and_rank_0_has_the_fullest(configured):
    weights = weights_of(skeleton(configured, dtype=torch.float32, attention="sdpa"))
    whole = sum(each.count for each in weights.all)
    assert sum(sharded(each, 1) for each in weights.all) == whole
    assert whole / 8 <= sum(sharded(each, 8) for each in weights.all) < whole / 8 * 1.01


def test_more_ranks_offload_and_adapters_take_less(configured):
    budget = [f"token_budget={TOKENS}"]
    alone = planned(configured, budget, 1, "cuda")
    assert planned(configured, budget, 8, "cuda") < alone
    assert planned(configured, [*budget, "cpu_offload=true"], 1, "cuda") < alone
    assert planned(configured, [*budget, "replicas=2"], 8, "cuda") > planned(configured, budget, 8, "cuda")
    pytest.importorskip("peft")
    assert planned(configured, [*budget, "lora.rank=8"], 1, "cuda") < alone


def dry_run(*words: str) -> Result:
    return CliRunner().invoke(group, ["opd", *words, "--dry-run"])


def test_a_plan_for_eight_ranks_needs_neither_ranks_nor_weights_nor_a_dataset(configured):
    words = [f"model={configured}", "token_budget=2048", "--dry-run", "--device-memory", "80GiB"]
    result = build.run_trainer("opd", *words, ranks=8)
    assert result.returncode == 0, result.stderr
    assert "a rank of 8" in result.stdout and "optimizer moments" in result.stdout and "It fits." in result.stdout
    assert list(configured.iterdir()) == [configured / "config.json"]


@pytest.mark.slow
def test_of_a_model_on_s3_only_its_config_is_fetched(example, s3):
    publish(example.student, f"{s3}/student")
    assert [file.name for file in resolve_config(f"{s3}/student").iterdir()] == ["config.json"]
    with pytest.raises(DataError, match="no config.json"):
        resolve_config(f"{s3}/nothing")


def test_what_cannot_fit_is_refused_with_the_largest_item_and_the_setting(configured):
    error = dry_run(f"model={configured}", "token_budget=262144", "--device-memory", "8GiB").exception
    assert isinstance(error, UsageError) and "and has 8.0 GiB" in error.what
    assert "activations take" in error.where and error.fix.startswith("Take activation_checkpointing=true")


def test_a_host_that_is_too_small_is_refused(configured):
    error = dry_run(f"model={configured}", "--device-memory", "80GiB", "--host-memory", "1GiB").exception
    assert isinstance(error, UsageError) and error.what.startswith("the host needs")


def test_a_plan_without_a_dataset_says_what_it_takes_auto_for(configured):
    assert "objective: importance. With `data=`" in dry_run(f"model={configured}", "device=cpu").output


def test_a_plan_with_a_dataset_says_its_steps_and_is_stricter(example):
    words = [f"model={example.student}", f"data={example.scored}"]
    result = dry_run(*words, "token_budget=90", "rows_per_step=7")
    assert "24 rows, 0 held out" in result.output and "4 steps, 1.0 epochs" in result.output
    assert f"objective: topk, reverse KL over {build.TOPK} of {build.TOPK} stored" in result.output
    assert result.output.endswith("It fits.\n")
    error = dry_run(*words, "token_budget=10").exception
    assert isinstance(error, DataError) and "do not fit token_budget=10" in error.what


def test_a_plan_refuses_more_topk_than_is_stored_and_counts_all_that_is(example):
    words = [f"model={example.student}", f"data={example.scored}", "token_budget=90", "objective=topk"]
    error = dry_run(*words, "topk=99").exception
    assert isinstance(error, UsageError) and "asks for 99 teacher log-probs a token" in error.what
    config = settings(example.student, "objective=topk")
    assert topk_of(config, stored=4) == 4 and topk_of(settings(example.student), stored=4) == 0
    where = Ranks(shards=1, here=1, kind="cpu")
    none, four = (plan_memory(config, example.student, where, Load(1000, topk)).device for topk in (0, 4))
    assert four.total("update") - none.total("update") == 1000 * 4 * 12


def test_replicas_that_do_not_divide_the_ranks_are_told_what_to_do(configured):
    error = dry_run(f"model={configured}", "replicas=2").exception
    assert isinstance(error, UsageError) and "Set replicas to a divisor of 1" in error.fix


def test_memory_of_another_machine_is_only_planned_for(configured):
    words = ["opd", f"model={configured}", "data=d", "output=o", "--device-memory", "80GiB"]
    error = CliRunner().invoke(group, words).exception
    assert isinstance(error, UsageError) and "Give --dry-run too" in error.fix


@pytest.mark.parametrize(("text", "count"), [("80GiB", 80 << 30), ("80G", 80 << 30), ("1.5TB", 1500 * 10**9)])
def test_amounts_of_memory(text, count):
    assert bytes_of(text) == count


def test_an_amount_without_a_unit_is_refused():
    with pytest.raises(UsageError, match="'80' is no amount of memory. Write it as 80GiB"):
        bytes_of("80")
