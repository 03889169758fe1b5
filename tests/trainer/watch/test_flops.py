import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.trainer import build
from trainer.batch import pack
from trainer.watch.flops import Cost, cost_of, peak_by_name, peak_memory, row_lengths, work_of


def test_the_cost_of_a_token_is_six_operations_for_each_weight_it_meets(example):
    model = build.open_model(example.teacher)
    cost = cost_of(model)
    matrices = 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 64  # q, o whole; k, v of half the heads; gate, up, down
    assert cost.token == 6 * 2 * matrices
    assert cost.prediction == 6 * 32 * build.VOCAB, "the tied embedding counts once, as head"
    assert cost.pair == 12 * 32 and cost.windows == (None, None)


def test_the_formula_counts_what_torch_counts(example):
    """The forward pass of a row, a third of the whole, by torch's own counter, which knows no causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = build.open_model(example.teacher), 16
    model.set_attn_implementation("eager")
    cost = cost_of(model)
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    square = Cost(cost.token, cost.prediction, 0.0, ()).of(torch.tensor([tokens]), tokens)
    assert counted.get_total_flops() == pytest.approx((square + 2 * cost.pair * tokens**2) / 3, rel=0.01)


def test_frozen_weights_cost_no_gradient_of_their_own(example):
    model = build.open_model(example.teacher)
    whole = cost_of(model).token
    for weight in model.parameters():
        weight.requires_grad_(False)
    assert cost_of(model).token == pytest.approx(whole * 4 / 6)


def test_of_a_mixture_only_the_active_experts_count():
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    config.head_dim = 8
    attention, router, expert = 4 * 32 * 32, 8 * 32, 3 * 32 * 16
    assert cost_of(Qwen3MoeForCausalLM(config)).token == 6 * (attention + router + 2 * expert)


def test_attention_is_counted_row_by_row_and_within_its_window():
    cost = Cost(token=0.0, prediction=0.0, pair=1.0, windows=(None, 4))
    by_hand = sum(min(seen, window) for n in (3, 10) for window in (math.inf, 4) for seen in range(1, n + 1))
    assert cost.of(torch.tensor([3, 10]), 0) == by_hand


def test_sliding_layers_are_known_by_the_config():
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 8
    with torch.device("meta"):
        assert cost_of(LlamaForCausalLM(config)).windows == (None, 8)


def test_rows_and_bins_are_counted_and_the_idle_token_is_not(example):
    rows, cost = example.rows[:3], Cost(1.0, 100.0, 0.0, ())
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    batches = [pack(rows[:2]), pack(rows[2:]), pack([])]
    assert row_lengths(batches[0]).tolist() == lengths[:2]
    predictions = sum(len(row.completion_ids) for row in rows)
    flops = sum(lengths) + 100 * predictions
    assert work_of(batches, cost) == {"processed": sum(lengths), "bins": 2, "flops": flops}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A3000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all(name, peak):
    assert peak_by_name(name) == peak


def test_the_memory_of_a_process_is_in_bytes():
    assert 50e6 < peak_memory(torch.device("cpu")) < 1e12
