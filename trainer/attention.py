"""Attention over packed rows, each row by itself: the cost is the sum of the rows' squares, not the square of the sum.

transformers' own sdpa keeps packed rows apart by a mask over the whole pack, pays for all of it, and a mask also keeps
the kernel from skipping the half that causality hides. Here the rows' lengths go down to the attention, which calls the
kernel once a row (`sdpa`, on any device), or once for all with their bounds (`varlen`, torch's flash kernel on CUDA).
What a row gets is then what it would get alone. The other backends are transformers'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from common.errors import DataError
from trainer.architectures import FLASH

OURS = {"sdpa": "row_by_row_sdpa", "varlen": "bounded_sdpa"}
"""The backends that are ours, by the name transformers knows them under; `sdpa` in it makes transformers ask whether
the architecture leaves its attention to others at all."""
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What an architecture may ask of its attention that these two would leave out."""


@dataclass(frozen=True)
class Bounds:
    """Where packed rows begin and end: 0, then the end of each.

    A list would make torch.compile take every number of rows for another program; into an object it does not look,
    as long as only `row_by_row`, which it leaves alone, does.
    """

    ends: Sequence[int]


def implementation(attention: str) -> str:
    """What transformers is to be asked for; registers ours with it."""
    if attention in OURS:
        ours = torch.compiler.disable(row_by_row) if attention == "sdpa" else by_bounds
        AttentionInterface.register(OURS[attention], ours)
        AttentionMaskInterface.register(OURS[attention], _window_as_mask)
    return OURS.get(attention, attention)


def setting(registered: str | None) -> str:
    """The setting `attention` that the backend under that name was asked for by."""
    return next((name for name, ours in OURS.items() if ours == registered), str(registered))


def row_bounds(registered: str | None, position_ids: Tensor) -> dict[str, Any]:
    """Where packed rows begin and end, in the words of the attention registered under that name; given once to the
    model, or every layer would look again. Those that take a mask find the rows by themselves.

    Args:
        position_ids: (1, length), 0 where a row begins; on the meta device, without values, they count as one row.
    """
    if registered not in OURS.values() and registered not in FLASH:
        return {}
    starts = [0] if position_ids.is_meta else (position_ids[0] == 0).nonzero()[:, 0].tolist()
    if starts[:1] != [0]:
        raise ValueError("the first packed row does not begin at position 0")
    bounds = [*starts, position_ids.shape[1]]
    if registered == OURS["sdpa"]:
        return {"bounds": Bounds(bounds)}
    longest = max(end - start for start, end in pairwise(bounds))
    ends = torch.tensor(bounds, dtype=torch.int32, device=position_ids.device)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def row_by_row(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: int | None, **ask: Any
) -> tuple[Tensor, None]:
    """Causal attention of each row to itself by torch's scaled_dot_product_attention.

    Args:
        query: (1, heads, length, head size); key and value with as many heads or a divisor of it.
        attention_mask: what `_window_as_mask` gave.
        ask: `bounds` of `row_bounds`, `scaling`, `sliding_window`; as the model's attention layer passes it on.

    Returns:
        (1, length, heads, head size), and no attention weights.
    """
    window = _window_of(module, attention_mask, ask)
    lengths = [end - start for start, end in pairwise(ask["bounds"].ends)]
    rows = zip(*(column.split(lengths, dim=2) for column in (query, key, value)), strict=True)
    outputs = [_attend(*row, scale=ask.get("scaling"), window=window).transpose(1, 2) for row in rows]
    return torch.cat(outputs, dim=1), None


def by_bounds(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: int | None, **ask: Any
) -> tuple[Tensor, None]:
    """The same by torch's variable-length flash kernel: one call for all rows; CUDA and 16-bit types only."""
    window = _window_of(module, attention_mask, ask)
    by_token = [column[0].transpose(0, 1) for column in (query, key, value)]  # (length, heads, head size) each
    output: Any = varlen_attn(
        *by_token,
        cu_seq_q=ask["cu_seq_lens_q"],
        cu_seq_k=ask["cu_seq_lens_k"],
        max_q=ask["max_length_q"],
        max_k=ask["max_length_k"],
        scale=ask.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None) -> Tensor:
    """One row, (1, heads, length, head size). Only a row longer than its layer's window needs a mask."""
    length, gqa = query.shape[2], query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    band = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=band, scale=scale, enable_gqa=gqa)


def _window_of(module: nn.Module, mask: int | None, ask: dict[str, Any]) -> int | None:
    """Tokens that a token sees, itself included; None for all before it.

    Raises:
        DataError: the layer asks for what these two backends would leave out.
    """
    if not ask.keys() & {"bounds", "cu_seq_lens_q"}:
        raise DataError(
            f"{type(module).__name__} is not told by its model where packed rows begin",
            fix="Set attention=eager, if the model supports that; or take a model of another type",
        )
    asked = [name for name in UNSUPPORTED if ask.get(name) is not None]
    if not getattr(module, "is_causal", True) or ask.get("is_causal") is False:
        asked = ["attention that is not causal"]
    if not isinstance(mask, int | None):
        asked = ["a mask of its own"]
    if asked or ask.get("dropout"):
        raise DataError(
            f"{type(module).__name__} needs {[*asked, 'dropout'][0]}, which this attention does not have",
            fix="Set attention=eager, if the model supports that; or take a model of another type",
        )
    return ask.get("sliding_window") or mask


def _window_as_mask(*arguments: Any, local_size: int | None = None, **more: Any) -> int | None:
    """In place of the mask that transformers asks for before it calls the attention: the window it would have shown.

    Most architectures also hand it to their attention as `sliding_window`; some rely on the mask alone.
    """
    return local_size
