"""What an audit compares: the columns of a dataset, whose log-probs they claim to be, and where those models lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.canonical import as_record, parse_object
from common.config import Frozen
from common.dataset import Dataset
from common.errors import DataError, LopdError, UsageError
from common.lineage import ModelIdentity, identify, same_model, two_columns
from common.models import CONFIG, pinned, reference, resolve
from common.progress import waiting
from common.untrusted import one_line
from precompute.config import Sampling

TEACHER, ROLLOUT = "teacher_logprobs", "rollout_logprobs"
WHICH = {"teacher": (TEACHER,), "rollout": (ROLLOUT,), "both": (TEACHER, ROLLOUT)}


class EngineStamp(Frozen):
    """What the plan says of the engine that computed a column."""

    version: str = "an unknown engine"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    head_dtype: str = "model"


@dataclass(frozen=True)
class Column:
    """A column to audit, and how its numbers were made."""

    name: str  # TEACHER or ROLLOUT
    model: ModelIdentity
    engine: EngineStamp
    sampling: Sampling  # the distribution whose log-probs it holds
    required: bool
    topk_of_another: bool
    """Whether the ids graded beside each token are the most likely ones of another model."""


def choose_columns(dataset: Dataset, which: str | None) -> list[Column]:
    """The columns to audit; the teacher's first.

    Args:
        which: a key of `WHICH`; None for the first column, and the rollout beside it if its policy is at hand.

    Raises:
        UsageError: the dataset has no teacher log-probs.
        DataError: the plan does not say how a column was made.
    """
    held = [TEACHER, ROLLOUT] if dataset.kind == "scored" else [ROLLOUT]
    asked = WHICH[which] if which is not None else (held[0],)
    if missing := [name for name in asked if name not in held]:
        raise UsageError(
            f"a dataset of kind {dataset.kind!r} holds no {missing[0]}", where=dataset.url, fix="Give --which rollout"
        )
    taken = held if which is None else asked
    return [_column(dataset, name, required=name in asked) for name in taken]


def _column(dataset: Dataset, name: str, *, required: bool) -> Column:
    plan, where = dataset.plan, f"{dataset.url}, plan.json"
    if name == TEACHER:
        model, engine, sampling = plan["teacher"], plan.get("scoring_engine", {}), {}
    else:
        model, engine, sampling = plan["policy"], plan.get("engine", {}), plan["sampling"]
    return Column(
        name=name,
        model=as_record(ModelIdentity, model, where),
        engine=as_record(EngineStamp, engine, where),
        sampling=as_record(Sampling, sampling, where),
        required=required,
        topk_of_another=name == TEACHER and plan.get("topk_support") == "student",
    )


def find_models(columns: Sequence[Column], given: Sequence[str], url: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Where each column's model lies, and why a column that is not required has none; both by the column's name.

    Args:
        given: Hub ids, folders or URLs of copies; what they do not cover is looked for where the plan found it.

    Raises:
        DataError: a model is another one than its column's, with a two-column comparison.
        UsageError: a required column's model is not to be had.
    """
    copies = [_fingerprinted(name, reference(name)) for name in given]
    for _, copy in copies:
        if not any(same_model(copy, column.model) for column in columns):
            raise _another_model(columns[0], copy, url)
    folders, skipped = {}, {}
    for column in columns:
        fitting = [folder for folder, copy in copies if same_model(copy, column.model)]
        try:
            folders[column.name] = fitting[0] if fitting else _find_recorded(column, url)
        except LopdError as error:
            if column.required:
                raise
            skipped[column.name] = error.what
    return folders, skipped


def engine_dtype(engine: EngineStamp, folder: Path) -> str:
    """The dtype an engine computed in: `auto` is the checkpoint's, and bfloat16 for a float32 checkpoint."""
    if engine.dtype != "auto":
        return engine.dtype
    config: dict[str, Any] = parse_object((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float16" if stored == "float16" else "bfloat16"


def _find_recorded(column: Column, url: str) -> Path:
    """The model where the plan found it, at the revision it had then."""
    model, place = column.model, pinned(column.model.name, column.model.revision)
    try:
        folder, found = _fingerprinted(place, model.name)
    except (UsageError, DataError) as error:
        raise UsageError(
            f"the model of {column.name} is not to be had here: {error.what}",
            where=place,
            fix=f"It has tensors sha256 {one_line(model.tensors_sha256[:16])}; say where a copy lies: --model ...",
        ) from None
    if not same_model(found, model):
        raise _another_model(column, found, url)
    return folder


def _fingerprinted(model: str, name: str) -> tuple[Path, ModelIdentity]:
    with waiting(f"fingerprinting {one_line(name)}"):
        folder = resolve(model)
        return folder, identify(folder, name)


def _another_model(column: Column, found: ModelIdentity, url: str) -> DataError:
    return DataError(
        f"this is not the model of {column.name}",
        where=url,
        fix="Say where a copy of it lies: --model ...",
        detail=two_columns("in the plan", column.model, "this model", found),
    )
