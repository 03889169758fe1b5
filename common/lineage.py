"""Who a model is, what it came from, and the rule of teacher consistency.

Lightning OPD works only when the teacher that scores is the teacher whose answers the student was fine-tuned on. So
every model we write carries `provenance.json`, and both halves compare it with the teacher at hand before they work.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from pydantic import ValidationError

from common.canonical import canonical, first_problem, parse_object, sha256
from common.chat import load_tokenizer
from common.config import Frozen
from common.errors import DataError
from common.fingerprint import Fingerprint, fingerprint, tensors_sha256, weights_sha256
from common.storage import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROVENANCE = "provenance.json"
SCHEMA = "lopd.provenance/2"
TEACHER_MISMATCH = "teacher-mismatch"
"""The override that is stamped into every artifact made with a teacher other than the SFT teacher."""
ALLOW = (
    "give --allow-teacher-mismatch (precompute) or allow_teacher_mismatch=true (trainer), "
    "which is stamped into all that follows"
)
NOT_CONTENT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json, at any depth, that tell who saved a model and not what it computes."""
CONTENT = ("tensors_sha256", "config_sha256", "tokenizer_sha256", "chat_template_sha256")
"""What of an identity makes two models one. Equal files hold equal tensors, so the hash of the files adds nothing."""
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # square\n\tif x:\r\n",
    "12345678901234567890 3.14159 1e-9 0x7f -42",
    "Ünïcödé, 漢字かな交じり文, Привет, مرحبا, 🙂👩‍👩‍👧, ﬁ, é",
    "  leading,  double  and trailing blanks  ",
    "<think>\nstep 1\n</think>\n\n$\\frac{a}{b}$ \\boxed{7}",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|></s><s>",
)
"""Texts whose encodings tell tokenizers apart that have equal vocabularies."""


class ModelIdentity(Frozen):
    """A model, told by its content. `name` is the Hub id, folder or URL it came from, `revision` the Hub's commit."""

    name: str
    revision: str | None = None
    weights_sha256: str
    """Of its files; another packing of the same tensors has another."""
    tensors_sha256: str
    """Of what the files hold, however they are packed: this is who the model is."""
    config_sha256: str
    """Of config.json without `NOT_CONTENT`: its rope_theta or sliding_window change every log-prob."""
    tokenizer_sha256: str
    chat_template_sha256: str | None = None


class DatasetRef(Frozen):
    """A dataset, pinned by its manifest."""

    manifest_sha256: str
    url: str


class Provenance(Frozen):
    """Where a model came from. `teacher` is the SFT teacher, and is handed down to all later generations."""

    role: str
    base_model: ModelIdentity | None = None
    teacher: ModelIdentity | None = None
    sft_data: DatasetRef | None = None
    scored_data: DatasetRef | None = None
    template: dict[str, Any] | None = None
    """How the SFT data's prompts were rendered (the plan's `template`), and so how the model must be prompted."""
    parent: Optional["Provenance"] = None
    overrides: tuple[str, ...] = ()
    weights_sha256: str | None = None
    """Hash of the model's own weights; None inside the safetensors file, which cannot hold its own hash."""
    tensors_sha256: str | None = None
    """The same of its own tensors, by which a repacked copy is known; None inside the file too."""
    created_by: str = ""
    schema_id: Literal["lopd.provenance/2"] = SCHEMA

    @property
    def round(self) -> int:
        """How many times since its fine-tuning it was distilled on rollouts of its own: 1 after the first OPD run."""
        if self.role != "opd":
            return 0
        return 1 + (self.parent.round if self.parent is not None else 0)


def identify(folder: Path, name: str) -> ModelIdentity:
    """Fingerprint a model folder. Raises `DataError` when it has no tokenizer, and as `fingerprint` does."""
    revision = re.search(r"snapshots/([0-9a-f]{40})", str(folder.resolve()))
    tokenizer = load_tokenizer(folder)
    template = tokenizer.chat_template
    weights = fingerprint(folder)
    return ModelIdentity(
        name=name,
        revision=revision.group(1) if revision else None,
        weights_sha256=weights.weights_sha256,
        tensors_sha256=weights.tensors_sha256,
        config_sha256=config_sha256(folder),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        chat_template_sha256=_hash(template) if template else None,
    )


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of its vocabulary and of how it encodes `PROBES`."""
    return _hash({"vocabulary": tokenizer.get_vocab(), "probes": _encodings(tokenizer)})


def config_sha256(folder: Path) -> str:
    """Hash of what config.json says of the computation."""
    file = folder / "config.json"
    try:
        config = parse_object(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise DataError("the model has no config.json", where=str(folder)) from None
    return sha256(canonical(_content(config)))


def compare_tokenizers(student: Path, teacher: Path) -> None:
    """Refuse a teacher that would read the student's token ids as other text.

    Equal vocabulary sizes are not enough, and equal vocabularies are not either (merges differ), so both the
    vocabularies and the encodings of `PROBES` are compared.
    """
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    where = f"student {student}, teacher {teacher}"
    fix = "Token ids of one mean nothing to the other; use a teacher of the same family"
    our_vocabulary, their_vocabulary = ours.get_vocab(), theirs.get_vocab()
    if our_vocabulary != their_vocabulary:
        tokens = sorted(set(our_vocabulary) | set(their_vocabulary))
        different = [token for token in tokens if our_vocabulary.get(token) != their_vocabulary.get(token)]
        example = different[0]
        raise DataError(
            f"the tokenizers of student and teacher differ in {len(different)} tokens: {example!r} is "
            f"{our_vocabulary.get(example)} here and {their_vocabulary.get(example)} there",
            where=where,
            fix=fix,
        )
    for probe, our_ids, their_ids in zip(PROBES, _encodings(ours), _encodings(theirs), strict=True):
        if our_ids != their_ids:
            raise DataError(f"the tokenizers encode {probe!r} differently", where=where, fix=fix)


def read_provenance(folder: Path) -> Provenance | None:
    """The model's provenance; None when it has none.

    Raises:
        DataError: it is malformed, or the weights beside it are not those it speaks of, in whatever packing.
    """
    file = folder / PROVENANCE
    if not file.exists():
        return None
    fix = f"Fetch the model again, or remove {PROVENANCE} there and record a claim with `lopd attest`"
    try:
        provenance = Provenance.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError(f"malformed provenance: {first_problem(error)}", where=str(file), fix=fix) from None
    if provenance.weights_sha256 != weights_sha256(folder) and provenance.tensors_sha256 != tensors_sha256(folder):
        raise DataError("the weights were changed after their provenance was written", where=str(folder), fix=fix)
    return provenance


def write_provenance(folder: Path, provenance: Provenance, place: str | None = None) -> Provenance:
    """Write `provenance.json` beside the weights, with their hashes; returns what was written.

    Args:
        place: the URL that `folder` was fetched from, to write there instead; a fetched copy stays as it was.
    """
    complete = provenance.model_copy(update=fingerprint(folder)._asdict())
    Store(place or str(folder)).put(PROVENANCE, (complete.model_dump_json(indent=2) + "\n").encode())
    return complete


def safetensors_metadata(provenance: Provenance) -> dict[str, str]:
    """The provenance as metadata of a safetensors file, so that it survives the loss of its neighbour file."""
    own = dict.fromkeys(Fingerprint._fields)
    return {"lopd_provenance": provenance.model_copy(update=own).model_dump_json()}


def require_teacher(
    provenance: Provenance | None, teacher: ModelIdentity, *, student: str, allow_mismatch: bool
) -> tuple[str, ...]:
    """The rule of teacher consistency.

    Args:
        provenance: of the student.
        teacher: the model about to score, or that scored.
        student: name of the student, for the message.
        allow_mismatch: go on regardless.

    Returns:
        The overrides to stamp into what is made: empty, or `(TEACHER_MISMATCH,)`.

    Raises:
        DataError: another teacher, or a student that does not say which; with a two-column comparison.
    """
    known = provenance.teacher if provenance is not None else None
    if known is not None and same_model(known, teacher):
        return ()
    if allow_mismatch:
        return (TEACHER_MISMATCH,)
    if known is None:
        raise DataError(
            "the student's lineage does not say which teacher it was fine-tuned on",
            where=student,
            fix=f"Fine-tune it with `python -m trainer sft`, record a claim with `lopd attest`, or {ALLOW}",
        )
    raise DataError(
        "teacher consistency: this teacher is not the one the student was fine-tuned on",
        where=student,
        fix=f"Use the SFT teacher, or {ALLOW}",
        detail=two_columns("SFT teacher", known, "this teacher", teacher),
    )


def require_policy(sampled_by: ModelIdentity, student: ModelIdentity, *, dataset: str) -> None:
    """Refuse to train a model on the rollouts of another one."""
    if not same_model(sampled_by, student):
        raise DataError(
            "these rollouts were sampled by another model than the one to train",
            where=dataset,
            fix="Start from the model that sampled, or sample anew with `lopd precompute`",
            detail=two_columns("sampled by", sampled_by, "to train", student),
        )


def same_model(one: ModelIdentity, other: ModelIdentity) -> bool:
    """Equal content: tensors, config, tokenizer and chat template. Names and packing do not count."""
    return not _differences(one, other)


def _differences(one: ModelIdentity, other: ModelIdentity) -> list[str]:
    return [key for key in CONTENT if getattr(one, key) != getattr(other, key)]


def two_columns(left: str, one: ModelIdentity, right: str, other: ModelIdentity) -> str:
    """All of both, those lines marked that make them two models."""
    ours, theirs, different = one.model_dump(), other.model_dump(), _differences(one, other)
    lines = [f"    {'':<22}{left:<44}{right}"]
    for key in ours:
        mark = "≠ " if key in different else "  "
        lines.append(f"  {mark}{key:<22}{_short(ours[key]):<44}{_short(theirs[key])}")
    return "\n".join(lines)


def _short(value: object) -> str:
    text = str(value) if value is not None else "none"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _content(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _content(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in NOT_CONTENT
    }


def _encodings(tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    return [tokenizer.encode(probe, add_special_tokens=False) for probe in PROBES]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
