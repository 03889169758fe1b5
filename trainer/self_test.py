"""Before any work: is this architecture computed as transformers computes it?

Two short rows, packed and through our head, against the model's own forward pass over each row alone. An architecture
that mixes packed rows, or does something to its logits that we do not know of, trains without any other complaint.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import DataError
from trainer.attention import setting
from trainer.model import first_line
from trainer.world import World

ROW = 24
"""Tokens of a row."""
LARGEST_MEAN = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest mean |difference| in nats. Measured on SmolLM2: 2e-6 and 0.05; rows that see one another differ by 1 to 5."""


@torch.no_grad()
def prove_forward(model: PreTrainedModel, world: World, *, compute: torch.dtype) -> float:
    """Compare on every rank together; returns the mean |difference| of the log-probs in nats.

    Raises:
        DataError: they differ, or the architecture cannot take packed rows at all.
    """
    rows = [_row(model, world, start) for start in (0, ROW)]
    try:
        with torch.compiler.set_stance("force_eager"):  # or its shapes would count among those compiled for
            ours = _packed(model, rows)
            with _eager(model):
                own = torch.cat([_alone(model, row) for row in rows])
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        what = first_line(error).partition(". ")[0]  # torch goes on for a page about what else it could be
        raise _refused(model, f"its forward pass fails on packed rows: {what}") from None
    difference = (ours - own).abs().mean().item()
    if difference > LARGEST_MEAN[compute]:  # a NaN is not: the first step tells of it, and keeps the rows
        raise _refused(model, f"packed rows differ from each row alone by {difference:.2g} nats a token")
    return difference


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Within it attention is transformers' plainest, so that a fault of a kernel's is not on both sides."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before or "eager")


def _row(model: PreTrainedModel, world: World, start: int) -> Tensor:
    """Any ids far apart, (1, ROW)."""
    index = torch.arange(start, start + ROW, device=world.device)
    return (7919 * index + 13)[None] % model.config.get_text_config().vocab_size


def _packed(model: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    """Log-probs of all tokens but the first of each row, as training computes them."""
    ids = torch.cat(rows, 1)
    places = torch.arange(ROW, device=ids.device)
    predictors = torch.cat([places[:-1], places[:-1] + ROW])
    none = predictors.new_empty((len(predictors), 0))
    return model(
        ids, places.repeat(2)[None], predictors=predictors, targets=ids[0, predictors + 1], topk_ids=none
    ).chosen


def _alone(model: PreTrainedModel, row: Tensor) -> Tensor:
    """Log-probs of all tokens but the first, from the logits of the class's own forward pass."""
    logits = model(row, torch.arange(ROW, device=row.device)[None])
    return logits[:-1].log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]


def _refused(model: PreTrainedModel, what: str) -> DataError:
    attention = setting(model.config._attn_implementation)
    return DataError(
        f"models of type {model.config.model_type} are not supported with attention={attention}: {what}",
        fix="Set attention=eager, if that was another; or take a model of another type",
    )
