"""One engine process: take shards from the supervisor, stream them through the engine, commit each as it fills.

Rows of the next shard enter the engine while the last ones of this shard still run, so the engine never drains between
shards. The next shard is fetched, and a full one encoded and uploaded, in threads beside the step loop.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

from common.dataset_writer import DatasetWriter
from common.errors import LopdError
from common.patience import patiently
from common.schema import Rollout, to_table, widths_in
from common.storage import Store
from precompute.config import Generate, Score
from precompute.engine.requests import EngineDied
from precompute.fleet.channel import Channel
from precompute.fleet.messages import Beat, Committed, Failed, Job, Note, State, Storage, Want, Work
from precompute.pulse import BEAT_S, Drained, Pulse
from precompute.tasks import Row, SamplingTask, ScoringTask, Task

UPLOADS_WAITING = 2
"""Full shards held in memory while earlier ones upload; a slow store then slows the engine, not the box."""
RESCUE_S = 300.0
"""For which shards that are whole may still be stored when the engine is gone: they took about as long to make."""
BUG = 70
"""Exit code of what is nobody's mistake but ours (EX_SOFTWARE of sysexits.h)."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Assignment:
    """A shard to do, and its rows."""

    work: Work
    rows: Sequence[Row]

    @property
    def suspects(self) -> list[Row]:
        return [row for row in self.rows if row.uid in self.work.suspects]

    @property
    def others(self) -> list[Row]:
        return [row for row in self.rows if row.uid not in self.work.suspects]


class Worker:
    """The engine's process, from the first shard to the last."""

    def __init__(self, channel: Channel, job: Job, config: Generate | Score) -> None:
        self._channel, self._config, self._job = channel, config, job
        self._writer = DatasetWriter(Store(config.cache, single_writer=config.single_writer), job.plan)
        self._pulse = Pulse(channel, self._rescue)
        channel.tell(State(state="loading", detail=job.model))
        self._task: Task = (
            ScoringTask(config, job, self._pulse, self._say)
            if isinstance(config, Score)
            else SamplingTask(config, job, self._pulse, self._say, self._note)
        )
        self._window = self._task.engine.window
        self._filling: dict[int, dict[int, Rollout]] = {}
        self._assigned: dict[int, Assignment] = {}
        self._waiting: list[Future[None]] = []
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._untested, self._noise = True, cast("float | None", None)

    def run(self) -> None:
        """Work until there is nothing left, or time is over.

        What fails is raised at once, though the threads beside may go on waiting for a store.
        """
        try:
            while (assignment := self._next()) is not None:
                while assignment is not None:
                    assignment = self._stream(assignment)
                self._commit_waiting(0)
        except Drained:
            pass
        except EngineDied:
            self._commit_waiting(0)  # shards that are whole outlive their engine
            raise
        self._commit_waiting(0)
        self._task.close()

    def _stream(self, first: Assignment) -> Assignment | None:
        """Do a shard and those after it until none is left for now, or one with suspects comes, which is returned."""
        if self._untested and first.rows and not first.work.suspects:
            self._untested = False
            if isinstance(self._config, Score) and self._config.fleet.self_test:
                self._channel.tell(State(state="testing"))
            self._pulse.expect(first.rows)  # an engine may die of these, too
            self._noise = self._task.self_test(first.rows)
            self._pulse.take_refused()  # they will be refused again, in their shard
        self._channel.tell(State(state="running"))
        if first.work.suspects:
            self._begin(first)
            self._make(iter(first.suspects), first.work.window or 1)
            self._make(iter(first.others), self._window)
            return None
        following: list[Assignment] = []
        self._make(self._rows(first, following), self._window)
        return following[0] if following else None

    def _rows(self, assignment: Assignment | None, following: list[Assignment]) -> Iterator[Row]:
        while assignment is not None:
            if assignment.work.suspects:
                following.append(assignment)
                return
            self._begin(assignment)
            ahead = self._fetcher.submit(self._ahead)
            yield from assignment.rows
            self._leave_out_refused()  # an engine that takes nothing gives nothing back, and the shards would pile up
            assignment = self._wait_for(ahead)
            if self._channel.draining:
                return

    def _make(self, rows: Iterator[Row], window: int) -> None:
        self._task.engine.window = window
        for row, rollout in self._task.work(rows):
            self._pulse.finished(row.uid, len(rollout.completion_ids))
            self._filling[row.shard][row.row] = rollout
            self._leave_out_refused()
            self._full_if_whole(row.shard)
            if self._waiting and self._waiting[0].done():
                self._waiting.pop(0).result()  # what a commit raised ends the work now, not with the next whole shard
        self._leave_out_refused()

    def _leave_out_refused(self) -> None:
        """Rows that the engine would not take leave their shard, whose commit names them; it is whole without them."""
        for refused in self._pulse.take_refused():
            shard, assignment = refused.shard, self._assigned[refused.shard]
            rejected = {**assignment.work.rejected, refused.uid: refused.reason}
            self._assigned[shard] = Assignment(
                assignment.work.model_copy(update={"rejected": rejected}),
                [row for row in assignment.rows if row.uid != refused.uid],
            )
            self._full_if_whole(shard)

    def _full_if_whole(self, shard: int) -> None:
        if shard in self._filling and len(self._filling[shard]) == len(self._assigned[shard].rows):
            self._full(shard)

    def _next(self) -> Assignment | None:
        """A shard for an engine that has nothing to do, with its rows; None when there will be none."""
        self._channel.tell(State(state="idle"))
        work = self._channel.ask(Want(idle=True))
        return None if work is None else self._wait_for(self._fetcher.submit(self._fetch, work))

    def _ahead(self) -> Assignment | None:
        """The next shard while this one is in the engine; None when there is none for now."""
        work = self._channel.ask(Want(idle=False))
        return None if work is None else self._fetch(work)

    def _fetch(self, work: Work) -> Assignment:
        rows = patiently(lambda: self._task.rows(work.shard), self._config.fleet.storage_patience_s, self._say)
        return Assignment(work, [row for row in rows if row.uid not in work.rejected])

    def _begin(self, assignment: Assignment) -> None:
        shard = assignment.work.shard
        self._assigned[shard], self._filling[shard] = assignment, {}
        self._pulse.expect(assignment.rows)
        if not assignment.rows:
            self._full(shard)

    def _full(self, shard: int) -> None:
        """Hand a whole shard on to be committed, and wait if too many are."""
        self._pulse.flush()
        rows = [rollout for _, rollout in sorted(self._filling.pop(shard).items())]
        rejected = self._assigned.pop(shard).work.rejected
        self._waiting.append(self._committer.submit(self._commit, shard, rows, rejected))
        self._commit_waiting(UPLOADS_WAITING)

    def _commit_waiting(self, at_most: int) -> None:
        """Return when no more than so many commits are under way; raises what one of them raised."""
        while self._waiting and self._waiting[0].done():
            self._waiting.pop(0).result()
        while len(self._waiting) > at_most:
            self._wait_for(self._waiting.pop(0))

    def _wait_for(self, future: Future[Result]) -> Result:
        """What a thread beside the step loop comes to; a wait for the store must not look like an engine that hangs.

        Nor must a verifier that hangs on many completions look like a store that does: each that it is done with is
        told, and begins the wait anew.
        """
        if future.done():
            return future.result()
        judged = self._task.judged
        self._channel.tell(State(state="storing"))
        while not wait([future], BEAT_S).done:
            self._pulse.flush()
            if judged != self._task.judged:
                judged = self._task.judged
                self._channel.tell(State(state="storing", detail=f"{judged:,} completions verified"))
        self._channel.tell(State(state="running"))
        return future.result()

    def _rescue(self) -> None:
        """Have shards stored that are whole, while the step loop waits for ever for an engine that is gone."""
        waiting, deadline = [*self._waiting], time.monotonic() + RESCUE_S
        self._channel.tell(State(state="storing", detail="its engine is gone"))
        while wait(waiting, BEAT_S).not_done and time.monotonic() < deadline:
            self._channel.tell(Beat())

    def _commit(self, shard: int, rows: list[Rollout], rejected: dict[str, str]) -> None:
        """Encode, upload and commit one shard; a store that fails is waited for."""
        kept, stats = self._task.finish(rows, f"{self._writer.url}, shard {shard}")
        if self._noise is not None:
            stats["self_test"] = self._noise
        table = to_table(kept, *widths_in(self._job.plan))
        commit = patiently(
            lambda: self._writer.commit(shard, table, stats, rejected),
            self._config.fleet.storage_patience_s,
            self._say,
        )
        self._channel.tell(Committed(shard=shard, rows=commit.rows, tokens=commit.tokens, stats=commit.stats))

    def _say(self, line: str) -> None:
        self._channel.tell(Storage(text=line))

    def _note(self, line: str) -> None:
        self._channel.tell(Note(text=line))


def main(descriptor: int) -> None:
    """Serve the supervisor at the other end of this socket. It alone decides when to stop, so signals are its own."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    job = channel.job()
    config = Score.model_validate(job.section) if job.phase == "score" else Generate.model_validate(job.section)
    try:
        Worker(channel, job, config).run()
        os._exit(0)  # PyTorch takes seconds to take itself apart, and the next phase waits for the device
    except EngineDied as error:
        _end(
            channel, Failed(exit_code=error.exit_code, text=str(error), out_of_memory=error.out_of_memory, engine=True)
        )
    except LopdError as error:
        _end(channel, Failed(exit_code=error.exit_code, text=str(error)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor must hear of it
        traceback.print_exc()
        _end(channel, Failed(exit_code=BUG, text=f"{type(error).__name__}: {error}"))


def _end(channel: Channel, failure: Failed) -> NoReturn:
    channel.tell(failure)
    sys.exit(failure.exit_code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
