"""The gate before the first update: does the student give back the log-probs that were stored when it sampled?

A wrong tokenizer, template, temperature, checkpoint or a shift by one token trains without any other complaint. A mean
alone lets a shift through, so the comparison is made per token, in place and one token to either side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from common.alignment import check_alignment
from common.errors import DataError
from trainer.batch import pack
from trainer.config import OpdConfig
from trainer.epoch import turns
from trainer.reader import Reader, step_plan
from trainer.step import score
from trainer.world import World

CLEARLY = 0.5
"""Offset 0 must halve the mean difference of its neighbours."""
OVERRIDE = "parity"
"""What is stamped into the export where the gate failed and parity=report let the run go on."""
MIN_TOKENS = 32
"""Fewer tokens than this cannot tell the offsets apart; the thresholds hold all the same."""


@dataclass(frozen=True)
class Parity:
    """Student against stored log-probs over the tokens of some rows, in nats."""

    tokens: int
    mean: float  # of |student - stored|
    largest: float
    k3: float  # of KL(rollout policy || student)
    before: float  # the mean against the stored value one token earlier
    after: float  # and one token later

    def __str__(self) -> str:
        return (
            f"mean |d| {self.mean:.4f}, max {self.largest:.3f}, k3 {self.k3:.2e} nats over {self.tokens} tokens; "
            f"one token earlier {self.before:.3f}, later {self.after:.3f}"
        )


def compare(student: Sequence[np.ndarray], stored: Sequence[np.ndarray]) -> Parity:
    """Compare per token; each argument has one (tokens,) array a row."""
    here = np.concatenate(student) - np.concatenate(stored)
    return Parity(
        tokens=len(here),
        mean=float(np.abs(here).mean()),
        largest=float(np.abs(here).max()),
        k3=float((np.expm1(here) - here).mean()),
        before=_mean_gap([(s[1:], r[:-1]) for s, r in zip(student, stored, strict=True)]),
        after=_mean_gap([(s[:-1], r[1:]) for s, r in zip(student, stored, strict=True)]),
    )


def cut_short(sampling: Mapping[str, Any]) -> str | None:
    """What of the sampling took tokens out of the distribution, or None.

    Log-probs after such a cut are not the student's, so neither this gate nor an importance weight means anything.
    """
    if sampling["temperature"] == 0:
        return "the rollouts are greedy (temperature=0), not samples"
    whole = {"top_p": 1, "top_k": 0, "min_p": 0}
    cut = [f"{key}={sampling[key]}" for key, value in whole.items() if sampling[key] != value]
    return (
        f"the rollouts were sampled with {', '.join(cut)}, which cuts tokens out of the distribution" if cut else None
    )


def fault(parity: Parity, *, mean: float, k3: float) -> str | None:
    """What is wrong with the comparison, or None."""
    if parity.tokens >= MIN_TOKENS and parity.mean > CLEARLY * min(parity.before, parity.after):
        side = "earlier" if parity.before < parity.after else "later"
        return f"the stored log-probs fit as well or better one token {side}"
    if parity.mean > mean:
        return f"mean |d| is over parity_mean={mean}"
    if parity.k3 > k3:
        return f"k3 is over parity_k3={k3}"
    return None


def prove_parity(
    model: PreTrainedModel, reader: Reader, config: OpdConfig, world: World, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Score rows of the first step before any update; every rank sees all of them and decides alike.

    Returns:
        The overrides to stamp into what is made: empty, or `(OVERRIDE,)`.

    Raises:
        DataError: student and rollout columns do not fit (unless parity=report), or teacher and rollout columns.
    """
    dataset = reader.dataset
    student, rollout, teacher = _first_rows(model, reader, config, world)
    found = compare(student, rollout)
    say(f"parity: {found}")
    what = cut_short(dataset.plan["sampling"]) or fault(found, mean=config.parity_mean, k3=config.parity_k3)
    if what and config.parity == "enforce":
        raise refuse(found, what, dataset.url)
    if what:
        say(f"WARNING: {what}; going on because parity=report")
    alignment = check_alignment(rollout, teacher, where=dataset.url)
    say(f"alignment: teacher and rollout log-probs correlate {alignment.here:.2f} over {alignment.tokens} tokens")
    return (OVERRIDE,) if what else ()


@torch.no_grad()
def _first_rows(
    model: PreTrainedModel, reader: Reader, config: OpdConfig, world: World
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Student, rollout and teacher log-probs of about `parity_rows` rows of the first step, one array a row."""
    temperature = reader.dataset.plan["sampling"]["temperature"] or 1.0  # greedy rollouts have none of their own
    left = -(-config.parity_rows // world.size)
    bins = []
    for bin in turns(next(step_plan(reader.lengths, config, world.size)), world.rank, world.size):
        bins.append(bin[:left])
        left -= len(bins[-1])
    rows = iter(world.together(lambda: reader.rows([row for bin in bins for row in bin])))
    columns: tuple[list[np.ndarray], ...] = ([], [], [])
    for bin in bins:
        batch = pack(list(islice(rows, len(bin)))).to(world.device)
        chosen = score(model, batch, temperature=temperature, chunk=config.logits_chunk).chosen
        for column, values in zip(columns, (chosen, batch.rollout, batch.teacher), strict=True):
            column += batch.per_row(values)
    shares = world.gather(columns)
    student, rollout, teacher = ([row for share in shares for row in share[index]] for index in range(3))
    return student, rollout, teacher


def refuse(parity: Parity, what: str, where: str) -> DataError:
    """The error of a failed gate, with the figures and what to check."""
    return DataError(
        f"the student does not give its own rollout log-probs back: {what} ({parity})",
        where=where,
        fix="Check that model, tokenizer, template and temperature are those of the rollouts, or set parity=report",
    )


def _mean_gap(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    gaps = np.concatenate([np.abs(student - stored) for student, stored in pairs])
    return float(gaps.mean()) if len(gaps) else float("inf")
