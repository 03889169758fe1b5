"""The ranks of a run: who they are, which device each holds, and the few things they tell one another."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import ProcessGroup, get_node_local_rank

from common.errors import LopdError, UsageError

Result = TypeVar("Result")
Device = Literal["auto", "cpu", "cuda"]
PATIENCE = timedelta(hours=6)
"""How long ranks wait for what one does for all: fetching a model, hashing it, exporting it. A rank that dies is told
of at once, so nobody waits this long for the dead."""
SETTLED_S = 0.2
"""gloo's threads let go of a collective's tensors after it has returned, and need Python for that; one that comes when
Python is ending already aborts the process, in place of the exit code that it was to have."""


class _Failure(NamedTuple):
    """An error of one rank on its way to the others: errors made with keywords do not come back from a pickle."""

    kind: type[LopdError]
    what: str
    where: str
    fix: str
    detail: str

    @classmethod
    def of(cls, error: LopdError) -> "_Failure":
        return cls(type(error), error.what, error.where, error.fix, error.detail)

    def error(self) -> LopdError:
        error = self.kind(self.what, where=self.where, fix=self.fix, detail=self.detail)
        error.shared = True
        return error


@dataclass(frozen=True)
class World:
    """One process of the run. `mesh` has the dimension over which FSDP shards, after that of the replicas if any."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    saving: ProcessGroup
    """A gloo group of its own, so that a checkpoint being written in the background never mixes with training."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over ranks, on the device of `values`."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum(torch.tensor(float(here))).item() > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order of rank; for small host objects."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on rank 0, on every rank; its LopdError is raised on every rank too.

        For what one process should do and all must know: hashing weights, listing checkpoints.
        """
        said: list[Any] = [None]
        if self.is_first:
            try:
                said = [make()]
            except LopdError as error:
                said = [_Failure.of(error)]
        dist.broadcast_object_list(said, src=0, group=self.saving)
        if isinstance(said[0], _Failure):
            raise said[0].error()
        return said[0]

    def together(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on this rank, once it has returned on every rank.

        A LopdError on any rank is raised on all of them, that of the lowest rank: whoever failed alone would leave the
        others waiting for it, until they end with an error that says nothing of the cause.
        """
        made, failure = [], None
        try:
            made = [make()]
        except LopdError as error:
            failure = _Failure.of(error)
        if self.any(failure is not None):
            raise next(other for other in self.gather(failure) if other is not None).error()
        return made[0]


@contextmanager
def joined(device: Device, replicas: int = 1) -> Iterator[World]:
    """Join the process group that torchrun prepared, or a group of one, and leave it at the end.

    Raises:
        UsageError: CUDA was asked for and there is none, there are more ranks here than GPUs, or the ranks cannot be
            shared out among the replicas.
    """
    kind = kind_of(device)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield _world(kind, replicas)
    finally:
        dist.destroy_process_group()
        time.sleep(SETTLED_S)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether it is what torch raises on the ranks that are left when one has died or left."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def kind_of(device: Device) -> str:
    """`cpu` or `cuda`. Raises UsageError where CUDA is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device=cuda, but this machine offers no CUDA device to torch",
            where=f"torch {torch.__version__}",
            fix="Use device=cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _world(kind: str, replicas: int) -> World:
    own = torch.device("cpu")
    if kind == "cuda":
        local = get_node_local_rank(fallback_rank=0)
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"there are more ranks on this machine than its {torch.cuda.device_count()} GPUs",
                fix=f"Start {torch.cuda.device_count()} ranks, or set device=cpu",
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    size = dist.get_world_size()
    return World(
        rank=dist.get_rank(),
        size=size,
        device=own,
        mesh=_mesh(kind, size, replicas),
        saving=cast(ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE)),
    )


def _mesh(kind: str, size: int, replicas: int) -> DeviceMesh:
    if size % replicas:
        raise UsageError(
            f"{size} ranks cannot be shared out among {replicas} replicas",
            where="replicas",
            fix=f"Set replicas to a divisor of {size}, or start a multiple of {replicas} ranks",
        )
    if replicas == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
