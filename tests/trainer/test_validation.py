"""Held-out rows: whole prompts, the same in every run, never trained on, and their loss to the digit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.dataset import open_dataset
from common.errors import UsageError
from common.lengths import RowLengths
from common.schema import to_rows
from tests.trainer import build
from trainer import epoch
from trainer.config import OpdConfig, SftConfig
from trainer.inputs import open_inputs
from trainer.loop import train
from trainer.read_ahead import epoch_order
from trainer.validation import held_out


def lengths_of(prompts: np.ndarray) -> RowLengths:
    """Rows of these prompts; nothing else of them counts here."""
    ones = np.ones(len(prompts), np.int32)
    return RowLengths(ones, ones, ones, ones, prompts.astype(np.uint64))


def sft(example, output: Path, **settings) -> SftConfig:
    defaults = {
        "model": str(example.student),
        "data": example.sft,
        "output": str(output),
        "compute": "float32",
        "rows_per_step": 7,
        "token_budget": 90,
        "max_steps": 5,
        "validation_share": 0.25,
        "validate_every": 2,
        "save_every": 3,
        "export_dtype": "float32",
    }
    return SftConfig(**{**defaults, **settings})


def words(settings: SftConfig) -> list[str]:
    values = settings.model_dump(exclude_unset=True).items()
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values]


def quiet(line: str) -> None:
    pass


def validated(output: Path) -> dict[int, tuple[float, float]]:
    records = build.read_metrics(output)
    return {r["step"]: (r["validation/loss"], r["validation/tokens"]) for r in records if "validation/loss" in r}


def test_whole_prompts_are_held_out_up_to_the_share_and_the_rows():
    lengths = lengths_of(np.random.default_rng(0).integers(0, 2**63, 500).repeat(4))
    for share, most, expected in ((0.1, 10_000, 200), (0.1, 50, 48), (0.0, 50, 0), (0.001, 50, 0), (0.5, 1999, 1000)):
        held = held_out(lengths, share, most)
        assert held.sum() == expected
        assert all(len(set(samples)) == 1 for samples in held.reshape(-1, 4))


def test_who_is_held_out_depends_on_the_prompt_alone_and_a_larger_share_adds_to_it():
    prompts = np.random.default_rng(1).integers(0, 2**63, 1000)
    some, more = (held_out(lengths_of(prompts), share, 1000) for share in (0.1, 0.3))
    assert (more | some).tolist() == more.tolist()
    backwards = held_out(lengths_of(prompts[::-1]), 0.1, 1000)
    assert backwards[::-1].tolist() == some.tolist()


def test_samples_of_a_prompt_have_one_key_and_prompts_have_different_ones(example):
    dataset = open_dataset(example.sft)
    lengths = dataset.row_lengths()
    names = [row for shard in range(dataset.num_shards) for row in dataset.read_shard(shard)["prompt_id"].to_pylist()]
    assert len(set(zip(names, lengths.prompt_key.tolist(), strict=True))) == len(set(names)) == 12


def test_held_out_rows_are_in_no_step(example, alone, tmp_path):
    settings = sft(example, tmp_path)
    inputs = open_inputs(settings, alone)
    places = [
        {(int(lengths.shard[row]), int(lengths.row[row])) for row in order}
        for lengths, order in (
            (inputs.lengths, np.concatenate(epoch.step_rows(epoch_order(inputs.lengths, settings, 0), 7))),
            (inputs.held_out, np.arange(len(inputs.held_out))),
        )
    ]
    assert len(places[0]) == 18 and len(places[1]) == 6 and not places[0] & places[1]


def test_the_loss_is_that_of_the_exported_model_on_the_held_out_rows(example, alone, tmp_path):
    said: list[str] = []
    settings = sft(example, tmp_path, max_steps=2)
    train(settings, alone, said.append)
    held = open_inputs(settings, alone).held_out
    dataset, model = open_dataset(example.sft), build.open_model(tmp_path / "export")
    losses = []
    for shard, row in zip(held.shard, held.row, strict=True):
        rollout = to_rows(dataset.read_shard(int(shard)))[int(row)]
        ids = torch.tensor(rollout.completion_ids.tolist())
        losses.append(-build.logprob_table(model, rollout).gather(-1, ids[:, None])[:, 0])
    loss, tokens = validated(tmp_path)[2]
    assert tokens == sum(map(len, losses))
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert any(f"val {loss:.4f}" in line for line in said)


def test_it_is_told_every_so_often_and_after_the_last_step(example, alone, tmp_path):
    train(sft(example, tmp_path), alone, quiet)
    assert [*validated(tmp_path)] == [2, 4, 5]
    assert len({loss for loss, _ in validated(tmp_path).values()}) == 3


def test_a_resumed_run_has_the_same_validation_losses(example, alone, tmp_path):
    # Under a constant rate the first steps do not depend on how many follow.
    constant = {"schedule": "constant", "warmup": 0.0}
    train(sft(example, tmp_path / "straight", **constant), alone, quiet)
    train(sft(example, tmp_path / "resumed", **constant, max_steps=3), alone, quiet)
    train(sft(example, tmp_path / "resumed", **constant), alone, quiet)
    straight, resumed = validated(tmp_path / "straight"), validated(tmp_path / "resumed")
    assert straight == {step: resumed[step] for step in straight}  # which has that of its third step too


@pytest.mark.slow
def test_two_ranks_tell_what_one_does(example, alone, tmp_path):
    train(sft(example, tmp_path / "one"), alone, quiet)
    result = build.run_trainer("sft", *words(sft(example, tmp_path / "two")), ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = validated(tmp_path / "one"), validated(tmp_path / "two")
    assert [*one] == [*two]
    for step, (loss, tokens) in one.items():
        assert two[step] == (pytest.approx(loss, rel=1e-4), tokens)


@pytest.mark.slow
def test_more_ranks_than_held_out_rows_end_together(example, tmp_path):
    settings = sft(example, tmp_path, validation_rows=2, max_steps=2)
    result = build.run_trainer("sft", *words(settings), ranks=3)
    assert result.returncode == 0, result.stderr
    assert [*validated(tmp_path)] == [2]


def test_another_split_is_not_resumed_but_another_rhythm_is(example, alone, tmp_path):
    train(sft(example, tmp_path), alone, quiet)
    for change in ({"validation_share": 0.1}, {"validation_rows": 4}):
        with pytest.raises(UsageError, match=r"other settings: validation_"):
            train(sft(example, tmp_path, **change), alone, quiet)
    train(sft(example, tmp_path, validate_every=1), alone, quiet)


def test_without_held_out_rows_all_are_trained_on_and_nothing_is_told(example, alone, tmp_path):
    settings = sft(example, tmp_path, validation_share=0.0, max_steps=2)
    train(settings, alone, quiet)
    assert validated(tmp_path) == {}
    assert len(open_inputs(settings, alone).lengths) == 24


def test_opd_tells_the_kl_to_the_teacher_on_held_out_rollouts(example, alone, tmp_path):
    same = {"compute": "float32", "rows_per_step": 8, "token_budget": 90, "max_steps": 1, "export_dtype": "float32"}
    config = OpdConfig(
        model=str(example.student), data=example.scored, output=str(tmp_path), lr=1e-2, validation_share=0.4, **same
    )
    train(config, alone, quiet)
    model = build.open_model(tmp_path / "export")
    held = open_inputs(config, alone).held_out
    uids = {
        to_rows(open_dataset(example.scored).read_shard(int(shard)))[int(row)].uid
        for shard, row in zip(held.shard, held.row, strict=True)
    }
    weights, values = [], []
    for row in example.rows:
        if row.uid in uids:
            ids = torch.from_numpy(row.completion_ids).long()
            student = build.logprob_table(model, row).gather(-1, ids[:, None])[:, 0]
            weights.append((student - torch.from_numpy(row.rollout_logprobs)).exp().clamp(max=2.0))
            values.append(student - torch.from_numpy(row.teacher_logprobs))
    weight = torch.cat(weights)
    (record,) = build.read_metrics(tmp_path)
    assert len(uids) == 8 and record["validation/tokens"] == len(weight)
    expected = (weight * torch.cat(values)).sum() / weight.sum()
    assert record["validation/teacher_k1"] == pytest.approx(expected.item(), rel=1e-3)
