"""A process that reads hostile shards, so that a crash, a hang or a full memory of its is a result and not our end."""

import multiprocessing
import resource
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common import parquet
from common.errors import DataError
from common.parquet_limits import Announced
from common.schema import Rollout, check_table, to_rows
from tests.common.rows import VOCAB, make_table

HANG_S = 60
"""After so long a read is a hang; one takes some milliseconds."""


@dataclass(frozen=True)
class Outcome:
    """What came of one read."""

    rows: list[Rollout] | None = None
    refusal: str = ""
    """The message of our own error."""
    failure: str = ""
    """Anything else: a traceback, or how the process died."""
    taken: int = 0
    """Bytes of memory that the process took for it at most."""


class Sandbox:
    """Reads shards in a process of its own that may have `memory` bytes more than it begins with."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._start()

    def read(self, data: bytes, announced: Announced | None, by_groups: bool = False) -> Outcome:
        """What a reader makes of `data`; one of pyarrow's own, without our checks, when nothing is announced."""
        self._pipe.send((data, announced, by_groups))
        try:
            if self._pipe.poll(HANG_S):
                return self._pipe.recv()
            failure = "it hangs"
        except (EOFError, OSError):
            self._process.join(HANG_S)
            failure = f"the process died, exit code {self._process.exitcode}"
        self.close()
        self._start()
        return Outcome(failure=failure)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._memory), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.poll(HANG_S) and self._pipe.recv() == "ready"


def _serve(pipe: Connection, memory: int) -> None:
    pa.set_memory_pool(pa.system_memory_pool())  # gives back what it frees, so that the peak is that of one read
    _outcome(*_honest(), by_groups=False)  # its threads take address space once and for all
    _limit(memory)
    pipe.send("ready")
    while True:
        data, announced, by_groups = pipe.recv()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
        before = _peak()
        pipe.send(replace(_outcome(data, announced, by_groups), taken=_peak() - before))


def _outcome(data: bytes, announced: Announced | None, by_groups: bool) -> Outcome:
    try:
        return Outcome(rows=_read(data, announced, by_groups))
    except DataError as error:
        return Outcome(refusal=str(error))
    except BaseException:  # noqa: BLE001 - everything but our own error is a finding, whatever it is
        return Outcome(failure=traceback.format_exc())


def _read(data: bytes, announced: Announced | None, by_groups: bool) -> list[Rollout]:
    if announced is None:
        return to_rows(pq.read_table(pa.BufferReader(data), use_threads=False))
    tables = parquet.iter_row_groups(data, announced, "a shard") if by_groups else iter(())
    whole = pa.concat_tables(tables) if by_groups and announced.rows else parquet.decode(data, announced, "a shard")
    scored = whole["teacher_logprobs"].null_count < len(whole)
    check_table(whole, vocab_size=VOCAB, scored=scored, where="a shard")
    return to_rows(whole)


def _honest() -> tuple[bytes, Announced]:
    table = make_table()
    return parquet.encode(table), parquet.announced(table)


def _limit(memory: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))


def _peak() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) * 1024
