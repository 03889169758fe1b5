"""Architectures that compute as transformers does train; others are refused before any work, by their type."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    FalconConfig,
    PhimoeConfig,
    PreTrainedConfig,
    StableLmConfig,
)

from common.errors import DataError
from tests.trainer import build
from trainer import self_test
from trainer.model import load_sharded
from trainer.self_test import prove_forward
from trainer.world import World, joined

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "initializer_range": 0.3,  # with transformers' small default all logits are nearly alike
}
SUPPORTED: dict[str, PreTrainedConfig] = {
    "phimoe": PhimoeConfig(**SIZES, num_key_value_heads=2, sliding_window=5),  # its window is in the mask alone
    "biogpt": BioGptConfig(**SIZES),  # dropout by names of its own
}
OTHERS: dict[str, tuple[PreTrainedConfig, str]] = {
    "stablelm": (StableLmConfig(**SIZES, num_key_value_heads=2), "sdpa"),  # keeps the rows' bounds to itself
    "bloom": (
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
        "eager",
    ),  # knows no positions
    "falcon": (FalconConfig(**SIZES), "sdpa"),  # leaves its attention to nobody
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with joined("cpu") as world:
        yield world


def prove(folder: Path, world: World, attention: str = "sdpa") -> float:
    model = load_sharded(folder, world, compute="float32", attention=attention, checkpoint_activations=False)
    return prove_forward(model, world, compute=torch.float32)


@pytest.mark.parametrize("kind", build.KINDS)
def test_supported_architectures_pass(tmp_path, world, kind):
    assert prove(build.make_kind(tmp_path, kind), world) < 1e-5


@pytest.mark.parametrize("kind", SUPPORTED)
def test_windows_and_noise_of_another_make_pass(tmp_path, world, kind):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SUPPORTED[kind]).save_pretrained(tmp_path)
    assert prove(tmp_path, world) < 1e-5


@pytest.mark.parametrize("kind", OTHERS)
def test_an_architecture_that_would_train_on_wrong_numbers_is_refused(tmp_path, world, kind):
    torch.manual_seed(0)
    config, attention = OTHERS[kind]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="are not supported|is not told|cannot build"):
        prove(tmp_path, world, attention)


def test_the_refusal_names_the_setting_and_not_all_that_torch_says(tmp_path, world, monkeypatch):
    lengthy = "Could not run 'aten::f' with arguments from the 'CPU' backend. This could be because of many things."
    monkeypatch.setattr(self_test, "_packed", lambda model, rows: unsupported(lengthy))
    with pytest.raises(DataError, match=r"type qwen3 .* attention=sdpa: .* packed rows: Could not run .*") as error:
        prove(build.make_kind(tmp_path, "qwen3"), world)
    assert "could be because" not in str(error.value)


def unsupported(what: str) -> torch.Tensor:
    raise NotImplementedError(what)


def test_rows_that_see_one_another_are_noticed(tmp_path, world, monkeypatch):
    """transformers' own words for it: positions that run on are one row."""
    monkeypatch.setattr(self_test, "_packed", lambda model, rows: leaking(model, torch.cat(rows, 1)))
    with pytest.raises(DataError, match="differ from each row alone"):
        prove(build.make_kind(tmp_path, "qwen3"), world)


def leaking(model, ids: torch.Tensor) -> torch.Tensor:
    places = torch.arange(ids.shape[1])
    first = torch.arange(self_test.ROW - 1)
    predictors = torch.cat([first, first + self_test.ROW])
    none = predictors.new_empty((len(predictors), 0))
    return model(ids, places[None], predictors=predictors, targets=ids[0, predictors + 1], topk_ids=none).chosen
