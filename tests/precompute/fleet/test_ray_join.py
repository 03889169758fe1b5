"""Which cluster is joined, and where on it replicas can be."""

import socket

import pytest

from common.errors import UsageError
from precompute.config import Engine, Fleet
from precompute.fleet.ray_cluster import places
from precompute.fleet.ray_join import join_ray


def node(name: str, **resources: float) -> dict[str, object]:
    return {"NodeID": f"{name}0123456789", "NodeManagerHostname": name, "Resources": resources}


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("address", ["local", "ray://127.0.0.1:10001", "closed"])
def test_without_a_running_cluster_it_says_how_to_start_one(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port()}" if address == "closed" else address)
    with pytest.raises(UsageError, match="ray start --head"):
        join_ray(Fleet(on="ray"), Engine())


def test_replicas_of_two_gpus_share_out_each_node_and_none_spans_two() -> None:
    nodes = [node("alpha", GPU=4, CPU=8), node("beta", GPU=3, CPU=8), node("head", CPU=8)]
    found = places(nodes, 2)
    assert [place.name for place in found] == ["alpha-alpha0.0", "alpha-alpha0.1", "beta-beta01.0"]
    assert {(place.gpus, place.cpus) for place in found} == {(2, 0)}


def test_where_engines_compute_on_the_cpu_a_replica_takes_a_whole_node() -> None:
    found = places([node("alpha", CPU=8), node("head")], 0)
    assert [(place.name, place.gpus, place.cpus) for place in found] == [("alpha-alpha0", 0, 8)]


def test_a_model_wider_than_every_node_has_no_place() -> None:
    assert places([node("alpha", GPU=4), node("beta", GPU=4)], 8) == []
