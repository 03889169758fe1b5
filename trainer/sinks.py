"""Where the numbers of a run go: metrics.jsonl in the output, and one line a step for whoever watches.

The file has every step once, also after a crash and a resume. On an object store, which knows no appending, it is
written whole at every checkpoint; what a crash loses there is computed again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import StorageError
from common.progress import duration
from common.storage import NotFound, Store
from common.urls import is_url

METRICS = "metrics.jsonl"


class MetricsFile:
    """The lines of metrics.jsonl, those of steps up to `resumed` kept, later ones dropped: they are made anew."""

    def __init__(self, output: str, resumed: int) -> None:
        self._store = Store(output)
        self._appendable = not is_url(self._store.url)
        self._lines = [line for line in _stored_lines(self._store) if json.loads(line)["step"] <= resumed]
        self._store.put(METRICS, self._text())

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the line of one step."""
        self._lines.append(json.dumps(record))
        if self._appendable:
            self._write_line(Path(self._store.url) / METRICS)

    def _write_line(self, path: Path) -> None:
        try:
            with open(path, "a") as file:
                file.write(self._lines[-1] + "\n")
        except OSError as error:
            fix = "Mend it, then run the same command: it resumes from the last checkpoint"
            raise StorageError(f"cannot write the metrics: {error.strerror}", where=str(path), fix=fix) from None

    def flush(self) -> None:
        """Make all lines so far readable at the output."""
        if not self._appendable:
            self._store.put(METRICS, self._text())

    def _text(self) -> bytes:
        return "".join(line + "\n" for line in self._lines).encode()


def _stored_lines(store: Store) -> list[str]:
    """Whole lines only: a killed run may leave the last one torn."""
    try:
        return store.get(METRICS).decode().split("\n")[:-1]
    except NotFound:
        return []


def step_line(record: Mapping[str, Any], total: int, seconds_left: float) -> str:
    """One step for a person: `step 12/150  loss 0.1234  ...  3,100 tok/s  4m12s left`."""
    shown = [f"step {record['step']:.0f}/{total}", f"loss {record['loss']:.4f}"]
    if "kl/teacher_k1" in record:
        shown += [
            f"k1 {record['kl/teacher_k1']:.4f}",
            f"ratio {record['ratio/mean']:.3f} (max {record['ratio/max']:.2f}, ess {record['ratio/ess']:.2f})",
        ]
    shown += [
        f"|g| {record['optim/grad_norm']:.3f}",
        f"lr {record['optim/lr']:.2e}",
        f"{record['perf/tokens_per_s']:,.0f} tok/s",
        f"{duration(seconds_left)} left",
    ]
    return "  ".join(shown)
