"""Joining the Ray cluster that is running; none is ever started here."""

import importlib.util
import logging
import os
import signal
from typing import TYPE_CHECKING

from common.errors import UsageError
from precompute.config import Engine, Fleet
from precompute.fleet.ray_head import answers

if TYPE_CHECKING:
    from precompute.fleet.ray_cluster import RayCluster

ADDRESS = "RAY_ADDRESS"
START = (
    "Start it with `ray start --head`, join every box by `ray start --address=HEAD:6379`, and run this on one of them; "
    "RAY_ADDRESS names the cluster where there are several"
)


def join_ray(fleet: Fleet, engine: Engine) -> "RayCluster":
    """Join the cluster that RAY_ADDRESS names, else the one of this machine.

    Every node needs the same software, and in the environment of its `ray start` the credentials of the store.

    Raises:
        UsageError: Ray is not installed, no cluster is running, or it has no node for a replica.
        RetryLater: others hold all that there is.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("Ray is not installed", fix="Install lightning-opd[ray], on every node of the cluster")
    _require_joinable(os.environ.get(ADDRESS, ""))
    import ray

    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = str(error).strip().splitlines()
        raise UsageError(
            f"no Ray cluster can be joined: {what[0].rstrip('.') if what else type(error).__name__}", fix=START
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray puts its own there, which would end us without a drain
    from precompute.fleet.ray_cluster import RayCluster

    return RayCluster(fleet, engine)


def _require_joinable(address: str) -> None:
    """Refuse what Ray would answer by a cluster of its own, by a proxy, or after minutes."""
    if address == "local" or "://" in address:
        raise UsageError(f"{ADDRESS}={address} names no cluster that this process can be part of", fix=START)
    if address.rpartition(":")[2].isdigit() and not answers(address):  # else `auto`, or nothing: Ray knows where it is
        raise UsageError("no Ray cluster answers", where=address, fix=START)
