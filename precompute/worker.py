"""One engine process: take the shards that are left, stream them through the engine, commit each as it fills.

Requests of the next shard enter the engine while the last ones of this shard still run, so the engine never drains
between shards; and a shard is encoded and uploaded beside the step loop, in a thread of its own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from common.alignment import check_alignment
from common.chat import Template, load_tokenizer
from common.dataset import Dataset, is_finished, open_dataset, require_kind
from common.dataset_writer import DatasetWriter, create_dataset
from common.progress import Progress
from common.prompts import PromptSet
from common.records import Commit
from common.schema import Rollout, to_rows, to_table
from precompute.config import Generate, Sampling, Score
from precompute.engine import Engine
from precompute.generate import Sample, generate, samples_of
from precompute.plan import Job, plan_generation, plan_scoring
from precompute.score import Unscored, score

UPLOADS_WAITING = 2
"""Finished shards held in memory while earlier ones upload; a slow store then slows the engine, not the box."""


@dataclass(frozen=True)
class Outcome:
    """What a phase left behind."""

    dataset: Dataset
    skipped: bool
    """Whether all of it was there already."""


def make_rollouts(kind: str, config: Generate, prompts: PromptSet) -> Outcome:
    """Sample a dataset of kind `rollouts` or `sft`, resuming what is there."""
    job = plan_generation(kind, config, prompts)
    return _complete(
        config.cache,
        job,
        config.single_writer,
        lambda writer, pending: _sample_shards(writer, job, config, prompts, pending),
    )


def make_scores(config: Score) -> Outcome:
    """Score a dataset of rollouts by the teacher, resuming what is there."""
    rollouts = open_dataset(config.rollouts)
    require_kind(rollouts, "rollouts")
    job = plan_scoring(config, rollouts)
    return _complete(
        config.cache,
        job,
        config.single_writer,
        lambda writer, pending: _score_shards(writer, job, config, rollouts, pending),
    )


def _complete(url: str, job: Job, single_writer: bool, fill: Callable[[DatasetWriter, list[int]], None]) -> Outcome:
    """Join the dataset at `url`, commit by `fill` the shards that are left, and finish it."""
    writer = create_dataset(url, job.plan, single_writer=single_writer)
    if is_finished(url):
        return Outcome(open_dataset(url), skipped=True)
    pending = writer.pending()
    if pending:
        fill(writer, pending)
    writer.finalize()
    return Outcome(open_dataset(url), skipped=False)


def _sample_shards(writer: DatasetWriter, job: Job, config: Generate, prompts: PromptSet, pending: list[int]) -> None:
    sampling = Sampling.model_validate(job.plan["sampling"])
    per_shard, total = job.plan["prompts_per_shard"], len(prompts.prompts) * sampling.samples
    shards = {shard: samples_of(shard, prompts.prompts, per_shard, sampling.samples) for shard in pending}
    sizes = {shard: len(samples) for shard, samples in shards.items()}
    engine = Engine(job.folder, config.engine, max_model_len=job.max_model_len, sampling=sampling)
    finished = generate(
        engine,
        (sample for shard in writer.shards_left() for sample in shards[shard]),
        load_tokenizer(job.folder),
        Template.model_validate(job.plan["template"]),
        plan_seed=sampling.seed,
        keep_text=config.keep_text,
    )
    with Progress(f"sampling {job.plan['kind']}", total, "tok", done=total - sum(sizes.values())) as progress:
        commit_shards(writer, fill_shards(finished, sizes, progress), rollout_stats)


def _score_shards(writer: DatasetWriter, job: Job, config: Score, rollouts: Dataset, pending: list[int]) -> None:
    sizes = {shard: rollouts.shards[shard].rows for shard in pending}
    engine = Engine(job.folder, config.engine, max_model_len=job.max_model_len, topk=config.topk)

    def unscored() -> Iterator[Unscored]:
        for shard in writer.shards_left():
            for row, rollout in enumerate(to_rows(rollouts.read_shard(shard))):
                yield Unscored(shard, row, rollout)

    done = rollouts.num_rows - sum(sizes.values())
    with Progress("scoring", rollouts.num_rows, "tok", done=done) as progress:
        commit_shards(writer, fill_shards(score(engine, unscored()), sizes, progress), score_stats)


def fill_shards(
    finished: Iterable[tuple[Sample | Unscored, Rollout]], sizes: Mapping[int, int], progress: Progress
) -> Iterator[tuple[int, list[Rollout]]]:
    """Collect rows, which finish in any order, into whole shards in dataset order."""
    filling: dict[int, dict[int, Rollout]] = defaultdict(dict)
    for place, rollout in finished:
        shard = filling[place.shard]
        shard[place.row] = rollout
        progress.advance(1, len(rollout.completion_ids))
        if len(shard) == sizes[place.shard]:
            yield place.shard, [rollout for _, rollout in sorted(filling.pop(place.shard).items())]


def commit_shards(
    writer: DatasetWriter,
    shards: Iterable[tuple[int, list[Rollout]]],
    stats: Callable[[list[Rollout], str], dict[str, float]],
) -> None:
    """Encode, upload and commit each shard in a thread beside the engine's step loop."""
    waiting: list[Future[Commit]] = []

    def commit(shard: int, rows: list[Rollout]) -> Commit:
        where = f"{writer.url}, shard {shard}"
        return writer.commit(shard, to_table(rows, writer.plan["topk"]), stats(rows, where))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit") as thread:
        for shard, rows in shards:
            waiting.append(thread.submit(commit, shard, rows))
            while len(waiting) > UPLOADS_WAITING or (waiting and waiting[0].done()):
                waiting.pop(0).result()
        for future in waiting:
            future.result()


def rollout_stats(rows: list[Rollout], where: str) -> dict[str, float]:
    logprobs = np.concatenate([row.rollout_logprobs for row in rows])
    return {
        "truncated": float(sum(row.finish_reason == "length" for row in rows)),
        "rollout_logprob_sum": float(logprobs.sum(dtype=np.float64)),
    }


def score_stats(rows: list[Rollout], where: str) -> dict[str, float]:
    """Sums for the summary, after the check that teacher and rollout speak of the same tokens."""
    rollout = [row.rollout_logprobs for row in rows]
    teacher = [row.teacher_logprobs for row in rows if row.teacher_logprobs is not None]
    alignment = check_alignment(rollout, teacher, where=where)
    return {
        **rollout_stats(rows, where),
        "teacher_logprob_sum": float(np.concatenate(teacher).sum(dtype=np.float64)),
        **({"alignment": round(alignment.here, 4)} if alignment.judged else {}),
    }
