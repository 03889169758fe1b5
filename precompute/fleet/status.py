"""How a phase stands, as its supervisor knows it: what is shown, written to `status.json` and summed up at the end."""

from typing import Literal

from common.config import Frozen

Phase = Literal["sft_data", "rollouts", "score"]
ReplicaState = Literal["starting", "loading", "testing", "running", "storing", "idle", "draining", "ended"]

State = Literal["starting", "running", "draining", "complete", "stopped", "failed"]


class ReplicaStatus(Frozen):
    """One engine and the worker that holds it."""

    name: str
    """`0`, `1`, ...; with Ray the node too."""
    devices: str
    """`cpu`, or the GPUs by index: `0,1`."""
    state: ReplicaState
    detail: str
    shards: tuple[int, ...]
    """In flight."""
    in_engine: int
    """Rows."""
    rows: int
    tokens: int
    """Finished by this replica in this run; tokens are those of completions."""
    tokens_per_s: float
    """Over the last minute or so of running."""
    deaths: int
    beat_age_s: float


class Status(Frozen):
    """One phase on one box."""

    phase: Phase
    url: str
    dataset_id: str
    box: str
    """Host name and process id of the supervisor."""
    started_at: str
    """UTC, ISO 8601."""
    updated_at: str
    seconds: float
    state: State
    reason: str
    """Why it stopped or failed, in a line."""
    shards_total: int
    shards_done: int
    """By anybody."""
    shards_here: int
    """By this run on this box."""
    rows_total: int
    rows_done: int
    """In committed shards, and finished here in those in flight."""
    tokens: int
    """Of completions finished here."""
    tokens_per_s: float
    """All replicas, over the last minute or so."""
    eta_s: float | None
    cost: float | None
    """So far on this box; None without a price."""
    truncated: float | None
    """Share of rows committed here whose completion was cut at its longest length; None before the first shard."""
    rejected: int
    deaths: int
    storage_retries: int
    self_test: float | None
    """Largest difference of the scoring self-test, nats; None before it or where none is made."""
    replicas: tuple[ReplicaStatus, ...]
