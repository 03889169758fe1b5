"""What the mid-size check found, as the report takes it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.results.findings import Finding, Row
from benchmarks.study.results.statistics import Mean

RESULT = "midsize.json"
"""Written by `benchmarks.study.midsize`."""
SFT = "after SFT"
COLUMNS = {
    "reverse_kl": "reverse KL, nats (± over prompts)",
    "to_paper": "minus paper's (± over prompts)",
    "ess": "ESS",
    "rollout_k3": "k3 to the rollout policy, nats",
    "spent": "called spent at step",
}
PAPER = "paper"
RESAMPLES = 10000


def finding(folder: Path) -> Finding | None:
    """What a finished check in `folder` says, for the report; None where there is none."""
    file = folder / RESULT
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    students = {SFT: found["sft"], **{arm["name"]: arm["figures"] for arm in found["arms"]}}
    rows = [_row(name, figures, students[PAPER]) for name, figures in students.items()]
    return Finding(
        key="midsize",
        title="A language model on real text",
        question=(
            "Does the ranking of the objectives carry over to a language model? SmolLM2-135M-Instruct teaches its own "
            "copy of 24 layers, after SFT, on HumanEval's tasks, with completions of at most "
            f"{found['sizes']['rollout_tokens']} tokens. What is measured is the very KL that `topk` reverse descends."
        ),
        columns=COLUMNS,
        rows=rows,
        verdict="measured",
        answer=_answer(found, rows),
        seeds=(found["seed"],),
    )


def _row(name: str, figures: dict[str, Any], paper: dict[str, Any]) -> Row:
    kl = figures["reverse_kl"]
    measured: dict[str, Mean | float | str] = {
        "reverse_kl": Mean(kl["mean"], (kl["high"] - kl["low"]) / 2, (kl["mean"],))
    }
    if name != PAPER:
        measured["to_paper"] = difference(figures["by_prompt"], paper["by_prompt"])
    told = {key: figures[key] for key in ("ess", "rollout_k3") if key in figures}
    spent = {"spent": figures["spent"] or "never"} if "spent" in figures else {}
    return Row(name, {**measured, **told, **spent})


def about(folder: Path) -> Mapping[str, object]:
    """Sizes, data, machine and versions of a finished check; {} where there is none."""
    file = folder / RESULT
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    return {"midsize": {key: found[key] for key in ("sizes", "lr", "data", "machine", "versions")}}


def difference(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> Mean:
    """one - other, means per token in nats, with the longer side of its 95% bootstrap interval over prompts.

    Both answer the same prompts, of which each draw takes the same: how hard a prompt is cancels.

    Args:
        one: summed KL and tokens of each prompt.
    """
    shape = (RESAMPLES, len(one))
    draws = np.random.default_rng(0).integers(len(one), size=shape)
    ours, theirs = (np.array([side[prompt] for prompt in sorted(one)], float) for side in (one, other))
    resampled = _ratio(ours[draws]) - _ratio(theirs[draws])
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean = float(_ratio(ours) - _ratio(theirs))
    return Mean(mean, float(max(high - mean, mean - low)), (mean,))


def _ratio(sums: np.ndarray) -> np.ndarray:
    """KL per token, (...,) of (..., prompts, 2)."""
    return sums[..., 0].sum(-1) / sums[..., 1].sum(-1)


def _answer(found: dict[str, Any], rows: list[Row]) -> str:
    """The ranking, and which of it is beyond the choice of the prompts."""
    kls = {row.name: kl.mean for row in rows if isinstance(kl := row.figures["reverse_kl"], Mean)}
    base = kls.pop(SFT)
    ranked = sorted(kls, key=kls.__getitem__)
    by_prompt = {arm["name"]: arm["figures"]["by_prompt"] for arm in found["arms"]}
    behind = {name: difference(by_prompt[name], by_prompt[ranked[0]]).sign > 0 for name in ranked[1:]}
    apart, alike = ([name for name in behind if behind[name] is told] for told in (True, False))
    gained = {name: difference(found["sft"]["by_prompt"], by_prompt[name]).sign > 0 for name in ranked}
    steps = " or ".join(map(str, sorted({arm["figures"]["steps"] for arm in found["arms"]})))
    return (
        f"From nearest to farthest: {'; '.join(f'{name}: {kls[name]:.3f}' for name in ranked)}. That is after {steps} "
        f"steps of {found['sizes']['rows_per_step']} rollouts at a learning rate of {found['lr']:g}, from {base:.3f} "
        f"nats after SFT. Beyond what the choice of the {found['sft']['prompts']} held-out prompts explains, farther "
        f"than the nearest: {'; '.join(apart) or 'none'}; not told apart from it: {'; '.join(alike) or 'none'}; not "
        f"told apart from SFT: {'; '.join(name for name in ranked if not gained[name]) or 'none'}. Intervals are over "
        "these prompts, ESS and k3 those of the last step. It is one seed: other rollouts or another order of the rows "
        "may change what lies close."
    )
