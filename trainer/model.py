"""A decoder-only language model of transformers, sharded by FSDP2, whose forward pass returns log-probs.

Rank 0 reads the weights in float32; the others build the network on the meta device and receive their shards. Masters,
gradients and their reduction are float32; the compute type is the caller's.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.errors import DataError, UsageError
from trainer.architectures import require_attention, require_backward, require_linear_head, require_packable
from trainer.attention import implementation, row_bounds
from trainer.config import Lora
from trainer.fused_head import HeadLoss, head_loss
from trainer.logprobs import Scores, score_tokens
from trainer.lora import add_adapters
from trainer.parallel import compile_layers, fill, shard
from trainer.world import World

COMPUTE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_plain(folder: Path, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of `folder` on the CPU, in eval mode: what we score must be the policy itself.

    Raises:
        DataError: transformers cannot open it, weights are missing or of another shape, its logits are more than a
            linear head, or it has layers that cannot be packed.
    """
    config = _config(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=implementation(attention),
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told by `_require_every_weight`, which names them
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"transformers cannot open the model: {first_line(error)}", where=str(folder)) from None
    model, found = loaded  # a pair, because of `output_loading_info`
    _require_every_weight(found, folder)
    return model


def load_sharded(
    folder: Path,
    world: World,
    *,
    compute: str,
    attention: str,
    checkpoint_activations: bool,
    compiled: bool = False,
    cpu_offload: bool = False,
    lora: Lora | None = None,
) -> PreTrainedModel:
    """The model of `folder` sharded over `world`: a unit per decoder layer, and the root with embedding, norm and head.

    The root keeps its weights from forward to backward, which is what lets the head be applied in chunks and be tied.
    With `lora` only adapters train, and the rest is held in the compute type, in which it is used anyway.

    Raises:
        DataError: as `load_plain` does.
        UsageError: what is asked for is not installed, or not possible on this device or with this model.
    """
    require_attention(attention, world.device.type, compute)
    require_backward(attention, world.device.type)
    held = COMPUTE_TYPES[compute] if lora else torch.float32
    model = skeleton(folder, dtype=held, attention=attention)
    layers = decoder_layers(model)
    if lora:
        add_adapters(model, layers, lora)
    full = _full_on_first(folder, world, held, attention, lora)
    if compiled:
        compile_layers(layers)
    shard(model, layers, world, compute=COMPUTE_TYPES[compute], cpu_offload=cpu_offload)
    fill(model, full, world, cpu_offload=cpu_offload)
    model.forward = types.MethodType(_forward_scores, model)
    model.eval()  # no dropout, no noise in a router: the policy that is trained is the one that sampled
    if checkpoint_activations:
        _checkpoint(model, layers)
    return model


def _checkpoint(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Recompute the layers in the backward pass. transformers does so in layers that are in training; what is in them
    stays out of it."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(
            f"activation_checkpointing=true is not possible here: {first_line(error)}",
            fix="Leave it out, and lower token_budget where memory is short",
        ) from None
    for layer in layers:
        layer.training = True


def skeleton(folder: Path, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The network of `folder` on the meta device, without weights. Raises DataError as `load_plain` does."""
    config = _config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=implementation(attention), trust_remote_code=False
            )
    except (ValueError, ImportError, KeyError) as error:
        raise DataError(f"transformers cannot build the model: {first_line(error)}", where=str(folder)) from None
    head_weight(model)
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the longest list of modules in the body, of those that lie least deep.

    Raises:
        DataError: there is none.
    """
    lists = {name: part for name, part in model.base_model.named_modules() if isinstance(part, nn.ModuleList)}
    if not lists:
        raise DataError(f"models of type {model.config.model_type} are not supported: they have no list of layers")
    least = min(name.count(".") for name in lists)
    return max((part for name, part in lists.items() if name.count(".") == least), key=len)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states of packed rows, (length, width).

    No attention mask and no cache, ever: with either, transformers ignores the restarts of `position_ids` without a
    word, and rows see one another.
    """
    bounds = row_bounds(model.config._attn_implementation, position_ids)
    output = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **bounds
    )
    return output.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output projection, (vocab, width)."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise DataError(
            f"models of type {model.config.model_type} are not supported: their output head is not a plain linear layer"
        )
    return head.weight


def _forward_scores(
    self: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, *, predictors: Tensor | None = None, **ask: Any
) -> Scores | HeadLoss | Tensor:
    """The root's forward pass: what the model says about `ask["targets"]` at the positions `predictors`, as a loss to
    be differentiated where there is `ask["loss"]`. Without `predictors` the logits of the class's own forward pass,
    (length, vocab) float32, to compare with.

    It is the model's own forward because FSDP gathers the root's weights only for a call that enters by the root.
    """
    if predictors is None:
        bounds = row_bounds(self.config._attn_implementation, position_ids)
        return type(self).forward(self, input_ids=input_ids, use_cache=False, **bounds).logits[0].float()
    hidden, head = hidden_states(self, input_ids, position_ids)[predictors], head_weight(self)
    return head_loss(hidden, head, **ask) if "loss" in ask else score_tokens(hidden, head, **ask)


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"transformers cannot read the model's config: {first_line(error)}", where=str(folder)
        ) from None
    require_linear_head(config, folder)
    require_packable(config, folder)
    return config


def _require_every_weight(found: Mapping[str, Any], folder: Path) -> None:
    """Weights that are not in the files would be random, and nobody would be told."""
    fix = "Fetch or export the model again"
    if missing := sorted(found["missing_keys"]):
        raise DataError(f"{len(missing)} weights are missing, first {missing[0]}", where=str(folder), fix=fix)
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise DataError(
            f"{len(mismatched)} weights have another shape than the config says, first {name}: "
            f"{tuple(stored)} in the file, {tuple(wanted)} by the config",
            where=str(folder),
            fix=fix,
        )


def _full_on_first(
    folder: Path, world: World, dtype: torch.dtype, attention: str, lora: Lora | None
) -> PreTrainedModel | None:
    """The whole model on rank 0; what goes wrong there is raised on every rank, or the others would wait for ever."""
    loaded: list[PreTrainedModel] = []
    world.from_first(lambda: loaded.append(load_plain(folder, dtype=dtype, attention=attention)))
    for model in loaded:
        if lora:
            add_adapters(model, decoder_layers(model), lora)
    return loaded[0] if loaded else None


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
