"""The lineage of a dataset or a model as a tree: every node was made from its children.

Pure: from a plan or a provenance to nodes. What nobody recorded is said to be unknown, never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.lineage import TEACHER_MISMATCH, DatasetRef, ModelIdentity, Provenance, same_model

DATASETS = {"sft": "answers of a teacher", "rollouts": "rollouts", "scored": "scored rollouts"}
MODELS = {"sft": "SFT student", "opd": "distilled student", "attested": "student"}


@dataclass(frozen=True)
class Mark:
    """A judgement on a node: `good` was checked, `doubt` rests on a claim, `bad` was overridden."""

    text: str
    level: Literal["good", "doubt", "bad"]


@dataclass(frozen=True)
class Node:
    """A model, a dataset or a set of prompts."""

    what: str
    name: str = ""
    """Hub id, folder or URL; empty where none was recorded."""
    pins: tuple[tuple[str, str], ...] = ()
    """What pins it: revision, weights, manifest; hashes in full."""
    marks: tuple[Mark, ...] = ()
    made_from: tuple["Node", ...] = ()


def dataset_tree(plan: Mapping[str, Any], url: str, manifest_sha256: str) -> Node:
    """The tree of a finished dataset."""
    policy = ModelIdentity.model_validate(plan["policy"])
    lineage = Provenance.model_validate(plan["lineage"]) if plan["lineage"] else None
    prompts = Node("prompts", pins=(("sha256", str(plan["prompts"]["sha256"])),))
    sampled_by = model_tree(lineage, policy, what="teacher" if plan["kind"] == "sft" else "student")
    this = _pins(manifest_sha256=manifest_sha256)
    marks = tuple(Mark(f"overridden: {name}", "bad") for name in plan["overrides"])
    if plan["kind"] != "scored":
        return Node(DATASETS[plan["kind"]], url, this, marks, (sampled_by, prompts))
    teacher = ModelIdentity.model_validate(plan["teacher"])
    rollouts = Node(DATASETS["rollouts"], pins=_pins(manifest_sha256=plan["parent"]), made_from=(sampled_by, prompts))
    graded_by = Node("teacher", teacher.name, _identity(teacher), (_consistency(lineage, teacher),))
    return Node(DATASETS["scored"], url, this, marks, (graded_by, rollouts))


def model_tree(
    provenance: Provenance | None, identity: ModelIdentity | None = None, *, what: str = "student", name: str = ""
) -> Node:
    """The tree of a model.

    Args:
        identity: what it is; None where only its provenance is known.
        what: its part, where its lineage does not say it.
        name: where it lies, without an identity.
    """
    name = identity.name if identity is not None else name
    if provenance is None:
        unknown = () if what in ("teacher", "base model") else (Mark("no lineage", "doubt"),)
        return Node(what, name, _identity(identity), unknown)
    part = what if what in ("teacher", "base model") else MODELS.get(provenance.role, provenance.role)
    if provenance.role == "opd":
        part = f"{part}, round {rounds(provenance)}"
    pins = _identity(identity) if identity is not None else _pins(weights_sha256=provenance.weights_sha256)
    return Node(part, name, pins, _new_overrides(provenance), _made_from(provenance))


def rounds(provenance: Provenance | None) -> int:
    """How many rounds of distillation a model went through."""
    if provenance is None:
        return 0
    return rounds(provenance.parent) + (provenance.role == "opd")


def _made_from(provenance: Provenance) -> tuple[Node, ...]:
    if provenance.role == "attested":
        claimed = Mark("attested, not verified", "doubt")
        return (Node("teacher", *_model(provenance.teacher), marks=(claimed,)),)
    if provenance.role == "opd":
        return (_scored(provenance), model_tree(provenance.parent, name=""))
    base = model_tree(provenance.parent, provenance.base_model, what="base model")
    teacher = Node("teacher", *_model(provenance.teacher))
    return (base, _dataset("SFT data", provenance.sft_data, teacher))


def _scored(provenance: Provenance) -> Node:
    """The data a student was distilled from; its teacher is the SFT teacher unless that check was overridden."""
    if TEACHER_MISMATCH in provenance.overrides:
        teacher = Node("teacher", marks=(Mark("may be another than the SFT teacher: see that dataset", "bad"),))
    else:
        teacher = Node("teacher", *_model(provenance.teacher), marks=(_by_claim_or_checked(provenance),))
    return _dataset(DATASETS["scored"], provenance.scored_data, teacher)


def _consistency(lineage: Provenance | None, teacher: ModelIdentity) -> Mark:
    """Teacher consistency, judged anew from what the plan holds."""
    if lineage is None or lineage.teacher is None:
        return Mark("nothing says that it is the SFT teacher", "bad")
    if not same_model(lineage.teacher, teacher):
        return Mark(f"not the SFT teacher, which is {lineage.teacher.name}", "bad")
    return _by_claim_or_checked(lineage)


def _by_claim_or_checked(provenance: Provenance) -> Mark:
    if _is_attested(provenance):
        return Mark("the SFT teacher, as attested", "doubt")
    return Mark("the SFT teacher", "good")


def _is_attested(provenance: Provenance) -> bool:
    """Whether the SFT teacher is known from a claim alone; distillation hands a claim down."""
    if provenance.role == "opd" and provenance.parent is not None:
        return _is_attested(provenance.parent)
    return provenance.role == "attested"


def _new_overrides(provenance: Provenance) -> tuple[Mark, ...]:
    """What was overridden to make this model; an ancestor's is shown there."""
    before = provenance.parent.overrides if provenance.parent is not None else ()
    return tuple(Mark(f"overridden: {name}", "bad") for name in provenance.overrides if name not in before)


def _dataset(what: str, data: DatasetRef | None, teacher: Node) -> Node:
    if data is None:
        return Node(what, made_from=(teacher,))
    return Node(what, data.url, _pins(manifest_sha256=data.manifest_sha256), made_from=(teacher,))


def _model(identity: ModelIdentity | None) -> tuple[str, tuple[tuple[str, str], ...]]:
    return (identity.name if identity is not None else "", _identity(identity))


def _identity(identity: ModelIdentity | None) -> tuple[tuple[str, str], ...]:
    return _pins(revision=identity.revision, weights_sha256=identity.weights_sha256) if identity is not None else ()


def _pins(**pins: str | None) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in pins.items() if value is not None)
