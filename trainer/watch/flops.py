"""Floating-point operations of a step, and what the device could do: the two sides of MFU.

Counted is what the model needs for the tokens at hand, once, whatever the trainer does beyond that: a multiplication
and an addition for every weight a token meets, twice that again in the backward pass (6 N, Kaplan et al. 2020), and
the products of attention over the pairs of tokens that see each other. The head is counted for completion tokens
alone, for only those have logits here; the causal half of attention alone, for the other half is masked. Recomputed
activations count nothing. So this MFU is lower than one with PaLM's formula (6 N + 12 L H Q T for every token).
"""

import re
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.batch import Batch

PEAK_BF16 = {
    "MI355X": 2.5e15, "MI350X": 2.3e15, "MI325X": 1307e12, "MI300X": 1307e12,
    "GB300": 2.5e15, "GB200": 2.5e15, "B300": 2.25e15, "B200": 2.25e15,
    "H200 NVL": 835e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H800 PCIe": 756e12,
    "GH200": 989e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12, "A10G": 70e12, "RTX A6000": 155e12,
    "L40S": 362e12, "L40": 181e12, "L20": 119.5e12, "L4": 121e12, "RTX 6000 Ada": 364e12,
}  # fmt: skip
"""Dense bfloat16 operations a second with float32 accumulation, by words of the device's name, longer names first.

From the makers' data sheets (nvidia.com/en-us/data-center/<name>, amd.com/en/products/accelerators/instinct), many of
which print twice as much, "with sparsity". GeForce cards are left out: one name stands there for several chips.
"""
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names that architectures give, in their configs, to how many experts a token meets and how many there are."""


@dataclass(frozen=True)
class Cost:
    """What training costs, forward and backward, in floating-point operations."""

    token: float
    """Of a token in the body: 6 for each weight that it meets, 4 where the weight is frozen."""
    prediction: float
    """Of a completion token in the head."""
    pair: float
    """Of a pair of tokens, of which one attends to the other, in one layer."""
    windows: tuple[int | None, ...]
    """Of each layer: how many tokens one attends to at most, None without a bound."""

    def of(self, lengths: Tensor, predictions: int) -> float:
        """Of rows of these lengths, (rows,) int64, of whose tokens `predictions` are trained on."""
        pairs = sum(self.windows.count(window) * _pairs(lengths, window) for window in set(self.windows))
        return self.token * int(lengths.sum()) + self.prediction * predictions + self.pair * pairs


def cost_of(model: PreTrainedModel) -> Cost:
    """The cost of a model, sharded or not, dense or a mixture of experts.

    Attention: 2 products of a query's width for scores and values, 2 operations each, thrice for the backward pass.
    """
    config: Any = model.config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    share = _first(config, ACTIVE_EXPERTS, 1) / _first(config, EXPERTS, 1)
    skipped = {id(weight) for module in (head, embedding) if module is not None for weight in module.parameters()}
    token = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and id(weight) not in skipped:
            token += (share if ".experts." in name else 1.0) * _each(weight)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Cost(
        token=token,
        prediction=sum(_each(weight) for weight in head.parameters() if weight.ndim >= 2) if head is not None else 0.0,
        pair=3 * 2 * 2 * width * config.num_attention_heads,
        windows=_windows(config),
    )


def row_lengths(batch: Batch) -> Tensor:
    """Tokens of each row of a packed batch, (rows,) int64; the idle token of the empty batch is no row."""
    if not batch.uids:
        return torch.empty(0, dtype=torch.int64)
    starts = (batch.position_ids[0] == 0).nonzero()[:, 0]
    return torch.diff(starts, append=starts.new_tensor([batch.position_ids.shape[1]]))


def work_of(batches: Iterable[Batch], cost: Cost) -> dict[str, float]:
    """The tokens in these batches, how many of the batches hold any, and the operations they cost."""
    held = [(row_lengths(batch), len(batch.ids)) for batch in batches if batch.uids]
    return {
        "processed": float(sum(int(lengths.sum()) for lengths, _ in held)),
        "bins": float(len(held)),
        "flops": sum(cost.of(lengths, predictions) for lengths, predictions in held),
    }


def peak_flops(device: torch.device, compute: str) -> float | None:
    """Dense operations a second of the device in bfloat16; None where that is not known, or another type is used."""
    if device.type != "cuda" or compute != "bfloat16":
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """By the name the driver gives it; a MIG slice of a device is none."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for words, peak in PEAK_BF16.items() if re.search(rf"\b{words}\b", name)), None)


def peak_memory(device: torch.device) -> float:
    """Bytes held at most so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _each(weight: Tensor) -> float:
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()


def _pairs(lengths: Tensor, window: int | None) -> int:
    """Pairs of a token and one it attends to, itself included: n (n + 1) / 2 a row, less what the window cuts off."""
    beyond = (lengths - window).clamp(min=0) if window else torch.zeros_like(lengths)
    return int((lengths * (lengths + 1) - beyond * (beyond + 1)).sum()) // 2


def _windows(config: Any) -> tuple[int | None, ...]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _first(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    return next((getattr(config, name) for name in names if getattr(config, name, None)), otherwise)
