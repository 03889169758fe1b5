"""Where the figures of a run go: metrics.jsonl in the output, a line for whoever watches, and the trackers.

The file has every step once, also after a crash and a resume. On an object store, which knows no appending, it is
written whole at every checkpoint and when the run ends, by an error too; what a kill loses there is computed again.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import DataError, LopdError, StorageError
from common.storage import NotFound, Store
from common.urls import is_url
from trainer.run import Run
from trainer.watch.advice import advice, limits_of, runaway, signs
from trainer.watch.live import Live
from trainer.watch.run_record import recorded
from trainer.watch.trackers import Trackers

METRICS = "metrics.jsonl"


class MetricsFile:
    """The lines of metrics.jsonl, those of steps up to `resumed` kept, later ones dropped: they are made anew."""

    def __init__(self, output: str, resumed: int) -> None:
        self._store = Store(output)
        self._appendable = not is_url(self._store.url)
        self.records = [record for record in stored_records(self._store) if record["step"] <= resumed]
        self._store.put(METRICS, self._text())

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the line of one step."""
        self.records.append(dict(record))
        if self._appendable:
            self._write_line(Path(self._store.url) / METRICS)

    def _write_line(self, path: Path) -> None:
        try:
            with open(path, "a") as file:
                file.write(_line(self.records[-1]))
        except OSError as error:
            fix = "Mend it, then run the same command: it resumes from the last checkpoint"
            raise StorageError(f"cannot write the metrics: {error.strerror}", where=str(path), fix=fix) from None

    def flush(self) -> None:
        """Make all lines so far readable at the output."""
        if not self._appendable:
            self._store.put(METRICS, self._text())

    def _text(self) -> bytes:
        return "".join(map(_line, self.records)).encode()


class Watch:
    """What becomes of the figures of a run's steps; lives on rank 0 alone."""

    def __init__(self, run: Run, resumed: int) -> None:
        self._run = run
        # Stored log-probs of another temperature differ from the student's by more than drift.
        self._limits = limits_of(run.config) if run.inputs.dataset.plan["sampling"]["temperature"] == 1 else ()
        self._file = MetricsFile(run.config.output, resumed)
        self._about = recorded(run)
        self._trackers = Trackers(run.config.trackers, self._about, resumed, run.say)
        self._live = Live(run.total_steps, run.say)
        self._told_runaway = any(map(runaway, self._file.records))
        self._told = any("spent" in record for record in self._file.records)

    def step(self, figures: Mapping[str, Any]) -> None:
        """Tell of a step: to the file, the trackers and the person; warn once when the rollouts are spent."""
        record = finite(figures)
        if found := signs([*self._file.records, record], self._limits):
            record["spent"] = found
        self._file.append(record)
        self._trackers.log(record)
        self._live.step(record)
        if (said := runaway(record)) and not self._told_runaway:
            self._run.say(f"WARNING: {said}")
            self._told_runaway = self._told = True
        if found and not self._told:
            said = advice(found, output=self._about.settings["output"], round_=self._about.round)
            self._run.say(f"WARNING: {said}")
            self._told = True

    def flush(self) -> None:
        """Make what was told readable; before a save, for a checkpoint without its lines could not be mended."""
        self._file.flush()
        self._trackers.flush()

    def close(self) -> None:
        """Make readable what was told since the last save, and end the trackers' runs; neither hides why a run ends."""
        try:
            self._file.flush()
        except (LopdError, OSError) as error:
            self._run.say(f"WARNING: the last lines of {METRICS} are lost: {error}")
        self._trackers.close()


@contextmanager
def watched(run: Run, resumed: int) -> Iterator[Watch | None]:
    """The run's watch on rank 0, None elsewhere; what goes wrong when it opens is raised on every rank."""
    opened: list[Watch] = []
    run.world.from_first(lambda: opened.append(Watch(run, resumed)))
    try:
        yield opened[0] if opened else None
    finally:
        for watch in opened:
            watch.close()


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: a figure that is either is None."""
    bad = {name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in bad else value for name, value in figures.items()}


def stored_records(store: Store) -> list[dict[str, Any]]:
    """The records of metrics.jsonl by step; of a step that is there twice, the last.

    Whole lines only, for a killed run may leave the last one torn. Raises DataError for any other that is no record.
    """
    try:
        lines = store.get(METRICS).split(b"\n")[:-1]
    except NotFound:
        return []
    records = [_record(line, f"{store.url}/{METRICS}, line {number}") for number, line in enumerate(lines, 1)]
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DataError("this line is no record of a step", where=where, fix="Delete the line, or move the file away")
    return record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
