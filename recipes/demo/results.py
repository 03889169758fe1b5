"""What the demo measured: report.json, the tables and the page."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from common import report
from common.dataset import open_dataset
from common.errors import DataError
from common.progress import duration
from common.schema import to_rows
from recipes.demo.paths import STUDENTS, Paths


def measured(paths: Paths, seconds: dict[str, float]) -> dict[str, Any]:
    """The contents of report.json."""
    kl = {student: json.loads(paths.kl(student).read_text()) for student in STUDENTS}
    tokens = {
        "sft-data": open_dataset(str(paths.dataset("sft"))).num_tokens,
        "sft": _processed_tokens(paths.root / "sft"),
        "precompute": open_dataset(str(paths.dataset("scored"))).num_tokens,
        "opd": _processed_tokens(paths.root / "opd"),
        **{f"rollouts of {student}": kl[student]["tokens"] for student in STUDENTS},
        **{f"kl of {student}": kl[student]["tokens"] for student in STUDENTS},
    }
    return {
        **{f"reverse_kl_{student}": kl[student]["reverse_kl"] for student in STUDENTS},
        "unit": "nats per token, 95% bootstrap interval over held-out prompts",
        "held_out_prompts": kl["opd"]["prompts"],
        "held_out_tokens": {student: kl[student]["tokens"] for student in STUDENTS},
        "seconds": seconds,
        "tokens_per_second": {name: round(count / seconds[name], 1) for name, count in tokens.items()},
        "dataset": {
            "url": str(paths.dataset("scored")),
            "manifest_sha256": open_dataset(str(paths.dataset("scored"))).manifest_sha256,
        },
        "checkpoint": {"url": str(paths.model("opd")), "weights_sha256": kl["opd"]["model"]["weights_sha256"]},
    }


def _metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _processed_tokens(output: Path) -> int:
    return int(sum(step["data/processed_tokens"] for step in _metrics(output)))


def require_progress(result: dict[str, Any]) -> None:
    """The demo's claim: distillation brings the student nearer to the teacher than SFT did, beyond the intervals."""
    sft, opd = result["reverse_kl_sft"], result["reverse_kl_opd"]
    if opd["high"] >= sft["low"]:
        raise DataError(
            f"the claim does not hold here: after OPD up to {opd['high']:.3f}, after SFT from {sft['low']:.3f} nats",
            where="reverse_kl_opd against reverse_kl_sft",
            fix="Look at the training curve in report.html",
        )


def kl_table(result: dict[str, Any]) -> report.Table:
    """The demo's one table."""
    rows = []
    for student, meaning in STUDENTS.items():
        kl = result[f"reverse_kl_{student}"]
        rows.append((f"student {meaning}", f"{kl['mean']:.3f}", f"{kl['low']:.3f} to {kl['high']:.3f}"))
    return report.Table(("reverse KL to the teacher", "nats/token", "95% interval"), rows)


def time_table(result: dict[str, Any]) -> report.Table:
    """Seconds and speed by stage, start-up of each command included."""
    rows = [
        (
            name,
            duration(seconds),
            f"{result['tokens_per_second'].get(name, 0):,.0f}" if name in result["tokens_per_second"] else "",
        )
        for name, seconds in result["seconds"].items()
    ]
    return report.Table(("stage", "time", "tokens/s"), [*rows, ("all", duration(sum(result["seconds"].values())), "")])


def write_page(paths: Paths, result: dict[str, Any]) -> Path:
    """Write report.html; returns its path."""
    scored = open_dataset(str(paths.dataset("scored")))
    rows = [row for shard in range(scored.num_shards) for row in to_rows(scored.read_shard(shard))]
    steps = _metrics(paths.root / "opd")
    kls = [result[f"reverse_kl_{student}"] for student in STUDENTS]
    parts = [
        kl_table(result),
        report.bars(
            "Distance to the teacher by stage",
            list(STUDENTS.values()),
            [kl["mean"] for kl in kls],
            [(kl["low"], kl["high"]) for kl in kls],
            "reverse KL, nats per token",
            "Exact, over the whole vocabulary, at the student's own states on "
            f"{result['held_out_prompts']} held-out prompts.",
        ),
        report.density(
            "The dataset: every sampled token, graded",
            np.concatenate([row.rollout_logprobs for row in rows]),
            np.concatenate([row.teacher_logprobs for row in rows if row.teacher_logprobs is not None]),
            ("student's log-prob (nats)", "teacher's log-prob (nats)"),
            "Below the line the teacher finds a token less likely than the student did: that is what OPD unlearns.",
        ),
        report.curve(
            "Training",
            [step["step"] for step in steps],
            [step["loss"] for step in steps],
            ("optimizer step", "OPD loss"),
            "Reverse KL over the teacher's stored top-k and the tail, on the training rollouts.",
        ),
        time_table(result),
    ]
    facts = {
        "dataset": result["dataset"]["url"],
        "manifest sha256": result["dataset"]["manifest_sha256"],
        "checkpoint": result["checkpoint"]["url"],
        "weights sha256": result["checkpoint"]["weights_sha256"],
        "recipe": "recipes/demo.toml",
        "overridden checks": ", ".join(scored.plan["overrides"]) or "none",
    }
    lead = (
        "SmolLM2-135M-Instruct distils itself into a copy of itself that lacks six of its thirty layers: first by "
        "fine-tuning on its answers, then by grading the student's own rollouts, once, before training."
    )
    file = paths.root / "report.html"
    file.write_text(report.page("Lightning OPD: the demo", lead, parts, facts))
    return file
