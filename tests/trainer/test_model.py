"""What a model must be before its log-probs may be trusted; each refusal is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig

from common.errors import DataError, UsageError
from tests.trainer import build
from tests.trainer.test_cli import refused
from trainer import architectures, model
from trainer.architectures import require_attention
from trainer.model import load_plain, load_sharded


@pytest.fixture
def folder(tmp_path) -> Path:
    return build.make_model(tmp_path / "model", tied=False)


def alter_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights by name, `__` for dots; None deletes."""
    file = folder / "model.safetensors"
    weights: dict[str, Any] = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, file, {"format": "pt"})


def alter_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def load(folder: Path, attention: str = "sdpa") -> model.PreTrainedModel:
    return load_plain(folder, dtype=torch.float32, attention=attention)


def test_a_missing_weight_is_named_and_not_made_up(folder):
    alter_weights(folder, lm_head__weight=None, model__norm__weight=None)
    with pytest.raises(DataError, match=r"2 weights are missing, first lm_head.weight"):
        load(folder)


def test_a_tied_head_is_not_missing(tmp_path):
    folder = build.make_model(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)


def test_a_weight_of_another_shape_is_named(folder):
    alter_weights(folder, model__norm__weight=torch.ones(31))
    with pytest.raises(DataError, match=r"first model.norm.weight: \(31,\) in the file, \(32,\) by the config"):
        load(folder)


def test_torn_weights_are_one_line(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match="cannot open the model"):
        load(folder)


def test_pickled_weights_are_not_opened(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot open the model"):
        load(folder)


def test_code_beside_the_weights_never_runs(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    alter_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(DataError):
        load(folder)
    assert not (folder / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without flash attention")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_an_absent_attention_backend_is_told_before_anything_is_loaded(alone, tmp_path, attention):
    with pytest.raises(UsageError, match=f"attention={attention} needs the package .* attention=sdpa"):
        load_sharded(tmp_path / "none", alone, compute="float32", attention=attention, checkpoint_activations=False)


def test_the_attention_of_the_recipes_is_refused_on_cpus_and_in_float32(alone, tmp_path):
    with pytest.raises(UsageError, match="attention=varlen needs a CUDA device. Set attention=sdpa"):
        load_sharded(tmp_path / "none", alone, compute="bfloat16", attention="varlen", checkpoint_activations=False)
    with pytest.raises(UsageError, match="attention=varlen does not take compute=float32"):
        require_attention("varlen", "cuda", "float32")
    require_attention("varlen", "cuda", "bfloat16")
    require_attention("sdpa", "cpu", "float32")


@pytest.mark.slow
def test_two_ranks_are_told_alike_of_weights_only_one_reads(example, tmp_path):
    source = build.make_model(tmp_path / "model")
    alter_weights(source, model__norm__weight=None)
    words = [f"model={source}", f"data={example.sft}", f"output={tmp_path / 'out'}", "token_budget=90"]
    refused(build.run_trainer("sft", *words, ranks=2), 65, "weights are missing")


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention", "conv"])
def test_layers_that_would_see_the_row_before_are_refused(folder, kind):
    alter_config(folder, model_type="qwen3", layer_types=["full_attention", kind])
    with pytest.raises(DataError, match=f"models with {kind} layers are not supported"):
        load(folder)


UNPACKABLE = (
    "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma", "rwkv",
    "xlstm", "nemotron_h", "kimi_linear", "qwen3_next", "olmo_hybrid", "minimax",
)  # fmt: skip
PACKABLE = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "mistral", "phi3", "olmo2", "smollm3", "gpt_oss")


@pytest.mark.parametrize("kind", [*UNPACKABLE, *PACKABLE])
def test_architectures_are_told_apart_by_their_layers(tmp_path, kind):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    if kind in PACKABLE:
        architectures.require_packable(config, tmp_path)
    else:
        with pytest.raises(DataError, match="packed rows would see one another"):
            architectures.require_packable(config, tmp_path)


@pytest.mark.parametrize("key", ["lm_head_multiplier", "final_logit_softcapping"])
def test_logits_that_are_more_than_a_linear_head_are_refused(folder, key):
    alter_config(folder, **{key: 1.0})
    load(folder)
    alter_config(folder, **{key: 0.5})
    with pytest.raises(DataError, match=f"models with {key} are not supported"):
        load(folder)


def test_a_wrong_backend_is_one_line_for_the_user(example, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without flash attention")
    words = [f"model={example.teacher}", f"data={example.sft}", f"output={tmp_path}", "attention=flash_attention_2"]
    refused(build.run_trainer("sft", *words), 64, "needs the package flash-attn")
