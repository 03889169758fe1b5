import math
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch

from common.dataset import open_dataset
from common.errors import DataError
from tests.trainer import build
from tests.trainer.ranks import one_step
from trainer import metrics, objectives
from trainer.batch import pack
from trainer.config import OpdConfig
from trainer.epoch import steps_per_epoch, turns
from trainer.model import load_sharded
from trainer.reader import Reader, step_plan
from trainer.step import Rules, train_step


def by_hand(example, loss_mean: str) -> dict[str, torch.Tensor]:
    """Gradient of the first step from separate forward passes of an unsharded model."""
    config = OpdConfig(model="", data="", output="", token_budget=90, rows_per_step=20)
    lengths = open_dataset(example.scored).row_lengths()
    rows = [example.rows[index] for bin in next(step_plan(lengths, config, 1)) for index in bin]
    model = build.open_model(example.student)
    total = sum(len(row.completion_ids) for row in rows)
    for row in rows:
        ids = torch.from_numpy(row.completion_ids).long()
        prompt = torch.from_numpy(row.prompt_ids).long()
        logits = model(torch.cat([prompt, ids])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        ratio = (logps.detach() - torch.from_numpy(row.rollout_logprobs)).exp().clamp(max=2.0)
        losses = -ratio * (torch.from_numpy(row.teacher_logprobs) - logps.detach()) * logps
        (losses.sum() / total if loss_mean == "token" else losses.mean() / len(rows)).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("loss_mean", ["token", "rollout"])
def test_one_process_has_the_gradient_of_separate_rows(example, alone, loss_mean):
    gradient, _ = one_step(alone, str(example.student), example.scored, loss_mean)
    for name, expected in by_hand(example, loss_mean).items():
        torch.testing.assert_close(gradient[name], expected, atol=2e-6, rtol=1e-4, msg=name)


def test_recomputed_activations_change_nothing(example, alone):
    ours, _ = one_step(alone, str(example.student), example.scored, "token", checkpointed=True)
    theirs, _ = one_step(alone, str(example.student), example.scored, "token")
    assert all(torch.equal(ours[name], expected) for name, expected in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("rows", [19, 1])  # with one row a rank has none
def test_two_ranks_with_uneven_work_have_the_gradient_of_one(example, alone, tmp_path, rows):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(build.ROOT / "tests/trainer/ranks.py"), str(example.student), example.scored, "token", str(rows)]
    subprocess.run([*command, *words, str(tmp_path / "gradient")], env=build.environment(), check=True)
    theirs, tokens = torch.load(tmp_path / "gradient")
    assert tokens[0] != tokens[1], "the ranks must have unequal work for this test to mean anything"
    ours, _ = one_step(alone, str(example.student), example.scored, "token", rows)
    for name, expected in ours.items():
        torch.testing.assert_close(theirs[name], expected, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("loss_mean", ["token", "rollout"])
def test_the_logged_loss_is_the_trained_one(example, alone, loss_mean):
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    rows = example.rows[:5]
    rules = Rules(objectives.imitation, loss_mean, 2.0, 1.0, 64)
    sums, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), [pack(rows)], rules, alone)
    means = [-torch.from_numpy(row.rollout_logprobs).mean().item() for row in rows]
    counts = [len(row.completion_ids) for row in rows] if loss_mean == "token" else [1] * len(rows)
    expected = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    assert metrics.imitation(sums)["loss"] == pytest.approx(expected, rel=1e-3)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.full_tensor().clone() for name, weight in model.named_parameters()}


def test_a_nan_loss_stops_before_the_update_and_names_the_row(example, alone):
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    before = weights(model)
    batch = pack(example.rows[:3])
    teacher = batch.teacher.clone()
    teacher[batch.row == 1] = math.nan
    rules = Rules(objectives.paper, "token", 2.0, 1.0, 64)
    with pytest.raises(DataError, match=f"loss of 1 rows is not finite.*{example.rows[1].uid}"):
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [replace(batch, teacher=teacher)], rules, alone)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_an_infinite_gradient_stops_before_the_update(example, alone):
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    before = weights(model)
    steep = Rules(
        lambda tokens: tokens.student.detach() + 1e38 * (tokens.student - tokens.student.detach()), "token", 2, 1, 64
    )
    with pytest.raises(DataError, match="gradient is not finite"):
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [pack(example.rows[:3])], steep, alone)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_ranks_read_each_row_once(example):
    dataset = open_dataset(example.scored)
    reader = Reader(dataset, dataset.row_lengths())
    config = OpdConfig(model="", data="", output="", token_budget=90, rows_per_step=7)
    seen = [
        row.uid
        for step in islice(step_plan(reader.lengths, config, 2), steps_per_epoch(len(reader.lengths), 7))
        for rank in range(2)
        for bin in turns(step, rank, 2)
        for row in reader.rows(bin)
    ]
    assert sorted(seen) == sorted(row.uid for row in example.rows)
