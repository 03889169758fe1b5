"""An independent forward pass to audit vLLM by: plain transformers, a few positions' logits at a time, no vLLM at all.

Nothing of the engine or of the trainer is used here, and the model's own `forward` computes the logits, so that a
mistake of theirs is not made twice. It is the one file of precompute that imports torch.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from common.errors import DataError, UsageError
from precompute.audit.agreement import Rescored
from precompute.config import Sampling

LOGITS_AT_ONCE = 2**24
"""Logits in memory at once, 64 MiB in float32; a whole completion of 16k tokens and 152k ids would be 10 GB."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GREEDY, COLDEST = 1e-5, 1e-2
"""Temperatures: below the first vLLM takes the likeliest token, and below the second it samples as if at the second."""


class Behaviour(NamedTuple):
    """Log-probs of given tokens under a distribution that may have been cut, and how sure the cut is."""

    logprobs: Tensor  # (tokens,) float32 nats; a token outside the cut is given as if it alone had been let in
    blur: Tensor  # (tokens,) nats by which the log-probs move as the cut's edge moves by the noise
    outside: Tensor  # (tokens,) bool: beyond the edge by more than the noise, so it could not be sampled


class Reference:
    """One model on one device, for inference."""

    def __init__(self, folder: Path, *, dtype: str, device: str) -> None:
        """Load the model in `folder`.

        Args:
            dtype: a key of `DTYPES`.
            device: as torch names them, or `auto` for the GPU where there is one.

        Raises:
            DataError: transformers cannot open it, or weights are missing.
            UsageError: there is no such device, or not enough memory on it.
        """
        self.device = _device(device)
        self._where = str(folder)
        model = _load(folder, DTYPES[dtype])
        if getattr(model, "_is_stateful", False):
            raise DataError("models with a recurrent state cannot be audited", where=self._where)
        try:
            self._model = model.to(self.device).eval()
        except torch.OutOfMemoryError:
            raise _no_room(self._where) from None
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.chunk = max(1, LOGITS_AT_ONCE // self.vocab_size)
        """Positions whose logits are in memory at once."""

    def score(
        self,
        prompt_ids: np.ndarray,  # (prompt,) int32
        completion_ids: np.ndarray,  # (tokens,) int32
        sampling: Sampling,
        *,
        noise: float = 0.0,
        topk_ids: np.ndarray | None = None,  # (tokens, k) int32
    ) -> Rescored:
        """Log-probs of the completion's tokens under what `sampling` makes of the model's distribution.

        `topk_ids` asks for the plain log-probs of further ids at each position; `noise` as in `behaviour`.
        """
        wanted = np.empty((len(completion_ids), 0)) if topk_ids is None else topk_ids
        ids = torch.from_numpy(np.concatenate([prompt_ids, completion_ids]).astype(np.int64)).to(self.device)
        targets = ids[len(prompt_ids) :].split(self.chunk)
        named = torch.from_numpy(wanted.astype(np.int64)).to(self.device).split(self.chunk)
        try:
            with torch.inference_mode():
                pieces = [
                    (*behaviour(logits, target, sampling, noise=noise), *_at_ids(logits, also))
                    for logits, target, also in zip(self._logits(ids, len(prompt_ids)), targets, named, strict=True)
                ]
        except torch.OutOfMemoryError:
            raise _no_room(self._where) from None
        return Rescored(*(torch.cat(column).cpu().numpy() for column in zip(*pieces, strict=True)))

    def _logits(self, ids: Tensor, prompt: int) -> Iterator[Tensor]:
        """Float32 logits that predict `ids[prompt:]`, (<= chunk, vocab) at a time.

        The row enters the model in pieces that see what came before through the cache; a piece begins with the token
        that predicts the first of its targets.
        """
        cache = DynamicCache(config=self._model.config)
        if prompt > 1:
            self._model(input_ids=ids[None, : prompt - 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        for piece in ids[prompt - 1 : -1].split(self.chunk):
            yield self._model(input_ids=piece[None], past_key_values=cache, use_cache=True).logits[0].float()


def behaviour(logits: Tensor, ids: Tensor, sampling: Sampling, *, noise: float) -> Behaviour:
    """Log-probs of `ids` under the distribution that vLLM samples from: temperature, then min-p, top-k and top-p.

    Two engines whose logits differ by a hair may cut off one token more or less, which moves the log-probs of all that
    stay. `noise` says how much the logits may differ, in nats: `blur` and `outside` tell what that can do.

    Args:
        logits: (tokens, vocab) float32.
        ids: (tokens,) int64.
    """
    if sampling.temperature >= GREEDY:  # below, vLLM reports the plain log-prob of the token it took
        temperature = max(sampling.temperature, COLDEST)
        logits, noise = logits / temperature, noise / temperature
    chosen = logits.gather(-1, ids[:, None])[:, 0]
    if sampling.temperature < GREEDY or (sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0):
        nothing = torch.zeros_like(chosen)
        return Behaviour(chosen - logits.logsumexp(-1), nothing, nothing.bool())
    ranked = logits.sort(-1, descending=True).values
    strict, exact, lenient = (_lowest_kept(ranked, sampling, slack) for slack in (-noise, 0.0, noise))
    norms = [torch.where(ranked < lowest, -math.inf, ranked).logsumexp(-1) for lowest in (strict, exact, lenient)]
    return Behaviour(chosen - norms[1], norms[2] - norms[0], chosen < lenient[:, 0])


def _lowest_kept(ranked: Tensor, sampling: Sampling, slack: float) -> Tensor:
    """The lowest logit that survives all cuts, (tokens, 1), when each edge is moved down by `slack` nats.

    Args:
        ranked: (tokens, vocab) tempered logits, highest first.
    """
    below = max(slack, 0.0)  # an edge that lies on a token moves down to its neighbours, but not up past itself
    lowest = torch.full_like(ranked[:, :1], -math.inf)
    if sampling.min_p > 0:
        lowest = ranked[:, :1] + math.log(sampling.min_p) - slack
    if 0 < sampling.top_k < ranked.shape[1]:
        lowest = torch.maximum(lowest, ranked[:, sampling.top_k - 1, None] - below)
    if sampling.top_p < 1:
        probs = torch.where(ranked < lowest, -math.inf, ranked).softmax(-1)
        # Logits that err by `slack` move a share p of the mass by p (1 - p) slack.
        mass = sampling.top_p + sampling.top_p * (1 - sampling.top_p) * slack
        kept = (probs.cumsum(-1) - probs < mass).sum(-1, keepdim=True).clamp(min=1)
        lowest = torch.maximum(lowest, ranked.gather(-1, kept - 1) - below)
    return lowest


def _at_ids(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Plain log-probs at `ids` (tokens, k), and of the k-th most likely id of each position (tokens,)."""
    k = ids.shape[1]
    if k == 0:
        return logits.new_empty(ids.shape), logits.new_full((len(ids),), math.nan)
    norm = logits.logsumexp(-1, keepdim=True)
    return logits.gather(-1, ids) - norm, (logits.topk(k).values[:, -1:] - norm)[:, 0]


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"transformers cannot open the model: {reason}", where=str(folder)) from None
    model, found = loaded  # a pair, because of `output_loading_info`
    if found["missing_keys"]:  # they would be random, and nobody would be told
        raise DataError(f"the model lacks weights, first {min(found['missing_keys'])}", where=str(folder))
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # no such name; torch was built without it; there is none
        raise UsageError("there is no such device", where=name, fix="Give --device auto, cpu or cuda") from None
    return torch.device(name)


def _no_room(model: str) -> UsageError:
    return UsageError(
        "the model does not fit into the device's memory", where=model, fix="Give --device cpu or --dtype bfloat16"
    )
