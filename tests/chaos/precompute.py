"""`python -m tests.chaos.precompute`: precompute on boxes that vanish; exit 0 when no harm came of it."""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from tests.chaos.box import Blow, Box
from tests.chaos.findings import PER_SHARD, POISON, PROMPTS, SAMPLES, Findings, audit, table
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.precompute import tiny
from tests.precompute.commands import ROOT
from tests.precompute.fleet.puppet import SCRIPT
from tests.s3_server import BUCKET, run_server

TICK_S = 0.05
VANISH_S = 15.0
"""How long what is left of a box may take to be gone."""
ROUND_LIMIT_S = 1200
SETTINGS = (
    "engine.max_num_seqs=4", "engine.dtype=float32", "engine.cpu_kv_gib=0.1", "fleet.max_rejected=0.05",
    "fleet.max_deaths=1000", "fleet.storage_patience_s=300",
)  # fmt: skip
HANG_S = {"puppet": (6, 60), "vllm": (15, 180)}
"""`fleet.hang_s` and `fleet.startup_s`."""
WEIGHTS = {
    "puppet": {Blow.CORE: 3, Blow.WORKER: 3, Blow.COMMAND: 2, Blow.TERM: 1, Blow.STOP: 2},
    "vllm": {Blow.CORE: 4, Blow.WORKER: 2, Blow.COMMAND: 2, Blow.TERM: 1, Blow.STOP: 1},
}


@dataclass(frozen=True)
class Stage:
    """Where it plays: model, teacher, prompts, and the environment of every box."""

    folder: Path
    engine: str

    def prepare(self) -> None:
        tiny.make_teacher(self.folder / "teacher")
        tiny.make_student(self.folder / "student", self.folder / "teacher")
        tiny.write_prompts(self.folder / "prompts.jsonl", PROMPTS)
        script = {"poison": [POISON["rollouts"]], "poison_scores": [POISON["scored"]], "step_s": 0.04}
        (self.folder / "script.json").write_text(json.dumps(script))

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "LOPD_CACHE_DIR": str(self.folder / "cache"),
            SCRIPT: str(self.folder / "script.json"),
        }

    def words(self, url: str, index: int, count: int) -> list[str]:
        hang, startup = HANG_S[self.engine]
        settings = [*SETTINGS, f"fleet.hang_s={hang}", f"fleet.startup_s={startup}"]
        both = [f"{phase}.{setting}" for phase in ("rollouts", "score") for setting in settings]
        places = ["--model", self.folder / "student", "--prompts", self.folder / "prompts.jsonl", "--cache", url]
        size = ["--samples", SAMPLES, "--max-tokens", 32, "--grace", 5]
        box = ["--worker-index", index, "--worker-count", count]
        sets = [f"rollouts.prompts_per_shard={PER_SHARD}", "rollouts.keep_text=false", *both]
        return [*map(str, [*places, *size, *box]), *(word for setting in sets for word in ("--set", setting))]


class Chaos:
    """One run; `work` is its story."""

    def __init__(
        self,
        stage: Stage,
        boxes: int,
        requests_per_blow: int,
        seed: int,
        faults: Faults,
        environment: Mapping[str, str],
    ) -> None:
        self.found = Findings()
        self._stage, self._boxes, self._gap, self._random = stage, boxes, requests_per_blow, random.Random(seed)
        self._requests = faults.requests
        self._next_blow = self._random.expovariate(1 / self._gap)
        """The number of the request after which it falls; so work and blows keep step on a slow machine, too."""
        self._environment = {**stage.environment(), **environment}
        self._starts = 0

    def work(self, kills: int, minutes: float, base: str) -> list[str]:
        """Make one pair of datasets after the other until enough has been struck or time is up; returns their URLs."""
        urls: list[str] = []
        until = time.monotonic() + 60 * minutes
        while self.found.kills < kills and time.monotonic() < until:
            urls.append(f"{base}/{len(urls)}")
            self._fill(urls[-1], kills, until)
        return urls

    def _fill(self, url: str, kills: int, until: float) -> None:
        """Keep all boxes at work, and strike at them, until each says that all is done."""
        running = {index: self._start(url, index) for index in range(self._boxes)}
        give_up = time.monotonic() + ROUND_LIMIT_S
        try:
            while running and time.monotonic() < give_up:
                for index, box in list(running.items()):
                    if box.ended() is None:
                        continue
                    del running[index]
                    if self._note(box) != "finished":
                        running[index] = self._start(url, index)
                begun = [
                    box for box in running.values() if box.log.stat().st_size
                ]  # so that work gets done between blows
                due = self.found.kills < kills and len(self._requests) >= self._next_blow and time.monotonic() < until
                if due and begun:
                    self._strike(self._random.choice(begun))
                    self._next_blow = len(self._requests) + self._random.expovariate(1 / self._gap)
                time.sleep(TICK_S)
        finally:
            for box in running.values():
                self.found.wrong.append(f"not done after {ROUND_LIMIT_S} s: {_end_of(box.log)}")
                box.end()
        self.found.rounds += 1

    def _start(self, url: str, index: int) -> Box:
        self._starts += 1
        log = self._stage.folder / f"box-{self._starts}.log"
        return Box(self._stage.engine, self._stage.words(url, index, self._boxes), self._environment, log)

    def _strike(self, box: Box) -> None:
        weights = WEIGHTS[self._stage.engine]
        [blow] = self._random.choices(list(weights), list(weights.values()))
        if box.strike(blow, self._random.random()):
            self.found.blows[blow] += 1

    def _note(self, box: Box) -> str:
        """How a box ended; nothing of it may be left."""
        how = box.how()
        self.found.ends[how] += 1
        if how.startswith("wrong"):
            self.found.wrong.append(f"{how}: {_end_of(box.log)}")
        deadline = time.monotonic() + VANISH_S
        while (left := box.left()) and time.monotonic() < deadline:
            time.sleep(TICK_S)
        self.found.orphans += len(left)
        if left:
            self.found.wrong.append(f"left of a box that {how}: {[process.name() for process in left]}")
        box.end()
        return how


def weather(seed: int) -> Faults:
    """One request in ten fails, in the ways that a client is to get over; `tests.chaos` has the others."""
    return Faults(
        Fault(Kind.DROP, chance=0.02),
        Fault(Kind.LOSE, chance=0.02),
        Fault(Kind.HANG, chance=0.01, seconds=1.0),
        Fault(Kind.REFUSE, chance=0.03, status=503, code="SlowDown"),
        Fault(Kind.REFUSE, "PUT", "/commits/", chance=0.03, status=409, code="ConditionalRequestConflict"),
        Fault(Kind.ALTER, chance=0.02),
        seed=seed,
    )


def _end_of(log: Path) -> str:
    return "\n    ".join(log.read_text(errors="replace").splitlines()[-12:])


def _undisturbed(stage: Stage, environment: Mapping[str, str]) -> str:
    """URL of what a run makes that nobody strikes."""
    url = str(stage.folder / "undisturbed")
    box = Box(stage.engine, stage.words(url, 0, 1), {**stage.environment(), **environment}, stage.folder / "calm.log")
    try:
        while box.ended() is None:
            time.sleep(TICK_S)
    finally:
        box.end()
    if box.ended() != 0:
        raise click.ClickException(f"the undisturbed run failed: {_end_of(box.log)}")
    return url


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kills", default=100, show_default=True, help="So many blows fall.")
@click.option("--minutes", default=60.0, show_default=True, help="No blow falls after so long, nor is a dataset begun.")
@click.option("--engine", default="puppet", show_default=True, type=click.Choice(list(WEIGHTS)))
@click.option("--boxes", default=2, show_default=True, help="Commands at once on one dataset.")
@click.option("--requests-per-blow", default=30, show_default=True, help="Mean number of requests between two blows.")
@click.option("--seed", default=0, show_default=True, help="Of blows and faults; the timing stays the machine's.")
@click.option("--keep", type=click.Path(path_type=Path), help="Leave all data and logs in this new folder.")
def main(
    kills: int, minutes: float, engine: str, boxes: int, requests_per_blow: int, seed: int, keep: Path | None
) -> None:
    """Strike at boxes that sample and score on a store that fails, then compare with a run that nobody disturbed."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder, faults = keep or Path(temporary), weather(seed)
        (folder / "server").mkdir(parents=True)
        stage = Stage(folder, engine)
        stage.prepare()
        with run_server(folder / "server") as server, fault_proxy(server.endpoint, faults) as endpoint:
            os.environ.update(server.environment() | {"LOPD_CACHE_DIR": str(folder / "cache")})
            undisturbed = _undisturbed(stage, {})
            chaos = Chaos(stage, boxes, requests_per_blow, seed, faults, {"AWS_ENDPOINT_URL": endpoint})
            started = time.monotonic()
            urls = chaos.work(kills, minutes, f"s3://{BUCKET}/chaos")
            seconds = time.monotonic() - started
            for url in urls:
                audit(chaos.found, url, undisturbed, POISON if engine == "puppet" else {})
        click.echo(f"engine: {engine}, {boxes} boxes, seed {seed}\n{table(chaos.found, faults, seconds)}")
    sys.exit(not chaos.found.clean)


if __name__ == "__main__":
    main()
