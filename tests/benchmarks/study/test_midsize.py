"""The mid-size check: its arms are settings the trainer takes, and its finding says what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.midsize import ARMS, ON_CPU, ON_GPU, Check
from benchmarks.study.midsize_finding import RESULT, difference, finding
from benchmarks.study.results.files import write
from benchmarks.study.results.findings import Finding, Study
from benchmarks.study.results.statistics import Mean
from recipes.demo.paths import Paths


def figures(kl: float, **more: float) -> dict[str, Any]:
    """Of 44 prompts that differ from each other by far more than arms do."""
    by_prompt = {f"p{number}": [10 * (kl + number % 4 - 1.5), 10] for number in range(44)}
    kls = {"mean": kl, "low": kl - 0.05, "high": kl + 0.03}
    return {"reverse_kl": kls, "prompts": 44, "rows": 44, "by_prompt": by_prompt, **more}


def found_in(folder: Path, kls: dict[str, float]) -> Finding:
    """The finding of a check that measured these."""
    arms = [
        {"name": name, "figures": figures(kl, ess=0.8, rollout_k3=0.1, steps=11, spent=7)} for name, kl in kls.items()
    ]
    result = {
        "seed": 0,
        "lr": 1e-4,
        "sizes": {"rows_per_step": 16, "rollout_tokens": 64},
        "sft": figures(0.69),
        "arms": arms,
    }
    (folder / RESULT).write_text(json.dumps(result))
    found = finding(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("sizes", [ON_CPU, ON_GPU])
def test_the_trainer_takes_every_arm_and_they_differ_in_the_objective_alone(sizes: Any, tmp_path: Path) -> None:
    check = Check(tmp_path, Paths(tmp_path), sizes, steps=3)
    configs = [check.config(arm).model_dump() for arm in ARMS]
    varied = {key for config in configs for key in config if config[key] != configs[0][key]}
    assert varied == {"objective", "loss_mean", "clip_advantage", "topk", "kl"}
    assert len({json.dumps(config) for config in configs}) == len(ARMS)
    assert {config["max_steps"] for config in configs} == {3}


def test_nothing_is_found_where_nothing_was_measured(tmp_path: Path) -> None:
    assert finding(tmp_path) is None


def test_the_answer_ranks_the_arms_and_names_those_apart_from_the_nearest(tmp_path: Path) -> None:
    found = found_in(tmp_path, {"paper": 0.60, "importance": 0.61, "topk reverse, k = 16": 0.50})
    assert "topk reverse, k = 16: 0.500; paper: 0.600; importance: 0.610." in found.answer
    assert "farther than the nearest: paper; importance; not told apart from it: none;" in found.answer
    assert "not told apart from SFT: none." in found.answer
    assert found.verdict == "measured"


def test_a_difference_is_taken_prompt_by_prompt() -> None:
    """How hard the prompts are cancels; what the arms do to each of them does not."""
    hard = {f"p{number}": (number * 10.0, 10) for number in range(40)}
    better = {prompt: (kl - 1, tokens) for prompt, (kl, tokens) in hard.items()}
    shuffled = {prompt: better[prompt] for prompt in sorted(better, reverse=True)}
    assert difference(shuffled, hard).mean == pytest.approx(-0.1)
    assert difference(shuffled, hard).half == pytest.approx(0, abs=1e-9)
    uneven = {prompt: (kl + (8 if index % 2 else -10), 10) for index, (prompt, (kl, _)) in enumerate(hard.items())}
    assert difference(uneven, hard).mean == pytest.approx(-0.1)
    assert difference(uneven, hard).sign == 0


def test_a_difference_is_of_means_per_token() -> None:
    assert difference({"a": (1.0, 10), "b": (9.0, 10)}, {"a": (1.0, 10), "b": (6.0, 30)}).mean == pytest.approx(0.325)


def test_the_report_takes_it(tmp_path: Path) -> None:
    found = found_in(tmp_path, {"paper": 0.60, "importance": 0.58})
    kl = found.rows[0].figures["reverse_kl"]
    assert isinstance(kl, Mean)
    assert (kl.mean, kl.half, *kl.values) == pytest.approx((0.69, 0.04, 0.69))
    write(Study({}, (found,)), tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "0.690 ± 0.040" in text and "One seed: 0." in text
