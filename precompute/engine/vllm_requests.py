"""What is asked of vLLM for one request: the arguments of its `SamplingParams`, without importing it."""

from typing import Any

import numpy as np

from precompute.config import Sampling
from precompute.engine.requests import GenerateRequest, ScoreRequest


def sampled(request: GenerateRequest, sampling: Sampling, topk: int) -> dict[str, Any]:
    """Sample one completion, with the log-prob of every token and the `topk` most likely ids beside it."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_ids or ()),
        "ignore_eos": True,  # the stop ids say where to stop, and they alone
        "seed": request.seed,
        "logprobs": topk,
        "flat_logprobs": True,
        "detokenize": False,
    }


def scored_by_id(request: ScoreRequest) -> dict[str, Any]:
    """Grade given ids at the positions of the completion, (tokens, 1 + k): its own token, then the further ones."""
    columns = [request.completion_ids[:, None]] + ([] if request.topk_ids is None else [request.topk_ids])
    ids = np.ascontiguousarray(np.concatenate(columns, axis=1), np.int32)
    return {**_ONE_TOKEN, "prompt_logprob_token_ids": ids, "prompt_logprob_start": len(request.prompt_ids) - 1}


def scored_in_prompt(topk: int) -> dict[str, Any]:
    """Grade every token of the whole prompt, with the `topk` most likely ids beside it."""
    return {**_ONE_TOKEN, "prompt_logprobs": topk, "flat_logprobs": True}


def whole(request: ScoreRequest) -> list[int]:
    """Prompt and completion, as the prompt of a request that grades."""
    return [*request.prompt_ids.tolist(), *request.completion_ids.tolist()]


_ONE_TOKEN = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
"""vLLM grades a prompt only on the way to a token."""
