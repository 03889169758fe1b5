"""`lopd cache inspect`: what a dataset or a model is, what it was made from, and how its rows look."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from common.cache.lineage_tree import Node, dataset_tree, model_tree
from common.cache.samples import Sample, sample_of, spread
from common.cache.statistics import Statistics
from common.cache.stream import row_groups
from common.cache.tokens import local_tokenizer
from common.canonical import as_record, parse_object
from common.chat import load_tokenizer
from common.dataset import Dataset, open_dataset
from common.errors import DataError, UsageError
from common.filtered import dropped
from common.lineage import PROVENANCE, ModelIdentity, Provenance
from common.records import MANIFEST, PLAN
from common.schema import arrow_schema, to_rows, widths_in
from common.storage import NotFound, Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inspection:
    """All that is known of a dataset; of a model only the lineage, its facts and overrides."""

    facts: dict[str, Any]
    overrides: tuple[str, ...]
    lineage: Node
    statistics: Statistics | None = None
    samples: tuple[Sample, ...] = ()
    note: str = ""
    """What of the samples could not be shown, and why."""


def inspect(url: str, *, rows: int, uid: str | None, tokenizer: Path | None) -> Inspection:
    """Look at the dataset or model at `url`; reads all of a dataset, one row group at a time.

    Args:
        rows: how many rows to show, spread evenly over the dataset.
        uid: show this row alone.
        tokenizer: a folder to read tokens with; None for the policy's own, if this machine has it.

    Raises:
        DataError: neither a dataset nor a model with a lineage lies there, or it is unfinished or altered.
        UsageError: there is no row `uid`.
    """
    store = Store(url)
    if not store.exists(MANIFEST) and not store.exists(PLAN):
        return _inspect_model(store)
    dataset = open_dataset(url)
    lineage = dataset_tree(dataset.plan, dataset.url, dataset.manifest_sha256)
    statistics, chosen = _read(dataset, spread(dataset.num_rows, rows), uid)
    spelling, note = _tokenizer(dataset, tokenizer) if len(chosen) else (None, "")
    samples = tuple(sample_of(row, spelling) for row in to_rows(chosen))
    if spelling is not None and not all(sample.spelled for sample in samples):
        note = "the tokenizer found here does not spell these rows as they were stored: stored text is shown"
    return Inspection(dataset_facts(dataset), tuple(dataset.plan["overrides"]), lineage, statistics, samples, note)


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """What the records say, as JSON."""
    plan, stored = dataset.plan, sum(commit.bytes for commit in dataset.shards)
    columns = arrow_schema(*widths_in(dataset.plan))
    return {
        "url": dataset.url,
        "kind": dataset.kind,
        "state": "complete",
        "dataset_id": dataset.manifest["dataset_id"],
        "manifest_sha256": dataset.manifest_sha256,
        "schema_version": dataset.manifest["schema_version"],
        "columns": {field.name: _plainly(field.type) for field in columns},
        "created": plan["created"],
        "prompts": plan["prompts"]["count"],
        "rows": dataset.num_rows,
        "prompt_tokens": dataset.manifest["prompt_tokens"],
        "tokens": dataset.num_tokens,
        "dropped": dropped(commit.stats for commit in dataset.shards),
        "rejected_rows": [row.model_dump() for commit in dataset.shards for row in commit.rejected],
        "shards": dataset.num_shards,
        "shards_committed": dataset.num_shards,
        "bytes": stored,
        "bytes_per_token": stored / dataset.num_tokens,
        "model": plan["policy"]["name"],
        "policy_identity": plan["policy"],
        "teacher": plan["teacher"]["name"] if plan["teacher"] else None,
        "teacher_identity": plan["teacher"],
        "sampling": plan["sampling"],
        "template": plan["template"],
        "filters": plan.get("filters"),
        "topk": dataset.topk,
        "engine": plan.get("engine"),
        "scoring_engine": plan.get("scoring_engine"),
        "overrides": list(plan["overrides"]),
    }


def model_facts(provenance: Provenance, url: str) -> dict[str, Any]:
    """What the provenance of a model says, as JSON."""
    recorded = provenance.model_dump(mode="json")
    teacher = recorded["teacher"]
    return {
        "url": url,
        "kind": "model",
        "role": provenance.role,
        "teacher": teacher["name"] if teacher else None,
        "teacher_identity": teacher,
        "overrides": recorded["overrides"],
        "provenance": recorded,
    }


def _inspect_model(store: Store) -> Inspection:
    try:
        data = store.get(PROVENANCE)
    except NotFound:
        raise DataError(
            f"neither a dataset nor a model with {PROVENANCE} lies here",
            where=store.url,
            fix="Check the URL; a model trained elsewhere gets its lineage by `lopd attest`",
        ) from None
    where = f"{store.url}/{PROVENANCE}"
    provenance = as_record(Provenance, parse_object(data, where), where)
    return Inspection(model_facts(provenance, store.url), provenance.overrides, model_tree(provenance, name=store.url))


def _plainly(kind: pa.DataType) -> str:
    """The type without what is the same of all of ours: names of elements, and that none is null."""
    return str(kind).replace("element: ", "").replace(" not null", "")


def _read(dataset: Dataset, indices: Sequence[int], uid: str | None) -> tuple[Statistics, pa.Table]:
    """Statistics of all rows, and the rows to show."""
    statistics, chosen, first = Statistics(scored=dataset.kind == "scored"), [], 0
    for table in row_groups(dataset, "read"):
        statistics.add(table)
        if uid is None:
            wanted = [index - first for index in indices if first <= index < first + len(table)]
        else:
            wanted = [place] if (place := table["uid"].index(uid).as_py()) >= 0 else []
        chosen.append(table.take(np.array(wanted, np.int64)))
        first += len(table)
    rows = pa.concat_tables(chosen)
    if uid is not None and not len(rows):
        raise UsageError(f"there is no row {uid!r}", where=dataset.url, fix="`lopd cache inspect` shows some uids")
    return statistics, rows


def _tokenizer(dataset: Dataset, given: Path | None) -> tuple["PreTrainedTokenizerBase | None", str]:
    """What spells the tokens; else a note that says why not."""
    if given is not None:
        return load_tokenizer(given), ""
    policy = ModelIdentity.model_validate(dataset.plan["policy"])
    found = local_tokenizer(policy)
    if found is not None:
        return found, ""
    return None, f"the tokenizer of {policy.name} is not on this machine: give --tokenizer FOLDER to see tokens"
