"""Plans, commits and manifests: the records of a dataset, what makes two plans one, and what a manifest must satisfy.

A dataset is told by what changes its bytes. The name by which a model was found (a folder of one box, a URL, a Hub id)
does not: two boxes that hold the same weights under other names work on one plan.
"""

import re
from collections.abc import Mapping
from typing import Any

from common.canonical import canonical, sha256
from common.config import Frozen
from common.errors import DataError

KINDS = ("sft", "rollouts", "scored")
Plan = dict[str, Any]
"""Inputs that change bytes. Every plan has kind, schema_version, shards, prompts_per_shard, vocab_size, topk, policy,
lineage, teacher, sampling, template, chat_template, prompts, parent and overrides; `precompute.plan` builds them."""
NAMES = ("name", "revision", "url")
"""Keys of a plan, at any depth, that say where something was found and not what it is."""
VERBATIM = "arguments"
"""Below this key of a plan, names are the chat template's own, and all of them count."""
DATA_FILE = re.compile(r"data/\d{6}-[0-9a-f]{16}\.parquet")
REBUILD = "Copy the dataset again, or make it anew at another URL"


class Commit(Frozen):
    """One shard, committed: what the object must be for a reader to accept it."""

    shard: int
    file: str
    sha256: str
    bytes: int
    rows: int
    prompt_tokens: int
    tokens: int
    stats: dict[str, float]


class Manifest(Frozen):
    """All shards of a finished dataset."""

    schema_version: int
    dataset_id: str
    plan_sha256: str
    kind: str
    overrides: tuple[str, ...]
    rows: int
    prompt_tokens: int
    tokens: int
    shards: tuple[Commit, ...]


def dataset_id(plan: Plan) -> str:
    """First 16 hex digits of the sha256 of the plan's content."""
    return sha256(canonical(content(plan)))[:16]


def content(plan: Mapping[str, Any]) -> Plan:
    """The plan without `NAMES`: equal for two plans that make the same bytes."""
    return {
        key: content(value) if isinstance(value, Mapping) and key != VERBATIM else value
        for key, value in plan.items()
        if key not in NAMES
    }


def another_plan(theirs: Plan, ours: Plan, url: str) -> DataError:
    """The error that names the keys in which the plan at `url` differs from ours, with both in two columns."""
    there, here = content(theirs), content(ours)
    rows = [
        f"  {key:<32} {_shown(there, key):<44} {_shown(here, key)}"
        for key in sorted({*_leaves(there), *_leaves(here)})
        if _at(there, key) != _at(here, key)
    ]
    keys = ", ".join(row.split()[0] for row in rows)
    return DataError(
        f"another plan lies here; it differs in {keys}",
        where=url,
        fix="Give back the old settings to resume it, or choose another CACHE",
        detail="\n".join([f"  {'key':<32} {'there':<44} here", *rows]),
    )


def check_manifest(manifest: Manifest, plan: Plan, where: str) -> None:
    """Refuse a manifest that is not one of this plan, or that points outside its dataset."""
    if len(manifest.shards) != plan["shards"]:
        raise DataError(f"{len(manifest.shards)} shards, the plan has {plan['shards']}", where=where, fix=REBUILD)
    if manifest.kind not in KINDS:
        raise DataError(f"unknown kind of dataset {manifest.kind!r}", where=where)
    for index, commit in enumerate(manifest.shards):
        if commit.shard != index:
            raise DataError(f"shard {index} is not in its place", where=where)
        if not DATA_FILE.fullmatch(commit.file):
            raise DataError(f"not a path of a shard: {commit.file!r}", where=where, fix="Do not trust this dataset")
    if manifest.rows != sum(commit.rows for commit in manifest.shards):
        raise DataError("the row counts do not add up", where=where)


def _leaves(plan: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in plan.items():
        keys += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return keys


def _at(plan: Any, key: str) -> Any:
    for name in key.split("."):
        plan = plan.get(name) if isinstance(plan, Mapping) else None
    return plan


def _shown(plan: Plan, key: str) -> str:
    """The value on one line; one of pages, such as a chat template, by its beginning and its hash."""
    text = str(_at(plan, key)).replace("\n", "\\n")
    return text if len(text) <= 44 else f"{text[:24]}... sha256 {sha256(text.encode())[:8]}"
