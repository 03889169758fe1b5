"""Students that train by adapters: what trains, what is saved, and that the merged export is the trained model."""

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from common.errors import UsageError
from tests.trainer import build
from tests.trainer.parallel_ranks import PLAIN, gradients, merged_and_scored, wake
from tests.trainer.test_cli import refused
from tests.trainer.test_parallel import agree, on_ranks
from trainer.batch import pack
from trainer.config import Lora, SftConfig
from trainer.loop import optimizer_of, train
from trainer.model import load_sharded
from trainer.step import score

SMALL = Lora(rank=3, alpha=6)


def quiet(line: str) -> None:
    pass


def scores(model: Any, example) -> torch.Tensor:
    return score(model, pack(example.rows[:8]), temperature=1.0, chunk=64).chosen


def scored_by(weights: dict[str, torch.Tensor], folder: Path, example) -> torch.Tensor:
    """Log-probs of the same rows under a plain model of transformers with these weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {*(getattr(model, "all_tied_weights_keys", None) or {})} and not unexpected
    return torch.cat(
        [
            build.logprob_table(model, row).gather(-1, torch.from_numpy(row.completion_ids).long()[:, None])[:, 0]
            for row in example.rows[:8]
        ]
    )


def test_adapters_begin_as_no_change_at_all(example, alone):
    adapted = load_sharded(example.student, alone, **PLAIN, lora=SMALL)
    assert torch.equal(scores(adapted, example), scores(load_sharded(example.student, alone, **PLAIN), example))


def test_only_float32_adapters_train_and_the_rest_is_held_as_it_computes(example, alone):
    model = load_sharded(example.student, alone, **{**PLAIN, "compute": "bfloat16"}, lora=SMALL)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    assert len(trained) == 2 * 7 * 2  # two matrices at seven linear layers of two blocks
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    config = SftConfig(model="", data="", output="", lora=SMALL)
    held = [weight for group in optimizer_of(model, config).param_groups for weight in group["params"]]
    assert {id(weight) for weight in held} == {id(weight) for weight in trained.values()}


def test_targets_choose_the_layers_by_name(example, alone):
    model = load_sharded(example.student, alone, **PLAIN, lora=Lora(rank=2, targets=("q_proj", "down_proj")))
    owners = {name.partition(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert owners == {"q_proj", "down_proj"}


@pytest.mark.parametrize("target", ["w_proj", "lm_head", "embed_tokens", "mlp"])
def test_a_target_that_is_no_linear_layer_of_the_blocks_is_refused(example, alone, target):
    with pytest.raises(UsageError, match=f"names '{target}', which is no linear layer .*Choose among down_proj, "):
        load_sharded(example.student, alone, **PLAIN, lora=Lora(targets=("q_proj", target)))


def test_no_targets_are_refused(example, alone):
    with pytest.raises(UsageError, match="lora.targets is empty"):
        load_sharded(example.student, alone, **PLAIN, lora=Lora(targets=()))


def test_an_absent_peft_is_one_line(example, alone, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="lora needs the package peft.*pip install peft"):
        load_sharded(example.student, alone, **PLAIN, lora=SMALL)


def test_recomputed_activations_change_no_gradient_of_an_adapter(example, alone):
    ways = {"lora": {"rank": 3, "alpha": 6}}
    plain = gradients(alone, str(example.student), example.scored, ways)
    again = gradients(alone, str(example.student), example.scored, {**ways, "checkpoint_activations": True})
    assert plain and all(torch.equal(again[name], expected) for name, expected in plain.items())


def test_adapters_have_the_gradient_of_the_weights_they_stand_for(example, alone, tmp_path):
    """With W + s * B @ A in the place of W: dB = s * dW @ A.T and dA = s * B.T @ dW."""
    folder = build.make_kind(tmp_path / "model", "qwen3")
    model = load_sharded(folder, alone, **PLAIN, lora=SMALL)
    wake(model)
    adapters = {name: cast(Any, each).full_tensor() for name, each in model.named_parameters() if ".lora_" in name}
    merged, _ = merged_and_scored(alone, str(folder), example.scored, {"lora": {"rank": 3, "alpha": 6}})
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.load_state_dict(merged, strict=False)
    whole.save_pretrained(tmp_path / "merged")
    dense = gradients(alone, str(tmp_path / "merged"), example.scored, {})
    for name, gradient in gradients(alone, str(folder), example.scored, {"lora": {"rank": 3, "alpha": 6}}).items():
        owner, _, side = name.partition(".lora_")
        down, up = (adapters[f"{owner}.lora_{each}.default.weight"] for each in "AB")
        dense_gradient = dense[f"{owner}.weight"]
        expected = 2 * (up.T @ dense_gradient if side.startswith("A") else dense_gradient @ down.T)
        torch.testing.assert_close(gradient, expected, atol=5e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3-moe"])
def test_the_merged_weights_score_as_the_adapted_model(example, alone, tmp_path, kind):
    folder = build.make_kind(tmp_path / "model", kind)
    merged, chosen = merged_and_scored(alone, str(folder), example.scored, {"lora": {"rank": 3, "alpha": 6}})
    torch.testing.assert_close(chosen, scored_by(merged, folder, example), atol=2e-5, rtol=1e-5)
    plain, _ = merged_and_scored(alone, str(folder), example.scored, {})
    assert merged.keys() == plain.keys()
    assert (chosen - scored_by(plain, folder, example)).abs().max() > 0.05, "the adapters must say something"


@pytest.mark.slow
def test_two_ranks_merge_to_the_same_weights(example, alone, tmp_path):
    folders = {kind: build.make_kind(tmp_path / kind, kind) for kind in ("qwen3", "qwen3-moe")}
    ways: dict[str, Any] = {"lora": {"rank": 3, "alpha": 6}, "merge": True}
    found = on_ranks(
        tmp_path,
        2,
        [(f"{kind} {n}", folder, example.scored, ways, n) for kind, folder in folders.items() for n in (1, 2)],
    )
    for kind, folder in folders.items():
        merged, chosen = merged_and_scored(alone, str(folder), example.scored, {"lora": ways["lora"]})
        for replicas in (1, 2):
            theirs, their_scores = found[f"{kind} {replicas}"]
            agree(theirs, merged)
            torch.testing.assert_close(their_scores, chosen, atol=2e-5, rtol=1e-5)


def run(example, output: Path, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {
        "token_budget": 90,
        "rows_per_step": 8,
        "schedule": "constant",
        "warmup": 0.0,
        "lr": 1e-2,
    }
    return SftConfig(
        model=str(example.student), data=example.sft, output=str(output), compute="float32", lora=SMALL,
        export_dtype="float32", save_every=2, **settings, **changes,
    )  # fmt: skip


def test_a_resumed_run_is_the_unbroken_one_and_saves_adapters_only(example, alone, tmp_path):
    train(run(example, tmp_path / "whole", max_steps=4), alone, quiet)
    train(run(example, tmp_path / "broken", max_steps=2), alone, quiet)
    train(run(example, tmp_path / "broken", max_steps=4), alone, quiet)
    losses = [[line["loss"] for line in build.read_metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    whole, broken = (build.open_model(tmp_path / name / "export").state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(broken[name], weight) for name, weight in whole.items())
    saved = FileSystemReader(tmp_path / "whole" / "checkpoints" / "step-000004").read_metadata().state_dict_metadata
    weights = [name for name in saved if name.startswith("model.")]
    assert len(weights) == 2 * 7 * 2 and all(".lora_" in name for name in weights)


def test_the_export_has_what_was_trained_and_nothing_else_changed(example, alone, tmp_path):
    config = run(example, tmp_path, max_steps=2)
    train(config.model_copy(update={"lora": Lora(rank=2, targets=("v_proj",))}), alone, quiet)
    before, after = (build.open_model(folder).state_dict() for folder in (example.student, tmp_path / "export"))
    assert before.keys() == after.keys()
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert changed == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(2)}


def test_other_adapters_are_another_run(example, alone, tmp_path):
    train(run(example, tmp_path, max_steps=2), alone, quiet)
    other = run(example, tmp_path, max_steps=4).model_copy(update={"lora": Lora(rank=4, alpha=6)})
    with pytest.raises(UsageError, match="made with other settings: lora"):
        train(other, alone, quiet)


def test_settings_of_adapters_come_by_their_names(example, tmp_path):
    words = [f"model={example.student}", f"data={example.sft}", f"output={tmp_path}", "device=cpu", "token_budget=90"]
    refused(
        build.run_trainer("sft", *words, 'lora.targets=["nothing"]'), 64, "names 'nothing', which is no linear layer"
    )
