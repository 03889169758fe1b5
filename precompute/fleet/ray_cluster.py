"""Replicas on the nodes of a Ray cluster that is running; a node may vanish, and another may come.

Each slot is a placement group of one bundle (a replica's GPUs are on one node, and an actor takes what it holds from
one bundle) with a relay in it. Both outlive the replica, so that a dead engine's GPUs go to nobody else before the next
is there. When this process dies, Ray ends the relays, and with its relay each worker group ends.
"""

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.errors import RetryLater, UsageError
from precompute.config import Engine, Fleet
from precompute.fleet.devices import built_for_cpu
from precompute.fleet.ray_head import answers
from precompute.fleet.ray_relay import Relay
from precompute.fleet.ray_replica import THREADS, RayReplica
from precompute.fleet.replica import Replica, Slot

REFRESH_S = 1.0
"""Between two looks at the nodes of the cluster."""
PLACE_S = 60.0
"""How long the first slot may take."""
HEAD_S = 40.0
"""How long the cluster's head may be away; after 60 s Ray would end this process without a word from us."""
FAILED_RELAYS = 3
"""Relays that may fail on a node that is alive; then it is the node's software."""


@dataclass(frozen=True)
class Place:
    """Where a slot can be."""

    node: str
    """Its id."""
    name: str
    gpus: int
    cpus: int
    """What a replica takes of the node."""


def places(nodes: Sequence[Mapping[str, Any]], span: int) -> list[Place]:
    """Where replicas can be on these nodes, whoever holds what of them now.

    Args:
        nodes: living ones, as `ray.nodes()` tells them.
        span: GPUs a replica takes; 0 where engines compute on the CPU: then one takes all CPUs of its node.
    """
    found = []
    for node in nodes:
        name, has = f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}", node["Resources"]
        cpus = int(has.get("CPU", 0))
        if span:
            count = int(has.get("GPU", 0)) // span
            found += [Place(node["NodeID"], f"{name}.{number}", span, 0) for number in range(count)]
        elif cpus:
            found.append(Place(node["NodeID"], name, 0, cpus))
    return found


class Holding:
    """A place that is being taken, or is ours."""

    def __init__(self, place: Place, group: PlacementGroup) -> None:
        self.place, self.group = place, group
        self.relay: ActorHandle | None = None
        self.greeting: ray.ObjectRef | None = None
        self.slot: Slot | None = None
        self.replica: RayReplica | None = None
        """The last one."""
        self.numbers = itertools.count()
        self.failed = False
        """Whether its relay never came to be."""

    @property
    def lost(self) -> bool:
        return self.failed or (self.replica is not None and self.replica.lost)


class RayCluster:
    """The nodes of the Ray cluster that this process has joined, as places for replicas."""

    def __init__(self, fleet: Fleet, engine: Engine) -> None:
        """
        Raises:
            UsageError: no node of the cluster has what a replica needs.
            RetryLater: others hold all that there is.
        """
        self._most, self._span = fleet.replicas, 0 if built_for_cpu() else engine.tensor_parallel
        if not self._span and engine.tensor_parallel > 1:
            raise UsageError(
                f"engine.tensor_parallel = {engine.tensor_parallel}, but this vLLM computes on the CPU",
                fix="Leave it at 1, or install lightning-opd[precompute]",
            )
        self._holdings: dict[Place, Holding] = {}
        self._failures: Counter[str] = Counter()
        self._head, self._seen = ray.get_runtime_context().gcs_address, time.monotonic()
        self._next = 0.0
        self._await_first()

    def slots(self) -> Sequence[Slot]:
        """
        Raises:
            UsageError: a node is alive, but the relay fails on it.
            RetryLater: the cluster's head is gone.
        """
        if time.monotonic() >= self._next:
            if self._head_is_there():
                self._refresh()
            self._next = time.monotonic() + REFRESH_S
        return tuple(holding.slot for holding in self._holdings.values() if holding.slot and not holding.lost)

    def start(self, slot: Slot) -> RayReplica:
        holding = next(holding for holding in self._holdings.values() if holding.slot == slot)
        assert holding.relay is not None, "a slot without a relay"
        holding.replica = RayReplica(slot, holding.relay, next(holding.numbers))
        return holding.replica

    def wait(self, replicas: Sequence[Replica], seconds: float) -> None:
        hearing = [one.hearing for one in replicas if isinstance(one, RayReplica) and one.hearing is not None]
        if hearing:
            ray.wait(hearing, timeout=seconds)
        else:
            time.sleep(seconds)

    def close(self) -> None:
        """Leave the cluster; what this process holds of it ends."""
        ray.shutdown()

    def _await_first(self) -> None:
        deadline = time.monotonic() + PLACE_S
        while not self.slots():
            nodes = _living_nodes()
            where = ", ".join(f"{node['NodeManagerHostname']}: {_has(node)}" for node in nodes)
            need = f"{self._span} GPU{'s' * (self._span > 1)}" if self._span else "a CPU"
            if not places(nodes, self._span):
                fix = "Lower engine.tensor_parallel, or add a node that has them"
                raise UsageError(f"no node of the Ray cluster has {need}", where=where, fix=fix)
            if time.monotonic() > deadline:
                what = f"no node of the Ray cluster gave us {need} in {PLACE_S:.0f} s"
                raise RetryLater(what, where=where, fix="See `ray status`: others may hold them")
            time.sleep(0.1)

    def _head_is_there(self) -> bool:
        """Asked first, for Ray itself would wait for a head that is away, and all our replicas with it."""
        if answers(self._head):
            self._seen = time.monotonic()
            return True
        if time.monotonic() - self._seen > HEAD_S:
            fix = "What is committed is safe; the same command resumes on a cluster that is whole"
            raise RetryLater("the head of the Ray cluster is gone", where=self._head, fix=fix)
        return False

    def _refresh(self) -> None:
        """Take places on nodes that came, up to as many as asked for; give up those that are lost or not needed."""
        here = places(_living_nodes(), self._span)
        for place, holding in list(self._holdings.items()):
            self._advance(holding)
            if holding.lost or place not in here or (holding.relay is None and self._enough()):
                self._give_up(place)
        for place in here:
            if place not in self._holdings and not self._enough():
                self._holdings[place] = Holding(place, _reserve(place))

    def _enough(self) -> bool:
        relays = sum(holding.relay is not None and not holding.lost for holding in self._holdings.values())
        return self._most is not None and relays >= self._most

    def _advance(self, holding: Holding) -> None:
        """From a reserved place to a relay that answers, to a slot."""
        if holding.relay is None:
            if not self._enough() and placement_group_table(holding.group)["state"] == "CREATED":
                holding.relay = _start_relay(holding)
                holding.greeting = holding.relay.gpus.remote()
        elif holding.slot is None and holding.greeting is not None and ray.wait([holding.greeting], timeout=0)[0]:
            try:
                names = ray.get(holding.greeting)
            except RayError as error:
                holding.failed = True
                self._fail(holding.place, str(error))
                return
            numbered = all(name.isdigit() for name in names)
            holding.slot = Slot(holding.place.name, tuple(map(int, names)) if numbered else tuple(range(len(names))))

    def _fail(self, place: Place, said: str) -> None:
        self._failures[place.node] += 1
        if self._failures[place.node] >= FAILED_RELAYS:
            raise UsageError(
                f"a node of the Ray cluster cannot run a relay: {said.strip().splitlines()[-1]}",
                where=place.name,
                fix="Install the same Python, lightning-opd and vLLM on every node",
            )

    def _give_up(self, place: Place) -> None:
        holding = self._holdings.pop(place)
        if holding.relay is not None:
            ray.kill(holding.relay)
        remove_placement_group(holding.group)


def _living_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _has(node: Mapping[str, Any]) -> str:
    return f"{node['Resources'].get('GPU', 0):.0f} GPUs, {node['Resources'].get('CPU', 0):.0f} CPUs"


def _reserve(place: Place) -> PlacementGroup:
    bundle = {"GPU": float(place.gpus)} if place.gpus else {"CPU": float(place.cpus)}
    return placement_group([bundle], strategy="STRICT_PACK", bundle_label_selector=[{"ray.io/node-id": place.node}])


def _start_relay(holding: Holding) -> ActorHandle:
    """It ends with this process, and is never started again by Ray."""
    place = holding.place
    kind = ray.remote(concurrency_groups=THREADS)(Relay)  # pyright: ignore[reportCallIssue] - not in its stubs
    where = PlacementGroupSchedulingStrategy(holding.group, placement_group_bundle_index=0)
    return kind.options(num_cpus=place.cpus, num_gpus=place.gpus, max_restarts=0, scheduling_strategy=where).remote(
        place.name, str(Path.cwd())
    )
