"""What an engine does with a shard: sample it, or score it. The worker drives, and knows no more than `Task`."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from common.alignment import check_alignment
from common.chat import Template, load_tokenizer
from common.dataset import open_dataset
from common.local_cache import cache_dir
from common.patience import patiently
from common.prompts import open_prompts
from common.schema import Rollout, to_rows
from precompute.config import Generate, Sampling, Score
from precompute.engine.door import Engine
from precompute.engine.requests import Watch
from precompute.filters.keeper import Keeper
from precompute.fleet.messages import Job
from precompute.generate import Sample, generate, samples_of
from precompute.score import Unscored, score
from precompute.self_test import batch_noise

Row = Sample | Unscored
"""A row to make: its place in the dataset, and what it is made from."""
TESTED = 4
"""Rows of the self-test."""


class Task(Protocol):
    """One phase's work, with an engine that is loaded."""

    engine: Engine

    @property
    def judged(self) -> int:
        """Completions that a verifier has judged so far."""
        ...

    def rows(self, shard: int) -> Sequence[Row]:
        """All rows of a shard, in dataset order. Raises what a store raises."""
        ...

    def work(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Rollout]]:
        """Make them, in the order in which they finish."""
        ...

    def self_test(self, rows: Sequence[Row]) -> float | None:
        """By how many nats the company in a batch moves a log-prob, at most; None where none is scored."""
        ...

    def finish(self, rows: list[Rollout], where: str) -> tuple[list[Rollout], dict[str, float]]:
        """The rows of a whole shard that are kept, and its statistics."""
        ...

    def close(self) -> None:
        """End the engine, and whatever else runs for it."""
        ...


class SamplingTask:
    """Prompts -> rollouts. A store that is away while it starts is waited for, which `say` is told.

    `note` is told what else people should know of.
    """

    def __init__(
        self, config: Generate, job: Job, watch: Watch, say: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        folder, self._config, self._plan = Path(job.folder), config, job.plan
        self._sampling = Sampling.model_validate(job.plan["sampling"])
        self._template = Template.model_validate(job.plan["template"])
        digest = job.plan["prompts"]["sha256"]
        self._prompts = patiently(
            lambda: open_prompts(digest, config.prompts, config.prompt_column, config.limit),
            config.fleet.storage_patience_s,
            say,
        )
        self._tokenizer = load_tokenizer(folder)
        # Named like the logs beside it: by the supervisor, which removes those in which nothing stands.
        log = cache_dir() / "logs" / f"{os.getppid()}-verifier-{os.getpid()}.log"
        self._keeper = Keeper(config.filters, job.plan.get("filters"), self._text, log, note)
        self.engine = Engine(
            folder,
            config.engine,
            max_model_len=job.max_model_len,
            sampling=self._sampling,
            topk=config.topk,
            watch=watch,
            window=job.window,
        )

    @property
    def judged(self) -> int:
        return self._keeper.judged

    def rows(self, shard: int) -> Sequence[Row]:
        return samples_of(shard, self._prompts.prompts, self._plan["prompts_per_shard"], self._sampling.samples)

    def work(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Rollout]]:
        return generate(
            self.engine,
            cast("Iterable[Sample]", rows),
            self._tokenizer,
            self._template,
            plan_seed=self._sampling.seed,
            keep_text=self._config.keep_text,
        )

    def self_test(self, rows: Sequence[Row]) -> float | None:
        return None

    def finish(self, rows: list[Rollout], where: str) -> tuple[list[Rollout], dict[str, float]]:
        kept, dropped = self._keeper.keep(rows, where)
        return kept, rollout_stats(kept) | dropped

    def close(self) -> None:
        self.engine.close()
        self._keeper.close()

    def _text(self, ids: np.ndarray) -> str:
        """A completion as a verifier reads it: without the token that ended it."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))


class ScoringTask:
    """Rollouts -> the same, with the teacher's log-probs. A store that is away is waited for, as above."""

    judged = 0

    def __init__(self, config: Score, job: Job, watch: Watch, say: Callable[[str], None]) -> None:
        self._config = config
        self._rollouts = patiently(lambda: open_dataset(config.rollouts), config.fleet.storage_patience_s, say)
        self.engine = Engine(
            Path(job.folder),
            config.engine,
            max_model_len=job.max_model_len,
            topk=config.topk,
            support=config.topk_support,
            watch=watch,
            window=job.window,
        )

    def rows(self, shard: int) -> Sequence[Row]:
        return [Unscored(shard, row, rollout) for row, rollout in enumerate(to_rows(self._rollouts.read_shard(shard)))]

    def work(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Rollout]]:
        topk, support = self._config.topk, self._config.topk_support
        return score(self.engine, cast("Iterable[Unscored]", rows), topk=topk, support=support)

    def self_test(self, rows: Sequence[Row]) -> float | None:
        if not self._config.fleet.self_test:
            return None
        some = sorted(cast("Sequence[Unscored]", rows), key=lambda row: len(row.rollout.completion_ids))[:TESTED]
        return batch_noise(self.engine, some)

    def finish(self, rows: list[Rollout], where: str) -> tuple[list[Rollout], dict[str, float]]:
        return rows, score_stats(rows, where)

    def close(self) -> None:
        self.engine.close()


def rollout_stats(rows: list[Rollout]) -> dict[str, float]:
    logprobs = np.concatenate([row.rollout_logprobs for row in rows]) if rows else np.zeros(0)
    return {
        "truncated": float(sum(row.finish_reason == "length" for row in rows)),
        "rollout_logprob_sum": float(logprobs.sum(dtype=np.float64)),
    }


def score_stats(rows: list[Rollout], where: str) -> dict[str, float]:
    """Sums for the summary, after the check that teacher and rollout speak of the same tokens."""
    rollout = [row.rollout_logprobs for row in rows]
    teacher = [row.teacher_logprobs for row in rows if row.teacher_logprobs is not None]
    alignment = check_alignment(rollout, teacher, where=where)
    total = sum(float(column.sum(dtype=np.float64)) for column in teacher)
    return {
        **rollout_stats(rows),
        "teacher_logprob_sum": total,
        **({"alignment": round(alignment.here, 4)} if alignment.judged else {}),
    }
