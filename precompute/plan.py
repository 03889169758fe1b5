"""Plans: every input that changes a dataset's bytes, gathered before the engine starts.

Nothing that may differ between two boxes on one job (paths of caches, number of GPUs, window sizes) belongs here.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from common.canonical import first_problem
from common.chat import Template, load_tokenizer
from common.dataset import Dataset
from common.errors import DataError, UsageError
from common.lineage import ModelIdentity, Provenance, identify, read_provenance, require_teacher
from common.models import ModelConfig, pinned, read_config, reference, resolve
from common.plans import Plan
from common.prompts import PromptSet
from common.records import created_now
from common.schema import SCHEMA_VERSION
from precompute.checks.remote_code import trusted_code
from precompute.config import Engine, Generate, Score
from precompute.engine.vllm_settings import engine_version
from precompute.filters.keeper import planned_filters
from precompute.prompt_lengths import longest_prompt
from precompute.student_topk import planned_support, planned_topk


@dataclass(frozen=True)
class Job:
    """A plan, and what it takes to carry it out on this box."""

    plan: Plan
    folder: Path
    max_model_len: int


def plan_generation(kind: str, config: Generate, prompts: PromptSet) -> Job:
    """Plan rollouts of the student (`rollouts`) or answers of the teacher (`sft`).

    Raises:
        DataError: a prompt with its completion does not fit into the model's context, or the student would be
            prompted otherwise than it was fine-tuned.
        UsageError: the model has no end-of-sequence id and none is given.
    """
    folder = resolve(config.model)
    model = read_config(folder)
    stop_ids = config.sampling.stop_ids if config.sampling.stop_ids is not None else model.eos_token_ids
    if not stop_ids:
        raise UsageError("the model names no end-of-sequence id", where=config.model, fix="Give sampling.stop_ids")
    strange = [stop_id for stop_id in stop_ids if not 0 <= stop_id < model.vocab_size]
    if strange:
        raise UsageError(
            f"stop id {strange[0]} is outside the vocabulary of {model.vocab_size}",
            where=config.model,
            fix="Mend sampling.stop_ids",
        )
    provenance, tokenizer = read_provenance(folder), load_tokenizer(folder)
    template = choose_template(config.template, provenance if kind == "rollouts" else None, config.model)
    plan = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "created": created_now(config.owner),
        "policy": identify(folder, reference(config.model)).model_dump(),
        "lineage": provenance.model_dump(mode="json") if provenance else None,
        "teacher": None,
        "prompts": {"sha256": prompts.sha256, "count": len(prompts.prompts)},
        "template": template.model_dump(mode="json"),
        "chat_template": tokenizer.chat_template,
        "sampling": {**config.sampling.model_dump(), "stop_ids": sorted(stop_ids)},
        "keep_text": config.keep_text,
        "vocab_size": model.vocab_size,
        "topk": 0,
        **planned_topk(kind, config, model.vocab_size),
        **planned_filters(config, prompts),
        "shards": math.ceil(len(prompts.prompts) / config.prompts_per_shard),
        "prompts_per_shard": config.prompts_per_shard,
        "parent": None,
        "engine": _engine(config.engine, folder, reference(config.model), model),
        "overrides": list(provenance.overrides) if provenance else [],
    }
    longest = longest_prompt(tokenizer, template, config.sampling.max_tokens, prompts, model)
    return Job(plan, folder, longest + config.sampling.max_tokens + 1)


def choose_template(given: Template | None, lineage: Provenance | None, student: str) -> Template:
    """The template to prompt a model with: the one it was fine-tuned with, else the one given, else the default.

    Raises:
        DataError: the one given is not the one of the lineage; the rollouts would start from prompts it never saw.
    """
    if lineage is None or lineage.template is None:
        return given or Template()
    try:
        tuned = Template.model_validate(lineage.template)
    except ValidationError as error:
        raise DataError(f"malformed template in the lineage: {first_problem(error)}", where=student) from None
    different = [key for key in Template.model_fields if given and getattr(given, key) != getattr(tuned, key)]
    if different:
        raise DataError(
            f"the student was fine-tuned with another template; it differs in {', '.join(different)}",
            where=student,
            fix=f"Leave [rollouts].template out, or give it as the student was tuned: {tuned.model_dump_json()}",
        )
    return tuned


def plan_scoring(config: Score, rollouts: Dataset) -> Job:
    """Plan the teacher's scores of a dataset of rollouts; enforces teacher consistency.

    Raises:
        DataError: another teacher than the SFT teacher, or another tokenizer.
    """
    lineage = Provenance.model_validate(rollouts.plan["lineage"]) if rollouts.plan["lineage"] else None
    folder, name = resolve_teacher(config.teacher, lineage, rollouts.url)
    teacher, model = identify(folder, name), read_config(folder)
    overrides = require_teacher(
        lineage, teacher, student=rollouts.plan["policy"]["name"], allow_mismatch=config.allow_teacher_mismatch
    )
    if teacher.tokenizer_sha256 != rollouts.plan["policy"]["tokenizer_sha256"]:
        raise DataError(
            "the teacher's tokenizer is not the one of the rollouts", where=name, fix="Use a teacher of the same family"
        )
    if config.topk > model.vocab_size:
        raise UsageError(f"topk {config.topk} exceeds the teacher's vocabulary of {model.vocab_size}", where=name)
    support = planned_support(config, rollouts.plan)
    if model.vocab_size < rollouts.vocab_size:
        _require_ids_below(model.vocab_size, rollouts, name, ["rollout_topk_ids"] if support else [])
    lengths = rollouts.row_lengths()
    longest = int((lengths.prompt + lengths.completion).max())
    if longest + 1 > model.max_positions:
        raise DataError(
            f"a rollout of {longest} tokens exceeds the teacher's context of {model.max_positions}", where=name
        )
    plan = {
        **{key: value for key, value in rollouts.plan.items() if key != "rollout_topk"},  # it goes, or becomes the topk
        "kind": "scored",
        "created": created_now(config.owner),
        "teacher": teacher.model_dump(),
        "parent": rollouts.manifest_sha256,
        "vocab_size": min(model.vocab_size, rollouts.vocab_size),
        "topk": config.topk,
        **support,
        "scoring_engine": _engine(config.engine, folder, name, model),
        "overrides": sorted({*rollouts.plan["overrides"], *overrides}),
    }
    return Job(plan, folder, longest + 1)


def resolve_teacher(given: str | None, lineage: Provenance | None, student: str) -> tuple[Path, str]:
    """Folder and name of the teacher to score with: the one given, else the SFT teacher of the lineage."""
    if given is not None:
        return resolve(given), reference(given)
    if lineage is None or lineage.teacher is None:
        raise UsageError(
            "no teacher is given and the student's lineage names none",
            where=student,
            fix="Give TEACHER=..., or record it with `lopd attest`",
        )
    return _fetch_recorded(lineage.teacher), lineage.teacher.name


def _fetch_recorded(teacher: ModelIdentity) -> Path:
    """The teacher of a lineage, at the revision it had then; a folder of another machine cannot be had here."""
    place = pinned(teacher.name, teacher.revision)
    try:
        return resolve(place)
    except (UsageError, DataError) as error:
        raise UsageError(
            f"the student's SFT teacher is not to be had here: {error.what}",
            where=place,
            fix=f"It has tensors sha256 {teacher.tensors_sha256[:16]}; say where it lies: TEACHER=... (--teacher)",
        ) from None


def _engine(config: Engine, folder: Path, name: str, model: ModelConfig) -> dict[str, str]:
    """What of the engine changes numbers. A model that is neither quantised nor brings code says nothing of either."""
    code = trusted_code(folder, name, model, config)
    return {
        "version": engine_version(),
        "dtype": config.dtype,
        "head_dtype": config.head_dtype,
        **({"quantization": str(model.quantization)} if model.quantization else {}),
        **({"code_sha256": code} if code else {}),
    }


def _require_ids_below(vocab_size: int, rollouts: Dataset, teacher: str, further: list[str]) -> None:
    """Refuse rollouts with ids of the student's padding, which a teacher with fewer rows cannot read."""
    for shard in range(rollouts.num_shards):
        table = rollouts.read_shard(shard, columns=["prompt_ids", "completion_ids", *further])
        leaves = (column.combine_chunks().flatten(recursive=True) for column in table.columns)
        highest = max(int(ids.to_numpy().max(initial=-1)) for ids in leaves)
        if highest >= vocab_size:
            raise DataError(
                f"the rollouts hold token id {highest}, the teacher {teacher} has only {vocab_size} rows",
                where=f"{rollouts.url}, shard {shard}",
                fix="Use a teacher with at least the student's vocabulary",
            )
