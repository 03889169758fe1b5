"""The crew of a run: workers and readers, blows at random moments, and a replacement for everyone who ends."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

from tests.chaos.content import Round
from tests.chaos.member import INTERRUPTED, Task, main
from tests.common.faults import Faults

OURS = (64, 65, 74, 75)
"""Exit codes of our errors: the job stopped in order, and the same command resumes it."""
TICK_S = 0.02
ROUND_LIMIT_S = 300
"""A dataset that is not finished by then is given up, and what it lacks is lost."""
LAST_WORDS_S = 60
"""How long those still at work after the last dataset may take."""


@dataclass(frozen=True)
class Aims:
    """How much must have happened before a run may end."""

    kills: int
    interrupts: float
    """Share of blows that are Ctrl-C; the others are kill -9."""
    requests_per_blow: int
    """On average; so work and blows keep step on a slow machine, too."""
    faults: int
    shards: int
    workers: int
    readers: int
    shards_per_round: int
    pace: float
    writer: str
    seed: int


@dataclass
class Member:
    """A process, what it does, and the signal it was sent."""

    task: Task
    process: BaseProcess
    blow: int | None = None


@dataclass
class Crew:
    """All processes of a run; `work` is its story."""

    aims: Aims
    bucket: str
    environment: Mapping[str, str]
    folder: Path
    faults: Faults
    rounds: list[Round] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    """How processes ended: `killed`, `interrupted`, `finished`, `exit 75`, ..."""
    crashes: list[Path] = field(default_factory=list)
    """Logs of those that ended by an error that is none of ours."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.aims.seed)
        self.processes = multiprocessing.get_context("forkserver")  # forks in milliseconds what took a second to import
        self.processes.set_forkserver_preload(["tests.chaos.member", "s3fs"])
        self.members: list[Member] = []
        self.started = 0
        self.next_blow = self.random.expovariate(1 / self.aims.requests_per_blow)
        """The number of the request after which it falls."""

    def work(self) -> None:
        """Fill one dataset after the other until all aims are reached, then let everyone end."""
        try:
            while not self.reached():
                self.fill(self.new_round())
            self.let_end()
        finally:
            for member in self.members:
                member.process.kill()

    def reached(self) -> bool:
        """Whether enough has happened."""
        shards = sum(place.shards for place in self.rounds)
        faults = sum(self.faults.injected.values())
        return shards >= self.aims.shards and self.ends["killed"] >= self.aims.kills and faults >= self.aims.faults

    def new_round(self) -> Round:
        """The next dataset, on which all workers that start from now on work; in a small one they race for shards."""
        number, shards = len(self.rounds), self.random.randint(1, 2 * self.aims.shards_per_round - 1)
        self.rounds.append(Round(f"{self.bucket}/{number}", number, shards, self.aims.seed))
        return self.rounds[-1]

    def fill(self, place: Round) -> None:
        """Keep all at work, and strike at them, until a worker says that the dataset is finished."""
        give_up = time.monotonic() + ROUND_LIMIT_S
        while time.monotonic() < give_up:
            if any(member.task.place == place for member in self.reap()):
                return
            self.replace()
            if len(self.faults.requests) >= self.next_blow:
                time.sleep(self.random.uniform(0, self.aims.pace))  # else no blow would fall while a worker computes
                self.strike()
                self.next_blow = len(self.faults.requests) + self.random.expovariate(1 / self.aims.requests_per_blow)
            time.sleep(TICK_S)
        self.ends["datasets given up"] += 1

    def reap(self) -> list[Member]:
        """Note how those ended that did; returns the workers that finished their dataset."""
        ended = [member for member in self.members if not member.process.is_alive()]
        for member in ended:
            self.members.remove(member)
            self.note(member)
        return [member for member in ended if member.task.role == "write" and member.process.exitcode == 0]

    def note(self, member: Member) -> None:
        code = member.process.exitcode
        if code == -signal.SIGKILL:
            self.ends["killed"] += 1
        elif code == INTERRUPTED or (code and member.blow == signal.SIGINT):
            self.ends["interrupted"] += 1
        elif code == 0:
            self.ends[f"{member.task.role} finished"] += 1
        elif code in OURS:
            self.ends[f"{member.task.role} exit {code}"] += 1
        else:
            self.ends["crashed"] += 1
            self.crashes.append(member.task.log)

    def replace(self) -> None:
        """Start whom the crew lacks: workers on the newest dataset, readers on any."""
        for role, wanted in (("write", self.aims.workers), ("read", self.aims.readers)):
            for _ in range(wanted - sum(member.task.role == role for member in self.members)):
                place = self.rounds[-1] if role == "write" else self.random.choice(self.rounds[-4:])
                self.start(role, place)

    def start(self, role: str, place: Round) -> None:
        self.started += 1
        cache = {"LOPD_CACHE_DIR": str(self.folder / f"{self.started}.cache")}  # new, so that every read goes out
        task = Task(
            role, self.aims.writer, place, self.started, self.aims.pace, {**self.environment, **cache}, self.folder
        )
        process = self.processes.Process(target=main, args=(task,), daemon=True)
        process.start()
        self.members.append(Member(task, process))

    def strike(self) -> None:
        """Kill or interrupt a worker, anyone, anywhere."""
        workers = [member for member in self.members if member.task.role == "write" and member.task.log.exists()]
        if not workers:
            return
        member = self.random.choice(workers)
        member.blow = signal.SIGINT if self.random.random() < self.aims.interrupts else signal.SIGKILL
        with suppress(ProcessLookupError):  # it ended just now
            os.kill(cast(int, member.process.pid), member.blow)

    def let_end(self) -> None:
        """No more work and no more blows; who does not end by themselves hangs."""
        patience = time.monotonic() + LAST_WORDS_S
        while self.members and time.monotonic() < patience:
            self.reap()
            time.sleep(TICK_S)
        self.ends["hung"] += len(self.members)
