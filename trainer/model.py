"""Any causal language model of transformers, sharded by FSDP2, whose forward pass returns log-probs.

Rank 0 reads the weights in float32; the others build the network on the meta device and receive their shards. Masters,
gradients and their reduction are float32; the compute type is the caller's.
"""

import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.errors import DataError
from trainer.logprobs import Scores, score_tokens
from trainer.world import World

COMPUTE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESHAPED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys of architectures that change the logits after the head, which our chunked head would miss."""


def load_plain(folder: Path, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of `folder` on the CPU, dropout off: what we score must be the policy itself.

    Raises:
        DataError: transformers cannot open it, or its logits are more than a linear head.
    """
    config = _config(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"transformers cannot open the model: {first_line(error)}", where=str(folder)) from None


def load_sharded(
    folder: Path, world: World, *, compute: str, attention: str, checkpoint_activations: bool
) -> PreTrainedModel:
    """The model of `folder` sharded over `world`: a unit per decoder layer, and the root with embedding, norm and head.

    The root keeps its weights from forward to backward, which is what lets the head be applied in chunks and be tied.
    """
    full = load_plain(folder, dtype=torch.float32, attention=attention) if world.is_first else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(folder), dtype=torch.float32, attn_implementation=attention)
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


def _forward_scores(self: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, **ask: Any) -> Scores:
    """The root's forward pass: the scores of `ask["targets"]` at the positions `ask["predictors"]`.

    It is the model's own forward because FSDP gathers the root's weights only for a call that enters by the root.
    """
    hidden = hidden_states(self, input_ids, position_ids)[ask.pop("predictors")]
    return score_tokens(hidden, head_weight(self), **ask)


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"transformers cannot read the model's config: {first_line(error)}", where=str(folder)
        ) from None
    reshaped = [key for key in RESHAPED_LOGITS if getattr(config, key, None) not in (None, 1.0)]
    if reshaped:
        raise DataError(
            f"models with {reshaped[0]} are not supported: their logits are more than a linear head", where=str(folder)
        )
    for key in vars(config):
        if key.endswith(("dropout", "_pdrop")):
            setattr(config, key, 0.0)
    return config


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
