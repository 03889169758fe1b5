"""run.json in the output: what the run is, for the report, the trackers and whoever finds the folder.

A checkpoint carries what a resumed run must agree with; this decides only where there is none, whether the metrics
beside it are those of the same course.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any
from uuid import uuid4

import torch
from pydantic import ValidationError

from common.config import Frozen
from common.lineage import ModelIdentity
from common.models import reference
from common.storage import NotFound, Store
from common.urls import clean_url
from trainer.config import OpdConfig
from trainer.header import settings_of
from trainer.run import Run

RECORD = "run.json"
PACKAGES = ("lightning-opd", "torch", "transformers")


class RunRecord(Frozen):
    """One run, from its first step to its last, however often it was resumed."""

    id: str
    """Random; the same after a resume, by which trackers go on where they were."""
    kind: str
    """`sft` or `opd`."""
    settings: dict[str, Any]
    """Every setting; places without user and password."""
    course: dict[str, Any]
    """What decides the course of training: settings, dataset and starting model; another course is another run."""
    start: ModelIdentity
    teacher: ModelIdentity | None
    data: dict[str, Any]
    round: int
    overrides: tuple[str, ...]
    total_steps: int
    ranks: int
    device: str
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """What people call it: the last part of the output."""
        return self.settings["output"].rstrip("/").rpartition("/")[2] or self.id

    def facts(self) -> dict[str, Any]:
        """All of it as plain values, for a tracker's page of settings."""
        return self.model_dump(mode="json", exclude={"course"})


def recorded(run: Run) -> RunRecord:
    """Write run.json and return it; the run that it may already speak of keeps its id. Raises as `Store` does."""
    store = Store(run.config.output)
    record, known = _describe(run), read_record(store)
    if known is not None and known.course == record.course:
        record = record.model_copy(update={"id": known.id})
    store.put(RECORD, (record.model_dump_json(indent=2) + "\n").encode())
    return record


def read_record(store: Store) -> RunRecord | None:
    """The record at an output; None where there is none, or one of another version."""
    try:
        return RunRecord.model_validate_json(store.get(RECORD))
    except (NotFound, ValidationError):
        return None


def course_of(run: Run) -> dict[str, Any]:
    """What decides the course of training, as run.json has it."""
    ours = {"data": run.inputs.dataset.manifest_sha256, "model": run.inputs.start.tensors_sha256}
    return {**settings_of(run.config), **ours}


def _describe(run: Run) -> RunRecord:
    config, inputs = run.config, run.inputs
    places = {"model": reference(config.model), "data": clean_url(config.data), "output": clean_url(config.output)}
    device = run.world.device
    return RunRecord(
        id=uuid4().hex[:16],
        kind="opd" if isinstance(config, OpdConfig) else "sft",
        settings={**config.model_dump(mode="json"), **places},
        course=course_of(run),
        start=inputs.start,
        teacher=inputs.provenance.teacher,
        data={
            "url": inputs.dataset.url,
            "manifest_sha256": inputs.dataset.manifest_sha256,
            "rows": inputs.dataset.num_rows,
            "held_out": len(inputs.held_out),
            "tokens": inputs.dataset.num_tokens,
        },
        round=inputs.provenance.round,
        overrides=inputs.provenance.overrides,
        total_steps=run.total_steps,
        ranks=run.world.size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions={package: _version(package) for package in PACKAGES},
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source"
