"""Our attention over packed rows against softmax written out, row by row."""

import pytest
import torch
from torch import Tensor, nn

from common.errors import DataError
from trainer.attention import OURS, Bounds, by_bounds, implementation, row_bounds, row_by_row

LENGTHS = (5, 1, 9)
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def columns(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)

    def column(heads: int) -> Tensor:
        return torch.randn(1, heads, sum(LENGTHS), SIZE, device=device, dtype=dtype).requires_grad_()

    return column(HEADS), column(KEY_HEADS), column(KEY_HEADS)


def positions(device: str = "cpu") -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]


def written_out(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """(1, length, heads, size) from whole matrices of scores, one row of the pack at a time."""
    key, value = (column.repeat_interleave(HEADS // KEY_HEADS, 1) for column in (key, value))
    outputs, start = [], 0
    for length in LENGTHS:
        q, k, v = (column[:, :, start : start + length] for column in (query, key, value))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= (window or length))
        scores = (q @ k.transpose(-1, -2) / SIZE**0.5).masked_fill(hidden, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(1, 2))
        start += length
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_every_row_attends_to_itself_alone(window):
    qkv = columns()
    output, _ = row_by_row(
        nn.Module(), *qkv, None, scaling=SIZE**-0.5, sliding_window=window, bounds=Bounds([0, 5, 6, 15])
    )
    truth = written_out(*qkv, window)
    torch.testing.assert_close(output, truth)
    upstream = torch.randn_like(truth)
    for ours, true in zip(
        torch.autograd.grad(output, qkv, upstream), torch.autograd.grad(truth, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(ours, true)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3, 100])
def test_the_varlen_kernel_says_the_same(window):
    qkv = columns(torch.bfloat16, "cuda")
    bounds = row_bounds(implementation("varlen"), positions("cuda"))
    output, _ = by_bounds(nn.Module(), *qkv, None, scaling=SIZE**-0.5, sliding_window=window, **bounds)
    query, key, value = (column.float().cpu() for column in qkv)
    truth = written_out(query, key, value, window)
    torch.testing.assert_close(output.float().cpu(), truth, atol=2e-2, rtol=2e-2)


def test_a_restart_of_the_positions_begins_a_row():
    assert row_bounds(OURS["sdpa"], positions())["bounds"] == Bounds([0, 5, 6, 15])
    flash = row_bounds("flash_attention_2", positions())
    assert flash["cu_seq_lens_q"].tolist() == [0, 5, 6, 15] and flash["max_length_k"] == 9
    assert flash["cu_seq_lens_q"].dtype == torch.int32


def test_attention_that_takes_a_mask_is_told_nothing():
    assert row_bounds("eager", positions()) == row_bounds("flex_attention", positions()) == {}


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_the_kernel_would_leave_out_is_refused(name):
    with pytest.raises(DataError, match=f"{name}.*"):
        row_by_row(nn.Module(), *columns(), None, bounds=Bounds([0, 15]), **{name: 30.0})


def test_attention_in_both_directions_is_refused():
    both = nn.Module()
    both.is_causal = False  # pyright: ignore[reportArgumentType] - as the layers of transformers say it
    with pytest.raises(DataError, match="not causal"):
        row_by_row(both, *columns(), None, bounds=Bounds([0, 15]))
