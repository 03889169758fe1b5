"""Audits a dataset: a sample of its rows is scored again by an independent forward pass, without the engine.

What is stored must come back: the teacher's log-probs from the teacher, the rollout's from the policy under the
distribution that sampled. Checksums tell that a dataset was not altered; this tells that it was right to begin with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from common.dataset import Dataset, open_dataset
from common.errors import DataError, UsageError
from common.progress import Progress, waiting
from common.schema import Rollout, to_rows
from common.untrusted import one_line
from precompute.audit.agreement import LIMITS, Agreement, Limits, Row, compare, faults
from precompute.audit.models import TEACHER, Column, choose_columns, engine_dtype, find_models

if TYPE_CHECKING:
    from precompute.audit.reference import Reference

COARSEST_LAST = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What is audited, with what, and by how much it may differ."""

    models: tuple[str, ...] = ()
    """Where copies of the models lie; else they are looked for where the plan found them."""
    rows: int = 16
    seed: int = 0
    which: str | None = None
    """teacher, rollout or both; None for the teacher where there is one, and the rollout if its policy is at hand."""
    dtype: str = "float32"
    device: str = "auto"
    mean: float | None = None
    """Limit of the mean difference, in nats; None for what suits the engine's dtype."""
    largest: float | None = None
    """Limit of the largest difference, likewise."""


@dataclass(frozen=True)
class Verdict:
    """What became of one column."""

    column: str
    model: str
    engine: str
    """Version, dtype and dtype of the head."""
    limits_of: str
    """The coarser dtype of engine and audit, after which the limits are chosen."""
    limits: Limits
    found: Agreement
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """The whole result."""

    url: str
    manifest_sha256: str
    rows: int
    of_rows: int
    seed: int
    dtype: str
    device: str
    columns: tuple[Verdict, ...]
    skipped: Mapping[str, str]
    """Why a column was left out, by its name."""

    @property
    def passed(self) -> bool:
        """Whether every audited column is what it is said to be."""
        return not any(verdict.faults for verdict in self.columns)

    def as_record(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"passed": self.passed, **asdict(self)}


def audit(url: str, settings: Settings) -> Audit:
    """Score a sample of the rows again and compare.

    Raises:
        DataError: the dataset is not finished, or a model is not the one its plan names.
        UsageError: a model is not to be had, PyTorch is not installed, no such column, or a limit is not finite.
    """
    _require_limits(settings)
    forward = _import_reference()
    dataset = open_dataset(url)
    columns = choose_columns(dataset, settings.which)
    folders, skipped = find_models(columns, settings.models, dataset.url)
    rollouts = draw_rows(dataset, settings.rows, settings.seed)
    verdicts, device = [], settings.device
    for column in (column for column in columns if column.name in folders):
        folder = folders[column.name]
        with waiting(f"loading {one_line(column.model.name)}"):
            model = forward.Reference(folder, dtype=settings.dtype, device=settings.device)
        device = str(model.device)
        verdicts.append(_judge(column, folder, model, rollouts, settings, dataset.url))
        del model  # before the next one is loaded
    return Audit(
        url=dataset.url,
        manifest_sha256=dataset.manifest_sha256,
        rows=len(rollouts),
        of_rows=dataset.num_rows,
        seed=settings.seed,
        dtype=settings.dtype,
        device=device,
        columns=tuple(verdicts),
        skipped=skipped,
    )


def draw_rows(dataset: Dataset, count: int, seed: int) -> list[Rollout]:
    """Some rows at random out of the whole dataset, in its order; only the shards that hold them are read."""
    starts = np.cumsum([0, *(commit.rows for commit in dataset.shards)])
    drawn = np.random.default_rng(seed).choice(dataset.num_rows, min(count, dataset.num_rows), replace=False)
    rows: list[Rollout] = []
    for shard, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        here = np.sort(drawn[(drawn >= start) & (drawn < stop)]) - start
        if len(here):
            rows += to_rows(dataset.read_shard(shard).take(here))
    return rows


def limits_for(dtype: str, settings: Settings) -> Limits:
    """The limits of a dtype, with those that were given in their place."""
    given = {"mean": settings.mean, "largest": settings.largest}
    return replace(LIMITS[dtype], **{key: value for key, value in given.items() if value is not None})


def _require_limits(settings: Settings) -> None:
    """A limit that is NaN or infinite lets everything pass."""
    for flag, value in {"--mean-difference": settings.mean, "--max-difference": settings.largest}.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{flag} is {value}, which no difference is over", fix="Give a number of nats")


def _judge(
    column: Column, folder: Path, model: "Reference", rollouts: Sequence[Rollout], settings: Settings, url: str
) -> Verdict:
    stamp, computed_in = column.engine, engine_dtype(column.engine, folder)
    coarser = max(computed_in, settings.dtype, key=COARSEST_LAST.index)
    limits = limits_for(coarser, settings)
    _require_ids_below(model.vocab_size, rollouts, column, url)
    rows, ranked = [], not column.topk_of_another
    with Progress(f"auditing {column.name}", len(rollouts), "tok") as progress:
        for rollout in rollouts:
            rows.append(_rescore(column, model, rollout, limits.noise, ranked))
            progress.advance(1, len(rollout.completion_ids))
    found = compare(rows, limits)
    head = "" if stamp.head_dtype == "model" else f", head in {stamp.head_dtype}"
    return Verdict(
        column=column.name,
        model=column.model.name,
        engine=f"{stamp.version} in {computed_in}{head}",
        limits_of=coarser,
        limits=limits,
        found=found,
        faults=tuple(faults(found, limits)),
    )


def _rescore(column: Column, model: "Reference", rollout: Rollout, noise: float, ranked: bool) -> Row:
    if column.name == TEACHER:
        stored, topk_ids, topk_logprobs = rollout.teacher_logprobs, rollout.topk_ids, rollout.topk_logprobs
    else:
        stored, topk_ids, topk_logprobs = rollout.rollout_logprobs, rollout.rollout_topk_ids, None
    assert stored is not None, "the reader lets no scored row through without its log-probs"
    again = model.score(rollout.prompt_ids, rollout.completion_ids, column.sampling, noise=noise, topk_ids=topk_ids)
    return Row(rollout.uid, rollout.completion_ids, stored, again, topk_ids, topk_logprobs, ranked)


def _require_ids_below(vocab_size: int, rollouts: Sequence[Rollout], column: Column, url: str) -> None:
    for rollout in rollouts:
        graded = rollout.topk_ids if column.name == TEACHER else rollout.rollout_topk_ids
        topk_ids = graded if graded is not None else np.empty(0, np.int32)
        highest = max(int(ids.max(initial=0)) for ids in (rollout.prompt_ids, rollout.completion_ids, topk_ids))
        if highest >= vocab_size:
            raise DataError(
                f"token id {highest} is outside the vocabulary of {vocab_size} of {column.model.name}",
                where=f"{url}, row {rollout.uid}",
                fix="These rows are not of that model; make the dataset anew",
            )


def _import_reference() -> ModuleType:
    try:
        from precompute.audit import reference
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError("PyTorch is not installed", fix="Install lightning-opd[train], or run `make setup`") from None
    return reference
