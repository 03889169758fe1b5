"""Packed rows score as rows alone, for every architecture and every attention that runs here; see also test_batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UsageError
from common.schema import Rollout
from tests.trainer import build
from tests.trainer.parallel_ranks import gradient_of
from trainer.batch import Batch, pack
from trainer.model import head_weight, hidden_states, load_plain, load_sharded
from trainer.step import score

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=build.KINDS)
def folder(request, tmp_path_factory) -> Path:
    return build.make_kind(tmp_path_factory.mktemp("model"), request.param)


@torch.no_grad()
def row_by_row(folder: Path, rows: list[Rollout]) -> torch.Tensor:
    """Log-probs of the completions by transformers itself, a row at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat(
        [
            build.logprob_table(model, row).gather(-1, torch.from_numpy(row.completion_ids).long()[:, None])[:, 0]
            for row in rows
        ]
    )


@torch.no_grad()
def packed(folder: Path, batch: Batch, attention: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    model = load_plain(folder, dtype=dtype, attention=attention).eval().to(device)  # type: ignore[arg-type]
    batch = batch.to(torch.device(device))
    hidden = hidden_states(model, batch.input_ids, batch.position_ids)[batch.predictors]
    logits = hidden.float() @ head_weight(model).float().T
    return logits.log_softmax(-1).gather(-1, batch.ids[:, None])[:, 0].cpu()


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_packed_rows_score_as_rows_alone(example, folder, attention):
    rows = example.rows[:7]
    ours = packed(folder, pack(rows), attention, torch.float32, "cpu")
    torch.testing.assert_close(ours, row_by_row(folder, rows), atol=2e-5, rtol=1e-5)


@ON_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "varlen", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_packed_rows_score_as_rows_alone_on_cuda(example, folder, attention):
    rows = example.rows[:7]
    try:
        together = packed(folder, pack(rows), attention, torch.bfloat16, "cuda")
    except UsageError as error:
        pytest.skip(str(error))
    separate = torch.cat([packed(folder, pack([row]), attention, torch.bfloat16, "cuda") for row in rows])
    torch.testing.assert_close(together, separate, atol=0.05, rtol=0.05)
    assert (together - row_by_row(folder, rows)).abs().mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "checkpointed"), [("qwen3", False), ("qwen3-moe", True)])
def test_compiled_layers_keep_packed_rows_apart_and_change_no_gradient(example, alone, tmp_path, kind, checkpointed):
    folder = build.make_kind(tmp_path / "model", kind, num_hidden_layers=10, initializer_range=0.1)
    torch._dynamo.reset()
    gradients = []
    for compiled in (False, True):
        model = load_sharded(
            folder,
            alone,
            compute="float32",
            attention="sdpa",
            checkpoint_activations=checkpointed,
            compiled=compiled,
        )
        packs = [pack(example.rows[first:end]) for first, end in PACKS]
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # past it, layers run uncompiled, silently
            gradients.append(gradient_of(model, packs, alone))
            scores = [score(model, each, temperature=1.0, chunk=64).chosen for each in packs]
    for (first, end), chosen in zip(PACKS, scores, strict=True):
        torch.testing.assert_close(chosen, row_by_row(folder, example.rows[first:end]), atol=2e-5, rtol=1e-5)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=2e-6, rtol=1e-4, msg=name)


PACKS = ((0, 3), (3, 8), (8, 9), (9, 16), (0, 2), (16, 20), (2, 8), (5, 18), (1, 12))
"""Rows of packs of different length and number of rows."""


def test_flex_attention_is_not_taken_for_training_on_cpus(example, alone):
    with pytest.raises(UsageError, match="flex_attention has no backward pass on CPUs"):
        load_sharded(
            example.student, alone, compute="float32", attention="flex_attention", checkpoint_activations=False
        )
