"""What a run starts from, opened and checked before any work: the model, the dataset, and that they belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.dataset import Dataset, open_dataset, require_kind
from common.errors import DataError, UsageError
from common.lengths import RowLengths
from common.lineage import (
    DatasetRef,
    ModelIdentity,
    Provenance,
    identify,
    read_provenance,
    require_policy,
    require_teacher,
)
from common.models import reference, resolve
from trainer.config import OpdConfig, TrainConfig
from trainer.reader import check_budget
from trainer.validation import held_out
from trainer.world import World


@dataclass(frozen=True)
class Inputs:
    """A checked pair of model and dataset."""

    folder: Path
    start: ModelIdentity
    dataset: Dataset
    lengths: RowLengths
    """The rows that are trained on."""
    held_out: RowLengths
    """Those that are not."""
    provenance: Provenance
    """What the export will say of itself."""
    chat_template: str | None = None
    """The template that the export gets in place of the starting model's; None to leave that."""
    warnings: tuple[str, ...] = ()

    @property
    def scored_by(self) -> ModelIdentity | None:
        """The model that graded the rollouts; None for SFT data."""
        return ModelIdentity.model_validate(self.dataset.plan["teacher"]) if self.dataset.plan["teacher"] else None

    def overridden(self, more: Sequence[str]) -> "Inputs":
        """The same with more overrides to be stamped into the export."""
        every = tuple(sorted({*self.provenance.overrides, *more}))
        return replace(self, provenance=self.provenance.model_copy(update={"overrides": every}))


def open_inputs(config: TrainConfig, world: World) -> Inputs:
    """Fetch, open and check; every rank gets the same inputs or raises the same error.

    Raises:
        UsageError, DataError: see `sft_provenance`, `opd_provenance` and the openers in common/.
    """
    world.from_first(lambda: resolve(config.model).name)  # one process fetches; the others then find it in the cache
    folder = resolve(config.model)
    dataset = open_dataset(config.data)
    require_kind(dataset, "scored" if isinstance(config, OpdConfig) else "sft")
    name = reference(config.model)
    start, known = world.from_first(lambda: (identify(folder, name), read_provenance(folder)))
    chat_template, warnings = None, ()
    if isinstance(config, OpdConfig):
        require_topk(dataset, config)
        provenance = opd_provenance(dataset, start, known, allow_mismatch=config.allow_teacher_mismatch)
    else:
        provenance = sft_provenance(dataset, start, known)
        chat_template, warnings = teachers_template(dataset, start)
    lengths = world.from_first(lambda: _lengths(dataset, config.token_budget))
    held = held_out(lengths, config.validation_share, config.validation_rows)
    return Inputs(folder, start, dataset, lengths.take(~held), lengths.take(held), provenance, chat_template, warnings)


def sft_provenance(dataset: Dataset, start: ModelIdentity, known: Provenance | None) -> Provenance:
    """Provenance of a model fine-tuned on this dataset: its teacher is the model that wrote the answers.

    Raises:
        DataError: teacher and student read token ids differently.
    """
    teacher = ModelIdentity.model_validate(dataset.plan["policy"])
    _require_same_tokenizer(start, teacher, dataset)
    return Provenance(
        role="sft",
        base_model=start,
        teacher=teacher,
        sft_data=DatasetRef(manifest_sha256=dataset.manifest_sha256, url=dataset.url),
        parent=known,
        template=dict(dataset.plan["template"]),
        overrides=_overrides(dataset, known),
    )


def teachers_template(dataset: Dataset, start: ModelIdentity) -> tuple[str | None, tuple[str, ...]]:
    """The chat template the answers were asked for with, where `start` has another one or none; and warnings.

    A base model rarely has its teacher's template, and a student prompted with another than it was tuned on answers
    another question.
    """
    teacher = ModelIdentity.model_validate(dataset.plan["policy"])
    same = start.chat_template_sha256 == teacher.chat_template_sha256
    if dataset.plan["template"]["mode"] != "chat" or same:
        return None, ()
    text = dataset.plan.get("chat_template")
    if isinstance(text, str):
        return text, ()
    return None, (
        f"the answers were asked for with the chat template of {teacher.name}, which {start.name} lacks and the "
        "dataset does not carry; put it beside the export, or sample the answers again",
    )


def opd_provenance(
    dataset: Dataset, start: ModelIdentity, known: Provenance | None, *, allow_mismatch: bool
) -> Provenance:
    """Provenance of a model distilled on this dataset, once the rule of teacher consistency is satisfied.

    Raises:
        DataError: the rollouts are another model's, the teacher is not the SFT teacher, or it reads ids differently.
    """
    teacher = ModelIdentity.model_validate(dataset.plan["teacher"])
    require_policy(ModelIdentity.model_validate(dataset.plan["policy"]), start, dataset=dataset.url)
    stamped = require_teacher(known, teacher, student=start.name, allow_mismatch=allow_mismatch)
    _require_same_tokenizer(start, teacher, dataset)
    return Provenance(
        role="opd",
        base_model=known.base_model if known else None,
        teacher=known.teacher if known else None,
        sft_data=known.sft_data if known else None,
        scored_data=DatasetRef(manifest_sha256=dataset.manifest_sha256, url=dataset.url),
        parent=known,
        template=(known.template if known else None) or dict(dataset.plan["template"]),
        overrides=_overrides(dataset, known, stamped),
    )


def _overrides(dataset: Dataset, known: Provenance | None, stamped: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Every override of dataset, starting model and this run: what was once overridden stays said."""
    return tuple(sorted({*dataset.plan["overrides"], *(known.overrides if known else ()), *stamped}))


def _lengths(dataset: Dataset, token_budget: int) -> RowLengths:
    lengths = dataset.row_lengths()
    check_budget(dataset, lengths, token_budget)
    return lengths


def with_objective(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The settings with the objective that `auto` means for this dataset."""
    if not isinstance(config, OpdConfig) or config.objective != "auto":
        return config
    return config.model_copy(update={"objective": "topk" if dataset.topk else "importance"})


def objective_line(config: OpdConfig, dataset: Dataset) -> str:
    """What the run descends, and how much of what the dataset holds it reads."""
    if used := topk_of(config, dataset.topk):
        return f"objective: {config.objective}, {config.kl} KL over {used} of {dataset.topk} stored log-probs a token"
    return f"objective: {config.objective}, by the stored log-prob of each sampled token"


def topk_of(config: TrainConfig, stored: int = 0) -> int:
    """Teacher columns a token that the objective reads, of those a dataset has stored."""
    if isinstance(config, OpdConfig) and config.objective == "topk":
        return config.topk or stored
    return 0


def require_topk(dataset: Dataset, config: OpdConfig) -> None:
    """Refuse an objective that wants more teacher log-probs a token than are stored. Raises UsageError."""
    wanted = max(config.topk, 1) if config.objective == "topk" else 0
    if wanted > dataset.topk:
        raise UsageError(
            f"objective=topk asks for {wanted} teacher log-probs a token, the dataset stores {dataset.topk}",
            where=dataset.url,
            fix="Score with a larger topk, or choose another objective",
        )


def _require_same_tokenizer(start: ModelIdentity, teacher: ModelIdentity, dataset: Dataset) -> None:
    if start.tokenizer_sha256 != teacher.tokenizer_sha256:
        raise DataError(
            f"the tokenizers of {start.name} and of the teacher {teacher.name} differ",
            where=dataset.url,
            fix="Token ids of one mean nothing to the other; use a teacher of the same family",
        )
