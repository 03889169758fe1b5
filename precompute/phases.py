"""A phase from its settings to a finished dataset: plan it, join what is there, have the fleet do the rest."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from common.dataset import Dataset, is_finished, open_dataset, require_kind
from common.dataset_writer import DatasetWriter, create_dataset
from common.errors import LopdError
from common.local_cache import cache_dir
from common.patience import patiently
from common.plans import dataset_id
from common.prompts import PromptSet
from precompute.config import Generate, Score
from precompute.fleet.devices import slots
from precompute.fleet.live import View
from precompute.fleet.local import Box
from precompute.fleet.messages import Job
from precompute.fleet.ray_join import join_ray
from precompute.fleet.replica import Launcher
from precompute.fleet.shards import ShardQueue
from precompute.fleet.status import Phase
from precompute.fleet.supervisor import Supervisor
from precompute.fleet.tally import Tally
from precompute.plan import Job as Planned
from precompute.plan import plan_generation, plan_scoring
from precompute.vllm_settings import usual_window


@dataclass(frozen=True)
class Outcome:
    """What a phase left behind."""

    dataset: Dataset
    skipped: bool
    """Whether all of it was there already."""


def make_rollouts(kind: str, config: Generate, prompts: PromptSet) -> Outcome:
    """Sample a dataset of kind `rollouts` or `sft`, resuming what is there."""
    phase: Phase = "rollouts" if kind == "rollouts" else "sft_data"
    planned = plan_generation(kind, config, prompts)
    return _complete(phase, config, planned, config.model, len(prompts.prompts) * config.sampling.samples)


def make_scores(config: Score) -> Outcome:
    """Score a dataset of rollouts by the teacher, resuming what is there."""
    rollouts = open_dataset(config.rollouts)
    require_kind(rollouts, "rollouts")
    planned = plan_scoring(config, rollouts)
    return _complete("score", config, planned, planned.plan["teacher"]["name"], rollouts.num_rows)


def _complete(phase: Phase, config: Generate | Score, planned: Planned, model: str, rows: int) -> Outcome:
    """Join the dataset, have the shards committed that are left, and finish it."""
    writer = create_dataset(config.cache, planned.plan, single_writer=config.single_writer)
    if is_finished(config.cache):
        return Outcome(open_dataset(config.cache), skipped=True)
    job = Job(
        phase=phase,
        section=config.model_dump(mode="json"),
        plan=writer.plan,
        model=model,
        folder=str(planned.folder),
        max_model_len=planned.max_model_len,
        window=usual_window(config.engine),
    )
    with View(phase) as view:
        _supervise(job, config, writer, rows, view)
        patiently(writer.finalize, config.fleet.storage_patience_s, view.say)
    return Outcome(open_dataset(config.cache), skipped=False)


def _supervise(job: Job, config: Generate | Score, writer: DatasetWriter, rows: int, view: View) -> None:
    fleet = config.fleet
    queue = ShardQueue.of(
        writer, fleet.worker_index, fleet.worker_count, patience_s=fleet.storage_patience_s, say=view.say
    )
    tally = Tally(job.phase, writer.url, dataset_id(writer.plan), rows, fleet, queue)
    try:
        with _launcher(config) as launcher:
            Supervisor(job, fleet, queue, launcher, tally, show=lambda: view.show(tally.status()), say=view.say).run()
    except LopdError as error:
        tally.reason = error.what
        raise
    finally:
        view.show(tally.status())


@contextmanager
def _launcher(config: Generate | Score) -> Iterator[Launcher]:
    """Where the replicas run, for as long as they do."""
    if config.fleet.on == "ray":
        with closing(join_ray(config.fleet, config.engine)) as cluster:
            yield cluster
    else:
        yield Box(slots(config.fleet, config.engine), cache_dir() / "logs")
