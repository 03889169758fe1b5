"""What makes two plans one, and how to say in what they differ.

A dataset is told by what changes its bytes. The name by which a model was found (a folder of one box, a URL, a Hub id)
does not, nor does the packing of its weights into files: two boxes that hold the same weights under other names work on
one plan.
"""

from collections.abc import Mapping
from typing import Any

from common.canonical import canonical, sha256
from common.errors import DataError

Plan = dict[str, Any]
"""Inputs that change bytes, of the shape `common.records.PlanShape`; `precompute.plan` builds them."""
NAMES = ("name", "revision", "url", "weights_sha256", "created")
"""Keys of a plan, at any depth, that say where something was found, how it was packed or who began; not what it is."""
VERBATIM = "arguments"
"""Below this key of a plan, names are the chat template's own, and all of them count."""


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
