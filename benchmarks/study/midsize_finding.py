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
    "rollout_k3": "drift (k3), nats",
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
            "Does the ranking of the objectives carry over to SmolLM2-135M-Instruct as teacher and its copy of 24 "
            "layers after SFT as student, on HumanEval's tasks?"
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
    return Row(name, {**measured, **{key: figures[key] for key in ("ess", "rollout_k3") if key in figures}})


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
    apart = {row.name: gap.sign for row in rows if isinstance(gap := row.figures.get("to_paper"), Mean)}
    nearer, farther = ([name for name in ranked if apart.get(name) == sign] for sign in (-1, 1))
    steps = " or ".join(map(str, sorted({arm["figures"]["steps"] for arm in found["arms"]})))
    return (
        f"From nearest to farthest: {'; '.join(f'{name}: {kls[name]:.3f}' for name in ranked)}. That is after {steps} "
        f"steps of {found['sizes']['rows_per_step']} rollouts at a learning rate of {found['lr']:g}, from {base:.3f} "
        f"nats after SFT. Nearer to the teacher than `paper`, beyond what the choice of the "
        f"{found['sft']['prompts']} held-out prompts explains: {'; '.join(nearer) or 'none'}; farther: "
        f"{'; '.join(farther) or 'none'}. Intervals are over these prompts, ESS and drift those of the last step. It "
        "is one seed: other rollouts or another order of the rows may change what lies close."
    )
