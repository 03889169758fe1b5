"""LoRA students (arXiv 2106.09685): the model's weights stay as they are, and adapters W + alpha/rank * B @ A learn.

`peft` puts the adapters in place, so that the model stays the class it is, with its body, layers and head. They are
float32 masters like any weight we train; the frozen weights are held in the compute type.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from common.errors import UsageError
from trainer.config import Lora

NAME = "default"
"""peft's name for an adapter."""


def add_adapters(model: PreTrainedModel, layers: nn.ModuleList, lora: Lora, *, seed: int = 0) -> None:
    """Freeze the model and put trainable adapters at the linear layers of its blocks; they begin as no change at all.

    Raises:
        UsageError: peft is not installed, or a target is no linear layer of the blocks.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("lora needs the package peft, which is not there", fix="pip install peft") from None
    model.requires_grad_(False)
    config = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), target_modules=_targets(model, layers, lora))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=_is_meta(model))
    for module in _adapted(model).values():
        module.lora_A.float()
        module.lora_B.float()


def merged_shards(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of a model without adapters, one at a time, every adapter added to its weight.

    They are sharded as the model is; a merged weight is float32. All ranks must go through them together.
    """
    adapted = _adapted(model)
    state = cast(dict[str, Tensor], get_model_state_dict(model))
    for name, weight in state.items():
        owner, _, inner = name.partition(".base_layer.")
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if not inner:
            yield name, weight
        elif inner == "weight":
            down, up = (state[f"{owner}.lora_{side}.{NAME}.weight"] for side in "AB")
            yield f"{owner}.weight", weight.float() + adapted[owner].scaling[NAME] * (up @ _whole(down))
        else:
            yield f"{owner}.{inner}", weight


def _targets(model: PreTrainedModel, layers: nn.ModuleList, lora: Lora) -> list[str]:
    """Full names of the linear layers to adapt."""
    inside = {id(module) for module in layers.modules()}
    linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and id(each) in inside]
    if lora.targets == "all-linear" and linear:
        return linear
    named = () if lora.targets == "all-linear" else lora.targets
    last = {name.rpartition(".")[2] for name in linear}
    unknown = sorted({*named} - last)
    if unknown or not named:
        what = (
            f"lora.targets names {unknown[0]!r}, which is"
            if unknown
            else "lora.targets is empty: there is"
            if lora.targets == ()
            else "there is"
        )
        raise UsageError(
            f"{what} no linear layer of the decoder blocks",
            where=type(model).__name__,
            fix=f"Choose among {', '.join(sorted(last))}, or leave it out for all of them",
        )
    return [name for name in linear if name.rpartition(".")[2] in named]


def _adapted(model: PreTrainedModel) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _is_meta(model: PreTrainedModel) -> bool:
    return next(model.parameters()).is_meta


def _whole(weight: Tensor) -> Tensor:
    """The same on every rank, so that a product with it stays sharded as its left side is."""
    if not isinstance(weight, DTensor):
        return weight
    return weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
