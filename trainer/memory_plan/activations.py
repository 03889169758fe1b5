"""What one decoder layer keeps and needs, counted by running it on tensors that have shapes but no memory.

A formula for every architecture would be a guess about code that others change; the layer's own code, run on fake
tensors, allocates what it would allocate. Only attention kernels are stood in for, which have no fake twin; what they
keep is known: query, key, value, output and the float32 normaliser of every row (Dao 2022, sections 3.1 and B.2).
"""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from common.errors import DataError
from trainer.config import Lora
from trainer.lora import add_adapters
from trainer.model import COMPUTE_TYPES, decoder_layers, first_line, hidden_states, skeleton


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one decoder layer in the forward and backward pass of one micro-batch, without its weights."""

    entry: int
    """Its input, all that activation checkpointing keeps of it."""
    kept: int
    """What stays from its forward to its backward pass."""
    work: int
    """The most that is alive while it goes forward and back: `kept`, temporaries and the gradient of its weights."""


@dataclass(frozen=True)
class Activations:
    """The layers of a model, first to last, and what they share."""

    layers: tuple[LayerCost, ...]
    mask: int
    """Bytes of the attention masks that transformers builds once for all layers."""


def measure(folder: Path, *, tokens: int, compute: str, attention: str, lora: Lora | None = None) -> Activations:
    """Run a layer of each kind of the model in `folder` on a fake micro-batch of `tokens` tokens.

    Layers are of one kind if their weights have the same names and shapes. Nothing is read but config.json, and nothing
    is computed. The numbers are those of eager execution; a compiled layer keeps less.

    Raises:
        DataError: the architecture's code looks at values, so that only a real run can tell.
    """
    backend = "eager" if attention == "eager" else "sdpa"  # stands in for the others, which may not be installed
    model = skeleton(folder, dtype=COMPUTE_TYPES[compute], attention=backend).eval()
    layers = decoder_layers(model)
    if lora:
        add_adapters(model, layers, lora)
        nn.Module.to(model, COMPUTE_TYPES[compute])  # as FSDP casts them
    known: dict[Any, tuple[LayerCost, int]] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            _make_fake(model, mode)
            for layer in layers:
                if (kind := _kind(layer)) not in known:
                    known[kind] = _run(model, layers, layer, tokens)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what looks at values
        raise DataError(
            f"the layers of {type(model).__name__} cannot be run without values: {first_line(error)}",
            where=str(folder),
            fix="Train without a plan of the memory",
        ) from None
    each = [known[_kind(layer)] for layer in layers]
    return Activations(tuple(cost for cost, _ in each), max(mask for _, mask in each))


def _make_fake(model: PreTrainedModel, mode: FakeTensorMode) -> None:
    """On the meta device a question about values is an error; a fake tensor says that it is being traced."""
    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            held.update({name: mode.from_tensor(each) for name, each in held.items() if each is not None})


def _kind(layer: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, weight.shape) for name, weight in layer.named_parameters())


def _run(model: PreTrainedModel, layers: nn.ModuleList, layer: nn.Module, tokens: int) -> tuple[LayerCost, int]:
    hidden, keywords = _call(model, layers, layer, tokens)
    masks = _bytes(keywords.get("attention_mask"))
    hidden.requires_grad_()
    with _Live() as live, _AttentionKernels():
        output = layer(hidden, **keywords)
        output = output[0] if isinstance(output, tuple) else output
        kept = live.now
        output.backward(torch.empty_like(output))
    return LayerCost(entry=_bytes(hidden), kept=kept, work=live.peak), masks


class _Called(Exception):
    """The layer was reached; how it was called is known."""


def _call(model: PreTrainedModel, layers: nn.ModuleList, layer: nn.Module, tokens: int) -> tuple[Tensor, dict]:
    """How the model calls `layer` in a forward pass: the hidden states and the keyword arguments."""
    calls: list[tuple[Tensor, dict]] = []

    def note(module: nn.Module, args: tuple, keywords: dict) -> None:
        calls.append((args[0], dict(keywords)))
        raise _Called

    first = layers[0]
    layers[0] = layer
    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.empty((1, tokens), dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            hidden_states(model, ids, ids)
    except _Called:
        pass
    finally:
        handle.remove()
        layers[0] = first
    hidden, keywords = calls[0]
    return hidden.detach(), keywords


def _bytes(tree: Any) -> int:
    return sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class _Live(TorchDispatchMode):
    """Bytes of all tensors made within it and still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inside:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _AttentionKernels(TorchFunctionMode):
    """In it `scaled_dot_product_attention` allocates what the fused kernels do; on fake tensors torch would take the
    unfused one, which keeps a square matrix a head."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **keywords)
        query, key, value, mask = _arguments(*args, **keywords)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=query.dtype, device=query.device)  # torch makes it anew in every layer
        return _Attention.apply(query, key, value, mask)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return query, key, value, attn_mask


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        norm = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, mask, output, norm)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
