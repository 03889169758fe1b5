"""Statuses made up for the tests of what is shown and written of them."""

from typing import Any

from precompute.fleet.status import ReplicaStatus, Status


def make_replica(name: str = "0", **changes: Any) -> ReplicaStatus:
    """An engine at work."""
    values: dict[str, Any] = {
        "name": name,
        "devices": "0,1",
        "state": "running",
        "detail": "",
        "shards": (12, 20),
        "in_engine": 256,
        "rows": 700,
        "tokens": 812_345,
        "tokens_per_s": 1700.4,
        "deaths": 0,
        "beat_age_s": 0.4,
    }
    return ReplicaStatus(**(values | changes))


def make_status(**changes: Any) -> Status:
    """A phase under way on two replicas."""
    values: dict[str, Any] = {
        "phase": "score",
        "url": "s3://bucket/run1/scored",
        "dataset_id": "0123456789abcdef",
        "box": "gpu-box-4711",
        "started_at": "2026-01-02T03:04:05+00:00",
        "updated_at": "2026-01-02T03:14:05+00:00",
        "seconds": 600.0,
        "state": "running",
        "reason": "",
        "shards_total": 64,
        "shards_done": 12,
        "shards_here": 7,
        "rows_total": 4096,
        "rows_done": 806,
        "tokens": 1_624_690,
        "tokens_per_s": 3400.8,
        "eta_s": 1920.0,
        "cost": 4.2,
        "truncated": 0.031,
        "rejected": 0,
        "deaths": 0,
        "storage_retries": 0,
        "self_test": 0.0012,
        "replicas": (make_replica("0"), make_replica("1", devices="2,3")),
    }
    return Status(**(values | changes))


def starting(**changes: Any) -> Status:
    """The same before anything is done: one engine loads its model, the other has not begun to."""
    replicas = (
        make_replica("0", state="loading", shards=(), in_engine=0, rows=0, tokens=0, tokens_per_s=0.0),
        make_replica("1", state="starting", shards=(), in_engine=0, rows=0, tokens=0, tokens_per_s=0.0),
    )
    values: dict[str, Any] = {
        "state": "starting",
        "seconds": 3.0,
        "shards_done": 0,
        "shards_here": 0,
        "rows_done": 0,
        "tokens": 0,
        "tokens_per_s": 0.0,
        "eta_s": None,
        "cost": None,
        "truncated": None,
        "self_test": None,
        "replicas": replicas,
    }
    return make_status(**(values | changes))
