"""What can be refused before an engine starts: named checks, each of which says what it found or what is wrong.

Some were made when the phase was planned (`precompute.plan` refuses what breaks them); here they are told. Nothing is
written but for a probe of the store, and that only when all else is well.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.chat import load_tokenizer
from common.errors import DataError, LopdError, RetryLater, UsageError
from common.lineage import Provenance, compare_tokenizers, identify, require_teacher
from common.models import read_config
from common.prompts import Prompt, PromptSet
from precompute.checks.memory import Checkpoint
from precompute.checks.remote_code import trusted_code
from precompute.checks.rights import try_rights
from precompute.checks.room import require_room
from precompute.config import Engine, Generate, Score
from precompute.fleet.devices import Gpu, gpus_here, slots
from precompute.fleet.replica import Slot
from precompute.plan import Job, resolve_teacher
from precompute.student_topk import planned_support

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    said: str
    """What was found; after a warning, what is odd about it."""
    warning: bool = False
    problem: LopdError | None = None

    @property
    def line(self) -> str:
        """What is shown of it."""
        if self.problem is not None:
            return f"{self.name}: {str(self.problem).splitlines()[0]}"
        return f"{self.name}: {'warning: ' if self.warning else 'ok, '}{self.said}"


@dataclass(frozen=True)
class Place:
    """Where a phase's engines will run."""

    slots: Sequence[Slot]
    gpus: Sequence[Gpu]
    """Of this box; none on a CPU."""
    elsewhere: bool = False
    """On the nodes of a cluster, of which nothing is known here."""


def place_of(section: Generate | Score) -> Place:
    """Where the engines of a phase will run. Raises as `slots` does."""
    if section.fleet.on == "ray":
        return Place((), (), elsewhere=True)
    gpus = gpus_here()
    return Place(slots(section.fleet, section.engine, gpus), gpus)


def require(checks: Sequence[Check]) -> None:
    """Raise the first problem; the others stand below it, a line each, so that all can be mended at once.

    One that may pass by itself comes last, for it must not have a launcher try again what has to be mended.
    """
    for check in checks:
        log.info("%s", check.line)
    wrong = [check for check in checks if check.problem is not None]
    first, *others = sorted(wrong, key=lambda check: isinstance(check.problem, RetryLater)) or [None]
    if first is None or first.problem is None:
        return
    if others:
        told = [first.problem.detail, *(f"also {check.line}" for check in others if check is not None)]
        first.problem.detail = "\n".join(line for line in told if line)
    raise first.problem


def summary_lines(checks: Sequence[Check]) -> list[str]:
    """What is shown of checks that all hold: how many, and each that is odd. `lopd -v` shows a line for each."""
    warnings = [check.line for check in checks if check.warning]
    counts = [f"{len(checks) - len(warnings)} checks ok"]
    counts += [f"{len(warnings)} warning{'s' * (len(warnings) > 1)}"] if warnings else []
    return [f"preflight: {', '.join(counts)}", *warnings] if checks else []


def check_generation(section: Generate, prompts: PromptSet, job: Job, place: Place) -> list[Check]:
    """Of a phase that samples, once it is planned."""
    checks = [*_generation(section, prompts, job), *_engine(section.engine, job, place)]
    return _with_stores(checks, [(section.cache, section.single_writer)])


def check_scoring(section: Score, job: Job, place: Place) -> list[Check]:
    """Of scoring rollouts that are there, once it is planned."""
    teacher, overrides = job.plan["teacher"], job.plan["overrides"]
    longest = f"the longest rollout has {job.max_model_len - 1:,} tokens of {read_config(job.folder).max_positions:,}"
    checks = [
        Check("teacher", _consistency(teacher["name"], overrides), warning=bool(overrides)),
        Check("tokenizer", "the one of the rollouts"),
        Check("context", longest),
        *_engine(section.engine, job, place),
    ]
    return _with_stores(checks, [(section.cache, section.single_writer)])


def check_run(
    generation: Generate, prompts: PromptSet, job: Job, scoring: Score, places: tuple[Place, Place]
) -> list[Check]:
    """Of both phases, before the first starts: what is wrong with the teacher shows before a rollout is paid for.

    Args:
        job: the planned rollouts.
        places: of the rollouts, and of the scores.
    """
    checks = [
        *_generation(generation, prompts, job),
        *_engine(generation.engine, job, places[0]),
        *_teacher(scoring, job, places[1]),
    ]
    return _with_stores(checks, [(each.cache, each.single_writer) for each in (generation, scoring)])


def _generation(section: Generate, prompts: PromptSet, job: Job) -> Iterator[Check]:
    plan, model = job.plan, read_config(job.folder)
    room = plan["sampling"]["max_tokens"]
    yield Check("prompts", f"{len(prompts.prompts):,}, the longest of {job.max_model_len - 1 - room:,} tokens")
    yield from _repeated(prompts)
    yield Check("context", f"{job.max_model_len - 1:,} tokens at most, of {model.max_positions:,}")
    tuned = ((plan["lineage"] or {}).get("template") is not None) and plan["kind"] == "rollouts"
    yield Check(
        "template",
        f"{plan['template']['mode']}, {'as its lineage has it' if tuned else 'for no lineage names another'}",
    )
    yield from _ends(section.model, job.folder, plan["sampling"]["stop_ids"], model.eos_token_ids)


def _repeated(prompts: PromptSet) -> Iterator[Check]:
    """One text under several ids is sampled so many times: wanted or not, it is told. Holds 8 bytes a prompt."""
    keys = np.fromiter((_text_key(prompt) for prompt in prompts.prompts), np.int64, len(prompts.prompts))
    texts, count = np.unique(keys, return_counts=True)
    again = texts[count > 1]
    if len(again):
        first = next(prompt.id for prompt in prompts.prompts if _text_key(prompt) in again)
        rows = count[count > 1].sum()
        said = f"{len(again):,} stand more than once, in {rows:,} rows (first {first}): each is sampled anew"
        yield Check("repeated prompts", said, warning=True)


def _text_key(prompt: Prompt) -> int:
    return hash((prompt.text, str(prompt.messages)))


def _ends(name: str, folder: Path, stop_ids: Sequence[int], own: Sequence[int]) -> Iterator[Check]:
    """The ids that end a completion, and those of the model or its tokenizer that will not."""
    yield Check("stop ids", ", ".join(map(str, stop_ids)))
    tokenizers: Any = load_tokenizer(folder).eos_token_id
    for whose, ids in (("the model's", own), ("its tokenizer's", [] if tokenizers is None else [tokenizers])):
        if left_out := [each for each in ids if each not in stop_ids]:
            said = f"{whose} own end-of-sequence id {left_out[0]} does not end a completion of {name}"
            yield Check("stop ids", f"{said}; sampling.stop_ids may take it in", warning=True)


def _engine(engine: Engine, job: Job, place: Place) -> Iterator[Check]:
    """Whether the model runs as the engine is set up, and where."""
    checkpoint, model = Checkpoint.of(job.folder), read_config(job.folder)
    weights = str(model.quantization) if model.quantization else "not quantised"
    yield Check("weights", weights)
    yield from _asked("head", lambda: _head(engine, checkpoint))
    yield from _asked("heads", lambda: _heads(engine.tensor_parallel, checkpoint))
    if place.elsewhere:
        yield Check("memory", "of other nodes is not known here", warning=True)
    else:
        yield from _asked(
            "memory", lambda: require_room(checkpoint, engine, job.max_model_len, place.slots, place.gpus)
        )


def _head(engine: Engine, checkpoint: Checkpoint) -> str:
    if engine.head_dtype == "float32" and checkpoint.head_is_quantised:
        raise UsageError(
            "the output head is quantised, so that engine.head_dtype = float32 cannot be had",
            fix="Set engine.head_dtype to model, or take a checkpoint whose lm_head is not quantised",
        )
    return f"in {engine.head_dtype}" if engine.head_dtype == "float32" else "in the model's dtype"


def _heads(span: int, checkpoint: Checkpoint) -> str:
    """vLLM shares out heads of attention, and copies those of keys and values where there are too few."""
    if checkpoint.heads is None:
        return "config.json does not tell how many"
    heads, keys = checkpoint.heads
    if heads % span or (keys % span and span % keys):
        fit = [each for each in range(1, heads + 1) if not heads % each and not (keys % each and each % keys)]
        raise UsageError(
            f"engine.tensor_parallel = {span} does not divide {heads} heads of attention, {keys} of keys and values",
            fix=f"Set it to one of {', '.join(map(str, fit[:6]))}",
        )
    return f"{heads} of attention, {keys} of keys and values; tensor_parallel = {span}"


def _teacher(scoring: Score, job: Job, place: Place) -> Iterator[Check]:
    """All that `plan_scoring` will ask of the teacher, as far as it can be told before there are rollouts."""
    policy = job.plan["policy"]
    lineage = Provenance.model_validate(job.plan["lineage"]) if job.plan["lineage"] else None
    try:
        folder, name = resolve_teacher(scoring.teacher, lineage, policy["name"])
        identity, model = identify(folder, name), read_config(folder)
    except LopdError as error:
        yield Check("teacher", "", problem=error)
        return

    def consistent() -> str:
        overrides = require_teacher(
            lineage, identity, student=policy["name"], allow_mismatch=scoring.allow_teacher_mismatch
        )
        return _consistency(name, overrides)

    def reads_rollouts() -> str:
        compare_tokenizers(job.folder, folder)
        highest = max(load_tokenizer(folder).get_vocab().values())
        if highest >= model.vocab_size:
            raise DataError(f"the tokenizer has token id {highest}, the teacher {model.vocab_size} rows", where=name)
        return f"teacher and student agree on {highest + 1:,} ids"

    def fits_context() -> str:
        if job.max_model_len > model.max_positions:
            raise DataError(
                f"a rollout may have {job.max_model_len - 1} tokens, the teacher's context takes "
                f"{model.max_positions - 1}",
                where=name,
                fix="Lower sampling.max_tokens",
            )
        return f"{job.max_model_len - 1:,} tokens at most, of {model.max_positions:,}"

    def has_topk() -> str:
        if scoring.topk > model.vocab_size:
            raise UsageError(f"topk {scoring.topk} exceeds the teacher's vocabulary of {model.vocab_size}", where=name)
        support = planned_support(scoring, job.plan)
        return f"{scoring.topk}, the student's" if support else str(scoring.topk)

    yield from _asked("teacher", consistent)
    yield from _asked("teacher's tokenizer", reads_rollouts)
    yield from _asked("teacher's context", fits_context)
    yield from _asked("teacher's top-k", has_topk)
    yield from _asked("teacher's code", lambda: trusted_code(folder, name, model, scoring.engine) or "none to run")
    for check in _engine(scoring.engine, Job({}, folder, job.max_model_len), place):
        yield Check(f"teacher's {check.name}", check.said, check.warning, check.problem)


def _consistency(teacher: str, overrides: Sequence[str]) -> str:
    return f"{teacher}; overridden: {', '.join(overrides)}" if overrides else f"{teacher}, the student's SFT teacher"


def _asked(name: str, question: Callable[[], str]) -> Iterator[Check]:
    try:
        yield Check(name, question())
    except LopdError as error:
        yield Check(name, "", problem=error)


def _with_stores(checks: list[Check], stores: Sequence[tuple[str, bool]]) -> list[Check]:
    """All of them, and last the stores, which are left alone while something else is wrong."""
    if any(check.problem is not None for check in checks):
        return checks
    told = [
        check for url, single_writer in stores for check in _asked("storage", partial(try_rights, url, single_writer))
    ]
    return [*checks, *told]
