"""A phase from its settings to a finished dataset: plan it, join what is there, have the fleet do the rest."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import click

from common.dataset import Dataset, is_finished, open_dataset, require_kind
from common.dataset_writer import DatasetWriter, create_dataset
from common.errors import LopdError
from common.local_cache import cache_dir
from common.patience import patiently
from common.plans import dataset_id
from common.prompts import PromptSet
from precompute.checks.preflight import (
    Check,
    check_generation,
    check_run,
    check_scoring,
    place_of,
    require,
    summary_lines,
)
from precompute.config import Fleet, Generate, Score
from precompute.fleet.devices import slots
from precompute.fleet.live import View
from precompute.fleet.local import Box
from precompute.fleet.messages import Job
from precompute.fleet.published import Published
from precompute.fleet.ray_join import join_ray
from precompute.fleet.replica import Launcher
from precompute.fleet.shards import ShardQueue
from precompute.fleet.status import Phase
from precompute.fleet.supervisor import Supervisor
from precompute.fleet.tally import Tally
from precompute.jobs import job_of
from precompute.plan import Job as Planned
from precompute.plan import plan_generation, plan_scoring


@dataclass(frozen=True)
class Outcome:
    """What a phase left behind."""

    dataset: Dataset
    skipped: bool
    """Whether all of it was there already."""


def make_rollouts(
    kind: str,
    config: Generate,
    prompts: PromptSet,
    scoring: Score | None = None,
    launcher: Launcher | None = None,
) -> Outcome:
    """Sample a dataset of kind `rollouts` or `sft`, resuming what is there.

    Args:
        scoring: what is to come afterwards; what would keep it from it is then refused before a rollout is sampled.
        launcher: where the replicas run; where the settings say, unless given.
    """
    phase: Phase = "rollouts" if kind == "rollouts" else "sft_data"
    planned, checks = plan_generation(kind, config, prompts), list[Check]()
    if not is_finished(config.cache):
        place = place_of(config)
        checks = (
            check_run(config, prompts, planned, scoring, (place, place_of(scoring)))
            if scoring
            else check_generation(config, prompts, planned, place)
        )
    rows = len(prompts.prompts) * config.sampling.samples
    return _complete(phase, config, planned, config.model, rows, checks, launcher)


def make_scores(config: Score, patience_s: float = 0.0) -> Outcome:
    """Score a dataset of rollouts by the teacher, resuming what is there.

    Args:
        patience_s: how long the store may be away at the start. At the start of a job nobody waits, for the URL may be
            wrong; between two phases the store is known to be there.
    """
    rollouts = patiently(lambda: open_dataset(config.rollouts), patience_s, lambda line: click.echo(line, err=True))
    require_kind(rollouts, "rollouts")
    planned = plan_scoring(config, rollouts)
    checks = [] if is_finished(config.cache) else check_scoring(config, planned, place_of(config))
    return _complete("score", config, planned, planned.plan["teacher"]["name"], rollouts.num_rows, checks, None)


def _complete(
    phase: Phase,
    config: Generate | Score,
    planned: Planned,
    model: str,
    rows: int,
    checks: Sequence[Check],
    launcher: Launcher | None,
) -> Outcome:
    """Join the dataset if nothing speaks against it, have the shards committed that are left, and finish it."""
    require(checks)
    writer = create_dataset(config.cache, planned.plan, single_writer=config.single_writer)
    if is_finished(config.cache):
        return Outcome(open_dataset(config.cache), skipped=True)
    job = job_of(phase, config, planned, writer.plan, model)
    with View(phase) as view:
        for line in summary_lines(checks):
            view.say(line)
        with nullcontext(launcher) if launcher else _launcher(config) as where:
            _supervise(job, config.fleet, writer, rows, view, where)
        patiently(writer.finalize, config.fleet.storage_patience_s, view.say)
    return Outcome(open_dataset(config.cache), skipped=False)


def _supervise(job: Job, fleet: Fleet, writer: DatasetWriter, rows: int, view: View, launcher: Launcher) -> None:
    """Have every shard committed, and tell people and files how it stands all the while."""
    queue = ShardQueue.of(
        writer, fleet.worker_index, fleet.worker_count, patience_s=fleet.storage_patience_s, say=view.say
    )
    tally = Tally(job.phase, writer.url, dataset_id(writer.plan), rows, fleet, queue)
    with Published(writer.url, Path(fleet.status_file) if fleet.status_file else None, view.say) as published:

        def show() -> None:
            status = tally.status()
            if queue.listed:  # before, nobody knows what is committed already, and a line cannot be taken back
                view.show(status)
            published.offer(status)

        try:
            Supervisor(job, fleet, queue, launcher, tally, show=show, say=view.say).run()
        except LopdError as error:
            tally.reason = error.what
            raise
        finally:
            show()


@contextmanager
def _launcher(config: Generate | Score) -> Iterator[Launcher]:
    """Where the replicas run, for as long as they do."""
    if config.fleet.on == "ray":
        with closing(join_ray(config.fleet, config.engine)) as cluster:
            yield cluster
    else:
        box = Box(slots(config.fleet, config.engine), cache_dir() / "logs")
        try:
            yield box
        finally:
            box.tidy()
