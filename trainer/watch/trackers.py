"""TensorBoard, Weights & Biases and trackio: the same figures once more, where a team likes to look at them.

metrics.jsonl is the truth; a tracker that fails later on is dropped with a warning and stops nothing. A resumed run
goes on where it was: in W&B and trackio by the id in run.json, in TensorBoard because what is made anew hides what was
there. None gets more than figures and run.json: no code, no command line, no console output, no environment.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from sqlite3 import Error as SQLiteError
from sys import stderr
from typing import Any, Protocol

from common.errors import LopdError, UsageError
from common.local_cache import cache_dir
from common.storage import Store
from common.urls import clean_url, is_url
from trainer.config import Tracker
from trainer.watch.run_record import RunRecord


class Sink(Protocol):
    """What a run asks of a tracker."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """The trackers of a run. Those that cannot be opened are an error, those that break later a warning."""

    def __init__(self, names: Sequence[Tracker], record: RunRecord, resumed: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Sink] = {name: opened(name, record, resumed) for name in names}

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand on the finite numbers of a step."""
        known = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        figures = {name: float(value) for name, value in known.items()}
        self._each(lambda sink: sink.log(record["step"], figures))

    def flush(self) -> None:
        """Make what was logged readable."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Hand over the rest and end."""
        self._each(lambda sink: sink.close())

    def _each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                action(sink)
            except (LopdError, OSError) as error:
                self._say(f"WARNING: {name} is left out from here on: {error}. metrics.jsonl has every step")
                del self._open[name]


def require_trackers(names: Sequence[Tracker]) -> None:
    """Refuse a tracker whose package is not installed, before any work."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"trackers={name} needs the package {name}", fix=f"Install lightning-opd[{name}]")


class TensorBoard:
    """Event files in <output>/tensorboard; for a URL they are written to the local cache and copied at every flush."""

    def __init__(self, record: RunRecord, resumed: int) -> None:
        output = record.settings["output"]
        self._target = Store(output).child("tensorboard") if is_url(clean_url(output)) else None
        self._folder = cache_dir() / "tensorboard" / record.id if self._target else Path(output) / "tensorboard"
        writer: Any = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(self._folder), purge_step=resumed + 1)  # a killed run left points
        self._writer.add_text("run", f"```\n{json.dumps(record.facts(), indent=2)}\n```", resumed)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        if self._target is not None:
            for file in sorted(self._folder.glob("events.*")):
                self._target.put(file.name, file.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_* variables say where and as whom."""

    def __init__(self, record: RunRecord, resumed: int) -> None:
        wandb: Any = import_module("wandb")
        output = record.settings["output"]
        folder = cache_dir() if is_url(output) else Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        unsaid = dict.fromkeys(("disable_git", "disable_code", "disable_job_creation", "x_disable_meta"), True)
        try:
            self._run = wandb.init(
                project=record.settings["tracker_project"],
                id=record.id,
                name=record.name,
                config=record.facts(),
                resume="allow",
                dir=str(folder),
                settings=wandb.Settings(console="off", quiet=True, **unsaid),
            )
        except wandb.errors.Error as error:
            raise UsageError(
                f"Weights & Biases cannot be used: {str(error).partition(chr(10))[0]}",
                fix="Log in with `wandb login`, or set WANDB_MODE=offline and `wandb sync` later",
            ) from None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)  # a step that it already has is left as it is

    def flush(self) -> None: ...

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, by default in its folder on this machine; TRACKIO_* variables say otherwise."""

    def __init__(self, record: RunRecord, resumed: int) -> None:
        self._trackio: Any = import_module("trackio")
        with redirect_stdout(stderr):
            self._trackio.init(
                project=record.settings["tracker_project"],
                name=f"{record.name}-{record.id}",
                config=record.facts(),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._trackio.log(dict(figures), step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        with redirect_stdout(stderr):
            self._trackio.finish()


OPENERS: dict[Tracker, Callable[[RunRecord, int], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def opened(name: Tracker, record: RunRecord, resumed: int) -> Sink:
    """The tracker, ready to log. Raises UsageError, with its name, where the package cannot open it."""
    try:
        return OPENERS[name](record, resumed)
    except (OSError, ValueError, *_own_errors(name)) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"trackers={name} cannot be opened: {said}", fix="Mend it, or leave it out") from None


def _own_errors(name: Tracker) -> tuple[type[Exception], ...]:
    """What a package raises besides OSError and ValueError; W&B's are told where it is opened."""
    if name != "trackio":
        return ()
    own, http = import_module("trackio.exceptions"), import_module("httpx")
    return own.TrackioAPIError, http.HTTPError, http.InvalidURL, SQLiteError
