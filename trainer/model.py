"""Any causal language model of transformers, sharded by FSDP2, whose forward pass returns log-probs.

Rank 0 reads the weights in float32; the others build the network on the meta device and receive their shards. Masters,
gradients and their reduction are float32; the compute type is the caller's.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from common.errors import DataError, UsageError
from trainer.fused_head import HeadLoss, head_loss
from trainer.logprobs import Scores, score_tokens
from trainer.world import World

COMPUTE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESHAPED_LOGITS = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
)  # fmt: skip
"""Config keys of architectures that change the logits after the head, which our chunked head would miss."""
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layer that tell packed rows apart by their restarting positions alone."""
RECURRENT = {"recurrent_gemma", "rwkv", "xlstm"}
"""Model types with recurrent layers whose config does not list its layers."""
FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
}
"""Attention backends that need a package: whether it is there, and its name."""


def load_plain(folder: Path, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of `folder` on the CPU, dropout off: what we score must be the policy itself.

    Raises:
        DataError: transformers cannot open it, weights are missing or of another shape, its logits are more than a
            linear head, or it has layers that cannot be packed.
        UsageError: the attention backend is not installed.
    """
    require_attention(attention)
    config = _config(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told by `_require_every_weight`, which names them
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise DataError(f"transformers cannot open the model: {first_line(error)}", where=str(folder)) from None
    model, found = loaded  # a pair, because of `output_loading_info`
    _require_every_weight(found, folder)
    return model


def load_sharded(
    folder: Path, world: World, *, compute: str, attention: str, checkpoint_activations: bool
) -> PreTrainedModel:
    """The model of `folder` sharded over `world`: a unit per decoder layer, and the root with embedding, norm and head.

    The root keeps its weights from forward to backward, which is what lets the head be applied in chunks and be tied.
    """
    require_attention(attention)
    model = skeleton(folder, dtype=torch.float32, attention=attention)
    full = _full_on_first(folder, world, attention)
    policy = MixedPrecisionPolicy(param_dtype=COMPUTE_TYPES[compute], reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    model.to_empty(device=world.device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full.state_dict() if full is not None else {}, options=options)
    _broadcast_buffers(model, full)
    if checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.forward = types.MethodType(_forward_scores, model)
    return model.train()


def skeleton(folder: Path, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The network of `folder` on the meta device, without weights. Raises DataError as `load_plain` does."""
    config = _config(folder)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ValueError, ImportError) as error:
        raise DataError(f"transformers cannot build the model: {first_line(error)}", where=str(folder)) from None


def require_attention(attention: str) -> None:
    """Refuse a backend whose package is absent, before transformers reaches for another one.

    Raises:
        UsageError: the package is not installed, or there is no CUDA device for it.
    """
    if attention not in FLASH:
        return
    is_there, package = FLASH[attention]
    if not is_there():
        raise UsageError(
            f"attention={attention} needs the package {package} and a CUDA device, and one of them is not there",
            fix=f"Install {package}, or set attention=sdpa or attention=flex_attention",
        )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the longest list of modules directly below the body."""
    lists = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=len)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states of packed rows, (length, width).

    No attention mask and no cache, ever: with either, transformers ignores the restarts of `position_ids` without a
    word, and rows see one another.
    """
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
    return output.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output projection, (vocab, width)."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise DataError("the model's output head is not a plain linear layer, which is all that is supported")
    return head.weight


def _forward_scores(
    self: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, *, predictors: Tensor, **ask: Any
) -> Scores | HeadLoss:
    """The root's forward pass: what the model says about `ask["targets"]` at the positions `predictors`, as a loss to
    be differentiated where there is `ask["loss"]`.

    It is the model's own forward because FSDP gathers the root's weights only for a call that enters by the root.
    """
    hidden, head = hidden_states(self, input_ids, position_ids)[predictors], head_weight(self)
    return head_loss(hidden, head, **ask) if "loss" in ask else score_tokens(hidden, head, **ask)


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"transformers cannot read the model's config: {first_line(error)}", where=str(folder)
        ) from None
    _require_linear_head(config, folder)
    _require_packable(config, folder)
    for key in vars(config):
        if key.endswith(("dropout", "_pdrop")):
            setattr(config, key, 0.0)
    return config


def _require_linear_head(config: Any, folder: Path) -> None:
    text = config.get_text_config()
    reshaped = [key for key in RESHAPED_LOGITS if getattr(text, key, None) not in (None, 1.0)]
    if reshaped:
        raise DataError(
            f"models with {reshaped[0]} are not supported: their logits are more than a linear head", where=str(folder)
        )


def _require_packable(config: Any, folder: Path) -> None:
    """A recurrent state runs on from one packed row into the next, whatever the positions say."""
    text = config.get_text_config()
    kinds = {text.model_type} & RECURRENT or {*(getattr(text, "layer_types", None) or ())} - PACKABLE_LAYERS
    if kinds:
        raise DataError(
            f"models with {min(kinds)} layers are not supported: packed rows would see one another",
            where=str(folder),
            fix="Take a model whose layers are all full or sliding attention",
        )


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


def _full_on_first(folder: Path, world: World, attention: str) -> PreTrainedModel | None:
    """The whole model on rank 0; what goes wrong there is raised on every rank, or the others would wait for ever."""
    loaded: list[PreTrainedModel] = []
    world.from_first(lambda: loaded.append(load_plain(folder, dtype=torch.float32, attention=attention)))
    return loaded[0] if loaded else None


def _broadcast_buffers(model: PreTrainedModel, full: PreTrainedModel | None) -> None:
    """Give every rank rank 0's buffers: non-persistent ones (the rotary frequencies) are in no state dict."""
    source = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in model.named_buffers():
        if full is not None:
            buffer.copy_(source[name])
        dist.broadcast(buffer, src=0)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
