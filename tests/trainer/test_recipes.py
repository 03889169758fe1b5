"""Every recipe parses, says what the paper says, and fits the machine the paper used."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from common.config import load_section
from precompute.config import Generate, Score
from tests.trainer.build import ROOT
from trainer.config import EvalConfig, OpdConfig, SftConfig, TrainConfig
from trainer.memory_plan.device import CUDA_ITSELF, Ranks
from trainer.memory_plan.dry_run import Load, plan_memory

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PAPER = [ROOT / "recipes" / f"qwen3-{scale}.toml" for scale in ("4b", "8b", "30b-a3b")]
STAGES = {
    "sft_data": (Generate, ["model=m", "prompts=p", "cache=c"]),
    "sft": (SftConfig, ["model=m", "data=d", "output=o"]),
    "rollouts": (Generate, ["model=m", "prompts=p", "cache=c"]),
    "score": (Score, ["rollouts=r", "cache=c"]),
    "opd": (OpdConfig, ["model=m", "data=d", "output=o"]),
    "eval": (EvalConfig, ["model=m", "teacher=t", "data=d", "output=o"]),
}
"""What reads each section, and what its command adds."""
DENSE: dict[str, Any] = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MIXTURE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
STUDENTS = {
    "qwen3-4b": lambda: Qwen3Config(**DENSE, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    "qwen3-8b": lambda: Qwen3Config(**DENSE, hidden_size=4096, intermediate_size=12288),
    "qwen3-30b-a3b": lambda: Qwen3MoeConfig(**MIXTURE),
}
"""The config.json of each student, as published."""
H100 = 80 * 10**9


def trained(recipe: Path, stage: str) -> TrainConfig:
    model, words = STAGES[stage]
    config = load_section(model, recipe, stage, words, env={})
    assert isinstance(config, TrainConfig)
    return config


def test_the_papers_three_scales_are_there():
    assert all(recipe in RECIPES for recipe in PAPER)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_section_parses(recipe):
    for stage in tomllib.loads(recipe.read_text()):
        model, words = STAGES[stage]
        assert load_section(model, recipe, stage, words, env={})


@pytest.mark.parametrize("recipe", PAPER, ids=lambda recipe: recipe.stem)
def test_the_numbers_are_the_papers(recipe):
    sft, opd = trained(recipe, "sft"), trained(recipe, "opd")
    assert isinstance(opd, OpdConfig) and (opd.objective, opd.loss_mean) == ("paper", "rollout")
    assert (opd.lr, opd.schedule, opd.warmup, opd.betas, opd.weight_decay) == (2e-6, "constant", 0, (0.9, 0.98), 0.1)
    assert (opd.rows_per_step, opd.max_steps) == (256, 150)
    assert (sft.lr, sft.schedule, sft.warmup, sft.max_steps, sft.token_budget) == (8e-5, "cosine", 0.1, 3000, 16384)


@pytest.mark.parametrize("recipe", PAPER, ids=lambda recipe: recipe.stem)
@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_it_fits_eight_gpus_of_80_gb(recipe, stage, tmp_path):
    architecture = STUDENTS[recipe.stem]()
    architecture.architectures = [type(architecture).__name__.replace("Config", "ForCausalLM")]
    architecture.save_pretrained(tmp_path)
    config = trained(recipe, stage)
    ranks = Ranks(shards=8, here=8, kind="cuda")
    plans = plan_memory(config, tmp_path, ranks, Load(config.token_budget))
    assert plans.device.peak + CUDA_ITSELF < H100
