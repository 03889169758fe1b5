"""What runs on a node of a Ray cluster: a relay between one worker process group there and its supervisor elsewhere.

It holds no engine and touches no GPU. Nothing of the supervisor's environment comes with it: software, credentials and
paths are those of its node, so it makes sure of the model and the dataset they lead to before it passes a job on.
"""

import os
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.dataset import open_dataset
from common.errors import DataError, LopdError, UsageError
from common.lineage import CONTENT, ModelIdentity, identify
from common.local_cache import cache_dir
from common.models import pinned, resolve
from common.patience import patiently
from common.plans import another_plan, content
from common.prompts import load_prompts
from common.records import PLAN, read_plan
from common.storage import NotFound, Store
from precompute.config import Generate, Score
from precompute.engine.vllm_settings import engine_version
from precompute.fleet.local import Box, LocalReplica
from precompute.fleet.messages import Failed, FromWorker, Job, State, line, to_worker
from precompute.fleet.replica import Slot


class Heard(NamedTuple):
    """What came of one call to `Relay.hear`."""

    lines: tuple[bytes, ...]
    ended: str | None
    last_words: str


class Relay:
    """One at a time of the worker groups of one slot; each has a number, so that a late call meets no other.

    Calls come in three threads, one each for telling (`start`, `send`), hearing and ending, each in its order.
    """

    def __init__(self, name: str, working_directory: str) -> None:
        """Relative paths mean what they mean to the supervisor, where its working directory is there too."""
        with suppress(OSError):
            os.chdir(working_directory)
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # Ray counts GPUs as nvidia-smi does
        self._name, self._box = name, Box((), cache_dir() / "logs")
        self._number = -1
        self._replica: LocalReplica | None = None
        self._said: list[FromWorker] = []

    def gpus(self) -> tuple[str, ...]:
        """The GPUs that Ray gave to this process, by index or UUID; its workers inherit them."""
        return tuple(name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name)

    def start(self, number: int) -> None:
        """Start the worker process group of this number."""
        self._said = []
        self._replica = self._box.start(Slot(self._name, ()))
        self._number = number

    def send(self, number: int, text: bytes) -> None:
        """Pass a line on to the worker; a job, once it is sure that it can be done here."""
        replica = self._replica
        if number != self._number or replica is None:
            return
        message = to_worker(text)
        if not isinstance(message, Job):
            replica.send(message)
            return
        try:
            replica.send(at_home(message, self._said.append))
        except LopdError as error:
            told = f"node {socket.gethostname()}: {error}"
            self._said.append(Failed(exit_code=error.exit_code, text=told))
            replica.kill()

    def hear(self, number: int, seconds: float, started: None) -> Heard:
        """What worker and relay have told, when there is something, the worker has ended, or after so many seconds.

        Args:
            started: what `start` returned; Ray calls this when it is there.
        """
        replica = self._replica
        if number != self._number or replica is None:
            return Heard((), "SIGKILL", "")
        with selectors.DefaultSelector() as selector:
            selector.register(replica, selectors.EVENT_READ)
            selector.select(0 if self._said else seconds)
        ended = replica.ended()  # asked first, so that nothing it told before is left behind
        messages = replica.receive()
        while self._said:
            messages.append(self._said.pop(0))
        return Heard(tuple(map(line, messages)), ended, replica.last_words() if ended else "")

    def kill(self, number: int) -> None:
        """End the worker's process group, and return when its devices are free."""
        if number == self._number and self._replica is not None:
            self._replica.kill()


def at_home(job: Job, say: Callable[[State], None]) -> Job:
    """The job as it can be done on this node: its model's folder is one that is here.

    Args:
        say: told what it does meanwhile.

    Raises:
        UsageError: the model or the prompts are not to be had here, another vLLM is installed, or the dataset that is
            being made is not to be seen from here.
        DataError: the model or the prompts here are not those of the plan, or the dataset is another.
        RetryLater: the Hub or the store was away for longer than it may be.
    """
    config = Score.model_validate(job.section) if job.phase == "score" else Generate.model_validate(job.section)
    _require_engine(job)

    def find() -> Path:
        _require_dataset(job, config)
        _require_source(job, config)
        say(State(state="loading", detail=f"looking for {job.model}"))
        planned = ModelIdentity.model_validate(job.plan["teacher" if job.phase == "score" else "policy"])
        folder = resolve(pinned(job.model, planned.revision))
        _require_model(planned, folder)
        return folder

    def waits(text: str) -> None:
        say(State(state="storing", detail=text))

    return job.model_copy(update={"folder": str(patiently(find, config.fleet.storage_patience_s, waits))})


def _require_engine(job: Job) -> None:
    planned = job.plan["scoring_engine" if job.phase == "score" else "engine"]["version"]
    if engine_version() != planned:
        raise UsageError(
            f"here is {engine_version()}, the dataset is being made with {planned}",
            fix="Install the same lightning-opd and vLLM on every node of the Ray cluster",
        )


def _require_dataset(job: Job, config: Generate | Score) -> None:
    """A folder of that name may be on every node's own disk, where nobody would find what is committed."""
    store = Store(config.cache)
    try:
        theirs = read_plan(store)
    except NotFound:
        raise UsageError(
            "the dataset that is being made cannot be seen from here",
            where=f"{store.url}/{PLAN}",
            fix="Give a URL that every node reaches, or a folder that all of them share",
        ) from None
    if content(theirs) != content(job.plan):
        raise another_plan(theirs, job.plan, store.url)


def _require_source(job: Job, config: Generate | Score) -> None:
    """What rows are made from; prompts are also put where the workers of this node open them by their hash."""
    if isinstance(config, Score):
        what, where = "rollouts", config.rollouts
        same = open_dataset(config.rollouts).manifest_sha256 == job.plan["parent"]
    else:
        what, where = "prompts", config.prompts
        prompts = load_prompts(config.prompts, config.prompt_column, config.limit)
        same = prompts.sha256 == job.plan["prompts"]["sha256"]
    if not same:
        raise DataError(
            f"the {what} here are not those of the plan", where=where, fix="Give a URL that every node reaches"
        )


def _require_model(planned: ModelIdentity, folder: Path) -> None:
    found = identify(folder, planned.name)
    different = [key for key in CONTENT if getattr(found, key) != getattr(planned, key)]
    if different:
        raise DataError(
            f"the model here is not the one of the plan; it differs in {', '.join(different)}",
            where=str(folder),
            fix="Remove it here, or give the model as a Hub id or a URL",
        )
