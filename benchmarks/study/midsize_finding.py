"""What the mid-size check found, as the report takes it."""

import json
from pathlib import Path
from typing import Any

from benchmarks.study.findings import Finding, Row
from benchmarks.study.statistics import Mean

RESULT = "midsize.json"
"""Written by `benchmarks.study.midsize`."""
SFT = "after SFT"
COLUMNS = {
    "reverse_kl": "reverse KL, nats (± 95% over prompts)",
    "ess": "ESS at the end",
    "rollout_k3": "drift k3 at the end, nats",
    "step_seconds": "seconds a step",
}


def finding(folder: Path) -> Finding | None:
    """What a finished check in `folder` says, for the report; None where there is none."""
    file = folder / RESULT
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    rows = [_row(SFT, found["sft"]), *(_row(arm["name"], arm["figures"]) for arm in found["arms"])]
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


def _row(name: str, figures: dict[str, Any]) -> Row:
    kl = figures["reverse_kl"]
    others = {key: figures[key] for key in COLUMNS if key in figures and key != "reverse_kl"}
    return Row(name, {"reverse_kl": Mean(kl["mean"], (kl["high"] - kl["low"]) / 2, (kl["mean"],)), **others})


def _answer(found: dict[str, Any], rows: list[Row]) -> str:
    """The ranking, and which of it is beyond the choice of the prompts."""
    kls = {row.name: kl for row in rows if isinstance(kl := row.figures["reverse_kl"], Mean)}
    base, paper = kls.pop(SFT), kls["paper"]
    ranked = sorted(kls, key=lambda name: kls[name].mean)
    steps = sorted({arm["figures"]["steps"] for arm in found["arms"]})
    apart = [name for name in ranked if name != "paper" and not kls[name].overlaps(paper)]
    return (
        f"From {base.mean:.3f} nats after SFT, {' or '.join(map(str, steps))} steps of "
        f"{found['sizes']['rows_per_step']} rollouts at a learning rate of {found['lr']:g} lead, from nearest to "
        f"farthest, to {'; '.join(f'{name}: {kls[name].mean:.3f}' for name in ranked)}. Intervals are over "
        f"{found['sft']['prompts']} held-out prompts; {', '.join(apart) or 'none'} did not meet that of paper. One "
        "seed: other rollouts or another order of the rows may change what lies close."
    )
