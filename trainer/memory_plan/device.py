"""The memory plan of a run: what every rank holds at the four fullest moments of a step, and what the host holds.

    head     the forward pass is done, the loss runs through the head chunk by chunk
    layer    the backward pass is in a decoder layer
    root     the backward pass reduces the gradients of the root: embedding, last norm, head
    update   the optimizer steps, in place

A line says how many bytes it has at each; the fullest moment is what must fit. Formulas stand in the docstrings, with
P parameters, N shards, c bytes of the compute type, V x W the head, and L the parameters of the largest layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from trainer.config import TrainConfig
from trainer.memory_plan.activations import Activations
from trainer.model import decoder_layers, head_weight

MOMENTS = ("head", "layer", "root", "update")
F32 = 4
BYTES = {"float32": 4, "bfloat16": 2}
CUDA_ITSELF = 2 << 30
"""Allowance for the CUDA context, kernels, NCCL's buffers and the allocator's fragments; torch counts none of them."""
SHARDING, SMALLER = "more ranks, cpu_offload=true or lora.rank=16", "a smaller model"


@dataclass(frozen=True)
class Ranks:
    """Where a run takes place."""

    shards: int
    """Ranks that share one copy of the model: all of them, or those of one replica."""
    here: int
    """Ranks on one node, which share its RAM."""
    kind: str
    """`cpu` or `cuda`."""


class Weight(NamedTuple):
    """One weight: its shape, whether it trains, and the bytes of a number in its shard."""

    shape: tuple[int, ...]
    trains: bool
    held: int

    @property
    def count(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """The weights of a model by FSDP unit; tied weights are in the root, once."""

    layers: tuple[tuple[Weight, ...], ...]
    root: tuple[Weight, ...]
    head: Weight
    """(vocab, width)"""
    tied: bool

    @property
    def all(self) -> list[Weight]:
        """Every weight."""
        return [*self.root, *(weight for layer in self.layers for weight in layer)]


@dataclass(frozen=True)
class Line:
    """One thing that takes memory: its bytes at each moment, and the setting that changes it."""

    name: str
    at: dict[str, int]
    change: str = ""


@dataclass(frozen=True)
class Plan:
    """Lines that add up, moment by moment."""

    lines: tuple[Line, ...]
    moments: tuple[str, ...]

    def total(self, moment: str) -> int:
        """Bytes of all lines at a moment."""
        return sum(line.at.get(moment, 0) for line in self.lines)

    @property
    def fullest(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return self.total(self.fullest)

    @property
    def largest(self) -> Line:
        """The line that takes most at the fullest moment, of those that a setting can change."""
        return max((line for line in self.lines if line.change), key=lambda line: line.at.get(self.fullest, 0))


def weights_of(model: PreTrainedModel) -> Weights:
    """The weights of a model, which may lie on the meta device."""
    layers, head = decoder_layers(model), head_weight(model)
    inside = {id(weight) for weight in layers.parameters()}
    return Weights(
        layers=tuple(tuple(_weight(each) for each in layer.parameters()) for layer in layers),
        root=tuple(_weight(each) for each in model.parameters() if id(each) not in inside),
        head=_weight(head),
        tied=any(head is weight for weight in model.get_input_embeddings().parameters()),
    )


def _weight(weight: Tensor) -> Weight:
    return Weight(tuple(weight.shape), weight.requires_grad, weight.element_size())


def sharded(weight: Weight, shards: int) -> int:
    """Numbers in the first and fullest shard: ceil(rows / N) x the rest of the shape; FSDP cuts along the rows."""
    return -(-weight.shape[0] // shards) * prod(weight.shape[1:])


def device_plan(
    weights: Weights, activations: Activations, config: TrainConfig, ranks: Ranks, *, tokens: int, topk: int = 0
) -> Plan:
    """What rank 0, the fullest, holds on its device from the second step on.

    Args:
        tokens: packed tokens of one rank in one step.
        topk: teacher columns a token that the objective reads.
    """
    lines = [
        *([] if config.cpu_offload else state_lines(weights, ranks, MOMENTS)),
        _gathered_root(weights, config),
        _gathered_layers(weights, config, ranks),
        _reduction(weights, config, ranks),
        _activations(activations, config),
        _hidden(weights, config),
        _head(weights, config, ranks),
        _logits(weights, config),
        _batches(tokens, topk),
    ]
    return Plan(tuple(lines), MOMENTS)


def state_lines(weights: Weights, ranks: Ranks, moments: Sequence[str]) -> list[Line]:
    """What lasts from step to step: 4P/N of parameters (frozen ones in the compute type: c P/N), 4P/N of gradients and
    8P/N of AdamW's moments, P being the trained parameters there."""
    own = sum(sharded(each, ranks.shards) * each.held for each in weights.all)
    trained = F32 * sum(sharded(each, ranks.shards) for each in weights.all if each.trains)
    return [
        Line("parameters", dict.fromkeys(moments, own), SHARDING),
        Line("gradients", dict.fromkeys(moments, trained), SHARDING),
        Line("optimizer moments", dict.fromkeys(moments, 2 * trained), SHARDING),
    ]


def _gathered_root(weights: Weights, config: TrainConfig) -> Line:
    """c x root: embedding, norm and head stay whole from the forward pass to the end of the backward pass."""
    size = BYTES[config.compute] * _count(weights.root)
    return Line("embedding and head, gathered", {"head": size, "layer": size, "root": size}, SMALLER)


def _gathered_layers(weights: Weights, config: TrainConfig, ranks: Ranks) -> Line:
    """c x L for the layer at work, and as much for the one fetched ahead of it where there is more than one shard."""
    one = BYTES[config.compute] * max(_count(layer) for layer in weights.layers)
    many = ranks.shards > 1
    return Line("layers, gathered", {"head": one if many else 0, "layer": 2 * one if many else one}, SMALLER)


def _reduction(weights: Weights, config: TrainConfig, ranks: Ranks) -> Line:
    """4 x L: a layer's gradient on its way to the other ranks while the next layer goes back; with replicas or offload
    4 x L/N more, which is what came back. At the root: c x root of gradient, c x V x W once more if the embedding is
    tied to the head, and 4 x root on its way. Trained weights only."""
    c = BYTES[config.compute]
    layer = F32 * max(_trained(layer) for layer in weights.layers)
    root = (c + F32) * _trained(weights.root)
    if weights.tied and weights.head.trains:
        root += c * weights.head.count
    if config.replicas > 1 or config.cpu_offload:
        layer, root = (size + size // ranks.shards for size in (layer, root))
    return Line("gradients being reduced", {"layer": layer, "root": root}, SMALLER)


def _activations(activations: Activations, config: TrainConfig) -> Line:
    """Sum over layers of what each keeps, and in the backward pass the temporaries of one. With checkpointing: the
    input of every layer, and all of one layer. The gradient of a layer's weights is among its temporaries."""
    layers = activations.layers
    if config.activation_checkpointing:
        kept = sum(layer.entry for layer in layers)
        back = kept + max(layer.work for layer in layers)
    else:
        kept = sum(layer.kept for layer in layers)
        back = kept + max(layer.work - layer.kept for layer in layers)
    change = "a lower token_budget" if config.activation_checkpointing else "activation_checkpointing=true"
    return Line("activations", {"head": kept + activations.mask, "layer": back + activations.mask}, change)


def _hidden(weights: Weights, config: TrainConfig) -> Line:
    """tokens x W x (4 + 3c) for the last norm (its float32 input and two of type c) and the rows picked from it, and
    4 more for their float32 gradient."""
    size = config.token_budget * weights.head.shape[1] * (2 * F32 + 3 * BYTES[config.compute])
    return Line("last hidden states", {"head": size}, "a lower token_budget")


def _head(weights: Weights, config: TrainConfig, ranks: Ranks) -> Line:
    """4 x V x W for the head's gradient, summed in float32 over the chunks, and as much for a float32 copy of the head
    where products of bfloat16 with float32 sums have no kernel (CPU). Then c x V x W until the root is reduced."""
    size, c = weights.head.count, BYTES[config.compute]
    copy = F32 * size if ranks.kind == "cpu" and c != F32 else 0
    if not weights.head.trains:
        return Line("head in float32", {"head": copy}, SMALLER)
    return Line("the head's gradient", {"head": F32 * size + copy, "layer": c * size}, SMALLER)


def _logits(weights: Weights, config: TrainConfig) -> Line:
    """Two float32 buffers of chunk x V, and one of type c if that is not float32; when they are gone, c x V x W for the
    head's gradient in that type."""
    c, rows = BYTES[config.compute], min(config.logits_chunk, config.token_budget)
    buffers = rows * weights.head.shape[0] * (2 * F32 + (c if c != F32 else 0))
    after = c * weights.head.count if c != F32 and weights.head.trains else 0
    return Line("logits", {"head": max(buffers, after)}, "a lower logits_chunk")


def _batches(tokens: int, topk: int) -> Line:
    """(64 + 12k) bytes a packed token of the step: nine columns of 4 or 8 bytes, and ids and log-probs of the top k."""
    return Line("batches of the step", dict.fromkeys(MOMENTS, tokens * (64 + 12 * topk)))


def _count(weights: Sequence[Weight]) -> int:
    return sum(weight.count for weight in weights)


def _trained(weights: Sequence[Weight]) -> int:
    return sum(weight.count for weight in weights if weight.trains)
