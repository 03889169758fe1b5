"""A few prompts through the real engines: the worker of a real run, one replica, one shard, and a stopwatch."""

import json
import random
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from common.dataset import Dataset, open_dataset
from common.dataset_writer import create_dataset
from common.errors import DataError, RetryLater
from common.prompts import PromptSet, load_prompts
from common.schema import Rollout, to_rows
from precompute.config import Filters, Generate, Score
from precompute.fleet.failures import as_error, last_line
from precompute.fleet.local import Box
from precompute.fleet.member import LEAVE_S
from precompute.fleet.messages import Beat, Committed, Failed, FromWorker, Job, Nothing, Refused, State, Want, Work
from precompute.fleet.replica import Slot
from precompute.fleet.status import Phase
from precompute.forecast.estimate import Measured, steady_rate
from precompute.jobs import job_of
from precompute.plan import Job as Planned
from precompute.plan import plan_generation, plan_scoring

TICK_S = 0.5


def draw(prompts: PromptSet, count: int, seed: int, file: Path) -> None:
    """Write `count` prompts, drawn at random, as a prompt file."""
    chosen = sorted(random.Random(seed).sample(range(len(prompts.prompts)), min(count, len(prompts.prompts))))
    with file.open("w") as lines:
        for index in chosen:
            prompt = prompts.prompts[index]
            content = prompt.text if prompt.messages is None else prompt.messages
            lines.write(json.dumps({"prompt_id": prompt.id, "prompt": content}) + "\n")


def pilot_rollouts(section: Generate, file: Path, slot: Slot, folder: Path) -> Measured:
    """Sample the prompts in `file` into `folder`/rollouts; no filter drops any."""
    prompts = load_prompts(str(file), "prompt")
    pilot = section.model_copy(
        update={
            **{"prompts": str(file), "prompt_column": "prompt", "limit": None, "filters": Filters()},
            **{"cache": str(folder / "rollouts"), "prompts_per_shard": len(prompts.prompts)},
        }
    )
    planned = plan_generation("rollouts", pilot, prompts)
    dataset, watch = _made("rollouts", pilot, planned, pilot.model, slot, folder)
    return _measured(dataset, watch, scored=False)


def pilot_scores(section: Score, slot: Slot, folder: Path) -> Measured:
    """Score the pilot's rollouts into `folder`/scored."""
    pilot = section.model_copy(update={"rollouts": str(folder / "rollouts"), "cache": str(folder / "scored")})
    planned = plan_scoring(pilot, open_dataset(pilot.rollouts))
    dataset, watch = _made("score", pilot, planned, planned.plan["teacher"]["name"], slot, folder)
    return _measured(dataset, watch, scored=True)


class Stopwatch:
    """When the engine took its first row, and when each left it; in seconds since the worker was started."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last_heard = self._started
        self._entered: dict[str, float] = {}
        self._left: dict[str, float] = {}
        self.committed_at: float | None = None
        self.state = "loading"

    def hear(self, message: FromWorker) -> None:
        """Note what a worker tells, at the time that it is."""
        self._last_heard = time.monotonic()
        now = self._last_heard - self._started
        if isinstance(message, Beat):
            self._entered |= {uid: now for _, uid in message.entered}
            self._left |= dict.fromkeys(message.left, now)
        elif isinstance(message, State):
            self.state = message.state
        elif isinstance(message, Committed):
            self.committed_at = now

    @property
    def silent(self) -> float:
        """Seconds since anything was heard."""
        return time.monotonic() - self._last_heard

    @property
    def startup_s(self) -> float:
        return min(self._entered.values())

    def left_at(self, uid: str) -> float:
        """Seconds after the first row entered; the last ones are told of by the commit alone."""
        end = self.committed_at if self.committed_at is not None else 0.0
        return self._left.get(uid, end) - self.startup_s

    def entered_by(self, uid: str, moment: float) -> bool:
        """Whether it was in the engine by then, as `left_at` counts."""
        return self._entered[uid] - self.startup_s <= moment


def _made(
    phase: Phase, section: Generate | Score, planned: Planned, model: str, slot: Slot, folder: Path
) -> tuple[Dataset, Stopwatch]:
    writer = create_dataset(section.cache, planned.plan, single_writer=section.single_writer)
    job = job_of(phase, section, planned, writer.plan, model)
    watch = _drive(job, section, slot, folder / "logs")
    writer.finalize()
    return open_dataset(section.cache), watch


def _drive(job: Job, section: Generate | Score, slot: Slot, logs: Path) -> Stopwatch:
    """Have one worker do shard 0, and see it off.

    Raises:
        RetryLater: its engine died or hangs.
        DataError: its engine will not take a row, which `run` would reject.
        LopdError: what else it could not do it for.
    """
    box, watch, given, gone_by = Box([slot], logs), Stopwatch(), False, float("inf")
    replica = box.start(slot)
    try:
        replica.send(job)
        while True:
            box.wait([replica], TICK_S)
            ended = replica.ended()  # asked first: what it said before its end is then all there
            for message in replica.receive():
                watch.hear(message)
                if isinstance(message, Failed):
                    raise as_error(message, replica.last_words())
                if isinstance(message, Refused):
                    raise DataError(message.reason, where=f"row {message.uid}", fix="Leave its prompt out, or mend it")
                if isinstance(message, Want):
                    replica.send(Nothing(ended=True) if given else Work(shard=0))
                    given = True
                if isinstance(message, Committed):
                    gone_by = time.monotonic() + LEAVE_S
            if watch.committed_at is not None and (ended is not None or time.monotonic() > gone_by):
                return watch
            patience = section.fleet.startup_s if watch.state in ("loading", "testing") else section.fleet.hang_s
            if ended is not None or watch.silent > patience:
                how = ended or f"silent for {watch.silent:.0f} s while {watch.state}"
                raise RetryLater(f"the pilot's engine died: {how}", where=last_line(replica.last_words()))
    finally:
        replica.kill()


def _measured(dataset: Dataset, watch: Stopwatch, *, scored: bool) -> Measured:
    rows = list(to_rows(dataset.read_shard(0)))
    work = [len(row.completion_ids) + (len(row.prompt_ids) if scored else 0) for row in rows]
    left = [watch.left_at(row.uid) for row in rows]
    half = sorted(left)[(len(left) - 1) // 2]
    entered = [watch.entered_by(row.uid, half) for row in rows]
    return Measured(
        completions=_lengths(rows),
        work=sum(work),
        seconds=max(left),
        steady=steady_rate(work, left, entered, partial=not scored),
        startup_s=watch.startup_s,
        stored=dataset.shards[0].bytes,
        truncated=sum(row.finish_reason == "length" for row in rows),
    )


def _lengths(rows: list[Rollout]) -> Mapping[str, list[int]]:
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt_id].append(len(row.completion_ids))
    return by_prompt
