"""What a run's output already holds: steps of this very run to go on from, or another run's work, which is kept."""

import json
from dataclasses import replace
from typing import Any

from common.errors import UsageError
from common.models import CONFIG
from common.storage import NotFound, Store
from common.urls import clean_url
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.export import RECORD, is_exported
from trainer.header import Header, require_same_run
from trainer.run import Run
from trainer.watch.run_record import course_of, read_record
from trainer.watch.sinks import METRICS, stored_records

ELSEWHERE = "Choose another output"


def resumable(run: Run, checkpoints: Checkpoints) -> Header | None:
    """What the output already has: its newest checkpoint, or a complete export without any; None to begin.

    Raises:
        UsageError, DataError: the output belongs to another run, or has more steps than are asked for.
    """
    step = checkpoints.newest()
    if step is None:
        return run.world.from_first(lambda: _without_checkpoint(run, Store(run.config.output)))
    where = f"{Store(run.config.output).url}/checkpoints/step-{step:06d}"
    if run.config.resume == "never":
        raise UsageError("the output holds a checkpoint and resume=never", where=where, fix=ELSEWHERE)
    found = checkpoints.header(step)
    require_same_run(found, run.header(step), where)
    _require_no_longer(step, run, where)
    return found


def require_own_place(config: TrainConfig) -> None:
    """Refuse an output that would write into what the run reads.

    Raises:
        UsageError: the output is the dataset or the starting model, or its export would take that model's place.
    """
    output = clean_url(config.output)
    for what, place in (("dataset", config.data), ("starting model", config.model)):
        if clean_url(place) in (output, f"{output}/export"):
            raise UsageError(f"the output would be written into the {what}", where=output, fix=ELSEWHERE)


def _require_no_longer(step: int, run: Run, where: str) -> None:
    if step > run.total_steps:
        raise UsageError(
            f"the output already has {step} steps, more than the {run.total_steps} asked for",
            where=where,
            fix="Raise max_steps or epochs, or choose another output",
        )


def _without_checkpoint(run: Run, output: Store) -> Header | None:
    """The export of this very run where it is there, None where nothing would be lost by beginning."""
    exported, told = _exported(output), bool(stored_records(output))
    if run.config.resume == "never" and (exported is not None or told):
        held = "an export" if exported is not None else METRICS
        raise UsageError(f"the output holds {held} and resume=never", where=output.url, fix=ELSEWHERE)
    if exported is not None:
        where = f"{output.url}/export"
        require_same_run(exported, run.header(exported.step), where, what="export")
        _require_no_longer(exported.step, run, where)
        same = replace(run, inputs=run.inputs.overridden(exported.overrides))
        if is_exported(output.url, same.export_spec()):
            return exported
    if told:
        _require_own_metrics(run, output)
    return None


def _exported(output: Store) -> Header | None:
    """What the export at an output was made of; None where there is none."""
    store = output.child("export")
    try:
        known: Any = json.loads(store.get(RECORD))
        return Header(**{key: value for key, value in known.items() if key != "dtype"})
    except NotFound:
        if not store.exists(CONFIG):
            return None
    except (ValueError, TypeError, AttributeError):
        pass
    raise UsageError("the output holds an export that does not say what it was made of", where=store.url, fix=ELSEWHERE)


def _require_own_metrics(run: Run, output: Store) -> None:
    record, ours = read_record(output), course_of(run)
    course = record.course if record else {}
    different = sorted(key for key in course.keys() | ours.keys() if course.get(key) != ours.get(key))
    if different:
        raise UsageError(
            f"the output holds {METRICS} of another run, and no checkpoint; what differs: {', '.join(different)}",
            where=output.url,
            fix="Give back the old settings, or choose another output",
        )
