"""How a model lies on the ranks: FSDP units, what they compute in, where their shards wait, and how they are filled.

world.mesh (shard)              every rank holds 1/N of every weight
world.mesh (replicate, shard)   HSDP: each replica shards among its own ranks, gradients are averaged over replicas
"""

from collections.abc import Iterable

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from common.errors import UsageError
from trainer.world import World


def shard(
    model: PreTrainedModel, layers: Iterable[nn.Module], world: World, *, compute: torch.dtype, cpu_offload: bool
) -> None:
    """Make every layer a unit, and the root with embedding, norm and head another; all compute in `compute`.

    The routers of a mixture too: float32 ones, as some trainers have, would need units of their own, and measured
    against a float32 forward pass they choose no better (32 experts, top 4: 2.5% of tokens go elsewhere either way),
    because it is the hidden states that are rounded.

    Raises:
        UsageError: `cpu_offload` where the weights are in host memory already.
    """
    if cpu_offload and world.device.type == "cpu":
        raise UsageError(
            "cpu_offload=true, but this run is on CPUs, where the weights are in host memory already",
            fix="Leave cpu_offload out, or set device=cuda",
        )
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for unit in (*layers, model):
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, offload_policy=offload)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile every layer's forward pass; before `shard`, so that FSDP's hooks stay outside.

    Layers of one kind share their code. The root is left alone: what tells packed rows apart depends on the data.
    """
    # With and without gradients, recomputed or not, and one program for each kind of layer pass torch's limit of 8,
    # beyond which it would go on uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


def fill(model: PreTrainedModel, full: PreTrainedModel | None, world: World, *, cpu_offload: bool) -> None:
    """Give every rank its shards of `full`, the whole model on rank 0 and None elsewhere; and the buffers, which are
    not sharded, and of which those that are recomputed (rotary frequencies) are in no state dict."""
    model.to_empty(device="cpu" if cpu_offload else world.device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full.state_dict() if full is not None else {}, options=options)
    source = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in list(model.named_buffers()):
        owner, _, own_name = name.rpartition(".")
        on_device = buffer.to(world.device)
        if full is not None:
            on_device.copy_(source[name])
        dist.broadcast(on_device, src=0)
        module = model.get_submodule(owner)
        persistent = own_name not in module._non_persistent_buffers_set
        module.register_buffer(own_name, on_device, persistent)
