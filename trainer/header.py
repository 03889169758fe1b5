"""What a checkpoint is a checkpoint of, and whether a run may go on from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.config import Frozen
from common.errors import DataError, UsageError

FREE_TO_CHANGE = {
    "model", "data", "output", "read_ahead", "validate_every", "device", "logits_chunk", "activation_checkpointing",
    "compile", "replicas", "cpu_offload", "save_every", "keep_last", "resume", "export_dtype", "parity", "parity_mean",
    "parity_k3", "parity_rows", "allow_teacher_mismatch", "trackers", "tracker_project", "spent_ess", "spent_k3",
    "spent_clipped",
}  # fmt: skip
"""Settings that leave the course of training as it is. Places may change: content is pinned by its hash."""
LENGTH = {"epochs", "max_steps"}
"""Free too under a constant rate without warm-up, where a longer run begins with the very steps of a shorter one."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint is a checkpoint of."""

    step: int
    epoch: int
    step_in_epoch: int
    manifest_sha256: str
    start_sha256: str
    settings: dict[str, Any]
    overrides: Sequence[str] = ()
    """Checks that were overridden for it; said in the export too."""


def settings_of(config: Frozen) -> dict[str, Any]:
    """The settings that decide the course of training, by name."""
    every = config.model_dump(mode="json")
    free = FREE_TO_CHANGE | (LENGTH if every["schedule"] == "constant" and every["warmup"] == 0 else set())
    return {key: value for key, value in every.items() if key not in free}


def require_same_run(found: Header, ours: Header, where: str, *, what: str = "checkpoint") -> None:
    """Refuse to go on with another dataset, another starting model or other settings, naming what differs."""
    fix = "Give back the old settings, or choose another output"
    if found.manifest_sha256 != ours.manifest_sha256:
        raise DataError(f"the {what} was trained on another dataset", where=where, fix=fix)
    if found.start_sha256 != ours.start_sha256:
        raise DataError(f"the {what} started from another model", where=where, fix=fix)
    keys = sorted(found.settings.keys() | ours.settings.keys())
    different = [key for key in keys if found.settings.get(key) != ours.settings.get(key)]
    if different:
        pairs = ", ".join(
            f"{key} ({found.settings.get(key)} there, {ours.settings.get(key)} here)" for key in different
        )
        raise UsageError(f"the {what} was made with other settings: {pairs}", where=where, fix=fix)
