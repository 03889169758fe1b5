"""Checkpoints of a run: sharded, written in the background to a folder or any URL, exact on resume.

    <output>/checkpoints/step-000050/.metadata   written last: the checkpoint exists if and only if this does
                                     *.distcp    weights and optimizer state of every rank

Everything that must agree is one DCP state: weights, moments, and a header with the position in the data, the manifest
of the dataset and the settings. There is no second file that could disagree.

A save that fails leaves the checkpoints before it alone and takes its own half away. One failure is a warning, for
outages pass and a full disk can be mended while training goes on; the second in a row ends the run.

Trust: torch unpickles `.metadata` and all that is no tensor when it loads, so whoever can write to the output can run
code in the run that resumes from it. OUTPUT must be as trusted as the code. That is also why the header may stay JSON
text, which torch pickles: as a tensor of bytes it would read better and guard nothing.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer
from transformers import PreTrainedModel

from common.errors import DataError, LopdError, RetryLater, StorageError
from common.storage import Store
from common.storage_errors import explain
from common.urls import is_url
from trainer.header import Header
from trainer.model import first_line
from trainer.world import World, is_lost_rank

MARKER = ".metadata"
TORCH_WRITER = "inline_container.cc"
"""In the message of torch's writer whose file took less than it gave."""
PATIENCE = 2
"""Saves in a row whose failure ends the run."""
FILE = re.compile(r"step-(\d+)/(.+)")
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Weights that do not train are those of the starting model, whose hash the header has: they are not saved again."""


class Checkpoints:
    """The checkpoints under one output, as one rank sees them; every method is called by all ranks together.

    Args:
        say: takes a warning for the person who watches.
    """

    def __init__(self, output: str, world: World, keep_last: int, say: Callable[[str], None]) -> None:
        self._store = Store(output).child("checkpoints")
        self._world, self._keep_last, self._say = world, keep_last, say
        self._writing: Any = None
        self._step, self._failures = 0, 0  # the step being written, and how many writes in a row have failed
        self._warned = False

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint, by a fresh listing; None when there is none."""
        steps = self._world.from_first(self._steps)
        return max(steps, default=None)

    def save(self, model: PreTrainedModel, optimizer: Optimizer, header: Header) -> float:
        """Copy the state to host memory now and write it in the background; waits for the write before this one.

        Returns:
            Seconds that training stood still for it: that wait, and the copy.

        Raises:
            StorageError, RetryLater: the write before this one failed, and so did the one before that.
        """
        began = time.monotonic()
        if (failure := self._settle()) is not None:
            if self._failures >= PATIENCE:
                raise failure
            self._say(f"WARNING: {failure.what} ({failure.where}). Training goes on; the next failure ends it")
        state = {**_state(model, optimizer), "lopd": json.dumps(asdict(header))}
        writer = _writer(self._url(header.step))
        self._step = header.step
        self._writing = async_save(state, storage_writer=writer, process_group=self._world.saving)
        return time.monotonic() - began

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the write under way, whatever ended the run: that checkpoint would be lost with it.

        Raises:
            StorageError, RetryLater: it failed, and nothing else has.
        """
        failure = self._settle()
        if failure is not None and kind is None:
            raise failure

    def _settle(self) -> LopdError | None:
        """Wait for the write under way; then what it makes superfluous is deleted, or what is left of it.

        Every rank learns of every rank's failure from DCP, so all return the same kind of thing.
        """
        if self._writing is None:
            return None
        failure = None
        try:
            self._writing.result()
        except (CheckpointException, OSError) as error:
            failure = _write_error(error, self._url(self._step))
            failure.shared = True
        self._writing = None
        self._failures = 0 if failure is None else self._failures + 1
        if self._world.is_first:
            self._prune(failed=self._step if failure else None)
        return failure

    def header(self, step: int) -> Header:
        """What the checkpoint says it is."""
        state = {"lopd": ""}
        self._load(state, step)
        return Header(**json.loads(state["lopd"]))

    def restore(self, model: PreTrainedModel, optimizer: Optimizer, step: int) -> None:
        """Load weights and moments, whatever the number of ranks that saved them."""
        state = _state(model, optimizer)
        self._load(state, step)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"], options=TRAINED
        )

    def _load(self, state: dict[str, Any], step: int) -> None:
        try:
            load(state, checkpoint_id=self._url(step), process_group=self._world.saving)
        except (CheckpointException, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and is_lost_rank(error):
                raise
            raise DataError(
                f"the checkpoint cannot be read: {first_line(_cause(error))}",
                where=self._url(step),
                fix="Delete this checkpoint folder; the run then resumes from the one before",
            ) from None

    def _files(self) -> dict[int, list[str]]:
        """The names of the files of each step, complete or not."""
        files: dict[int, list[str]] = {}
        for entry in self._store.list():
            if match := FILE.fullmatch(entry.name):
                files.setdefault(int(match[1]), []).append(match[2])
        return files

    def _steps(self) -> list[int]:
        return sorted(step for step, names in self._files().items() if MARKER in names)

    def _prune(self, failed: int | None) -> None:
        """Delete what is older than the checkpoints kept, also what an earlier deletion left half done, and the half
        checkpoint of the step that `failed`, which only takes room from the next.

        That costs nothing but room, so a store that does not let us delete is told of once and stops nothing.
        """
        try:
            files = self._files()
            complete = sorted(step for step, names in files.items() if MARKER in names)
            oldest_kept = min(complete[-self._keep_last :], default=0)
            for step in sorted(files):
                if step < oldest_kept or (step == failed and step not in complete):
                    self._delete(step, files[step])
        except (LopdError, OSError) as error:
            if not self._warned:
                self._say(f"WARNING: old checkpoints cannot be deleted and will pile up: {first_line(error)}")
            self._warned = True

    def _delete(self, step: int, names: Sequence[str]) -> None:
        for name in sorted(names, key=lambda name: name != MARKER):  # first: half deleted must not look complete
            self._store.remove(f"{self._folder(step)}/{name}")
        if not is_url(self._store.url):
            Path(self._url(step)).rmdir()

    def _url(self, step: int) -> str:
        return f"{self._store.url}/{self._folder(step)}"

    @staticmethod
    def _folder(step: int) -> str:
        return f"step-{step:06d}"


def _state(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    """The weights that train, each once though it may have two names, and their moments."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {"model": {name: weight for name, weight in weights.items() if name not in tied}, "optim": moments}


def _writer(url: str) -> FileSystemWriter:
    # Object stores have no fsync; without this, torch falls back to syncing every disk of the machine.
    return FsspecWriter(url, sync_files=False) if is_url(url) else FileSystemWriter(Path(url))


def _write_error(error: BaseException, url: str) -> LopdError:
    """What a failed write means for the user."""
    cause = _cause(error)
    known = explain(cause, "write", url) if isinstance(cause, Exception) else None
    kind = RetryLater if isinstance(known, RetryLater) else StorageError
    return kind(
        f"cannot write the checkpoint: {known.what if known else _plain(cause)}",
        where=url,
        fix="Mend the store, then run the same command: it resumes from the last complete checkpoint",
    )


def _plain(cause: BaseException) -> str:
    """Torch's writer of one tensor hides the failed write behind a complaint of its own about positions."""
    text = first_line(cause)
    return "a write broke off; is there space left?" if TORCH_WRITER in text else text


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that something went wrong on."""
    if isinstance(error, CheckpointException):
        return next((failure[0] for failure in error.failures.values()), error)
    return error
