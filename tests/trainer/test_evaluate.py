import json

import pytest
import torch

from common.errors import DataError, UsageError
from tests.trainer import build
from trainer.config import EvalConfig
from trainer.evaluate import evaluate, interval


@pytest.fixture(scope="module")
def held_out(example, tmp_path_factory):
    rows = build.sample(build.open_model(example.student), prompts=8, seed=21)
    folder = tmp_path_factory.mktemp("held-out")
    return rows, build.make_dataset(folder, rows, kind="rollouts", policy=example.student)


def config(example, data: str, output, **settings) -> EvalConfig:
    common = {"model": str(example.student), "teacher": str(example.teacher), "token_budget": 90}
    return EvalConfig(**{**common, "data": data, "output": str(output), **settings})


def test_it_is_the_full_vocabulary_kl_at_the_rollouts_states(example, held_out, tmp_path):
    rows, data = held_out
    seen = []
    result = evaluate(config(example, data, tmp_path / "kl.json"), torch.device("cpu"), lambda *done: seen.append(done))
    student, teacher = build.open_model(example.student), build.open_model(example.teacher)
    total = 0.0
    for row in rows:
        p, q = (build.logprob_table(model, row) for model in (student, teacher))
        total += (p.exp() * (p - q)).sum().item()
    tokens = sum(len(row.completion_ids) for row in rows)
    assert result["reverse_kl"]["mean"] == pytest.approx(total / tokens, rel=1e-4)
    assert result["reverse_kl"]["low"] < result["reverse_kl"]["mean"] < result["reverse_kl"]["high"]
    assert (result["tokens"], result["prompts"], result["rows"]) == (tokens, 8, 16)
    by_prompt = list(result["by_prompt"].values())
    assert (len(by_prompt), sum(count for _, count in by_prompt)) == (8, tokens)
    assert sum(kl for kl, _ in by_prompt) == pytest.approx(total, rel=1e-4)
    assert json.loads((tmp_path / "kl.json").read_text()) == result
    assert [sum(column) for column in zip(*seen, strict=True)] == [16, tokens]


def test_a_model_is_no_distance_from_itself(example, held_out, tmp_path):
    result = evaluate(
        config(example, held_out[1], tmp_path / "kl.json", teacher=str(example.student)), torch.device("cpu")
    )
    assert result["reverse_kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_states_of_another_model_are_refused(example, held_out, tmp_path):
    with pytest.raises(DataError, match="sampled by another model"):
        evaluate(config(example, held_out[1], tmp_path / "kl.json", model=str(example.teacher)), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"temperature": 0}, "greedy"), ({"temperature": 0.7}, "temperature=0.7"), ({"top_k": 5}, "cut")],
)
def test_states_that_the_model_did_not_freely_choose_are_refused(example, held_out, tmp_path, changed, word):
    rows, _ = held_out
    sampling = {**build.plan_of("rollouts", example.student, None, 3, 0)["sampling"], **changed}
    data = build.make_dataset(tmp_path / "data", rows, kind="rollouts", policy=example.student, sampling=sampling)
    with pytest.raises(DataError, match=f"not states of the model's own: .*{word}"):
        evaluate(config(example, data, tmp_path / "kl.json"), torch.device("cpu"))


def test_the_result_says_how_was_sampled_and_what_was_overridden(example, held_out, tmp_path):
    rows, _ = held_out
    data = build.make_dataset(
        tmp_path / "data", rows, kind="rollouts", policy=example.student, overrides=["teacher-mismatch"]
    )
    result = evaluate(config(example, data, tmp_path / "kl.json"), torch.device("cpu"))
    assert result["overrides"] == ["teacher-mismatch"]
    assert result["sampling"]["temperature"] == 1.0 and result["sampling"]["max_tokens"] == 24


def test_scored_data_is_not_held_out_data(example, tmp_path):
    with pytest.raises(UsageError, match="'rollouts' is needed"):
        evaluate(config(example, example.scored, tmp_path / "kl.json"), torch.device("cpu"))


@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2"])
def test_attention_that_cannot_run_here_is_refused_before_anything_is_fetched(example, tmp_path, attention):
    settings = config(example, "nowhere", tmp_path / "kl.json", attention=attention, compute="bfloat16")
    with pytest.raises(UsageError, match=f"attention={attention} needs .* Set attention=sdpa"):
        evaluate(settings, torch.device("cpu"))


def test_the_interval_is_over_prompts_not_tokens():
    alike = interval([(1.0, 10)] * 50, 500, 0)
    assert alike == {"mean": 0.1, "low": pytest.approx(0.1), "high": pytest.approx(0.1)}
    apart = interval([(0.0, 10), (2.0, 10)] * 25, 500, 0)
    assert apart["mean"] == pytest.approx(0.1)
    assert 0.06 < apart["low"] < 0.09 < 0.11 < apart["high"] < 0.14
    assert interval([(0.0, 10), (2.0, 10)] * 25, 500, 0) == apart
