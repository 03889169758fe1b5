"""What vLLM returns for a finished request, as ours. What was not asked for comes back as None, never mended."""

from typing import Any

import numpy as np

from common.errors import DataError
from precompute.requests import EngineDied, GenerateRequest, Generation, ScoreRequest, Scores

FINISH_REASONS = ("stop", "length")
"""How a completion ends when nothing went wrong."""


def generation(request: GenerateRequest, output: Any) -> Generation:
    """A sampled completion.

    Raises:
        EngineDied: vLLM gave the request up, or its numbers broke down while it sampled.
        DataError: vLLM returned log-probs of other tokens.
    """
    completion, where = output.outputs[0], f"row {request.uid}"
    if completion.finish_reason not in FINISH_REASONS:
        raise EngineDied(f"vLLM gave a request up ({completion.finish_reason})", where=where)
    ids = np.asarray(completion.token_ids, np.int32)
    flat = completion.logprobs
    if len(flat) != len(ids) or not np.array_equal(np.asarray(flat.token_ids, np.int32)[flat.start_indices], ids):
        raise DataError("vLLM returned log-probs of other tokens than it sampled", where=where)
    logprobs = np.asarray(flat.logprobs, np.float32)[flat.start_indices]
    if not np.isfinite(logprobs).all():
        raise EngineDied("vLLM sampled with log-probs that are no numbers", where=where)
    return Generation(request.key, ids, logprobs, str(completion.finish_reason))


def scores_by_id(request: ScoreRequest, output: Any) -> Scores:
    """Log-probs of the ids that were given: those of the completion, one a row."""
    values = output.prompt_token_id_logprobs
    if values is None or values.shape != (len(request.completion_ids), 1):
        return Scores(request.key, None)
    return Scores(request.key, np.asarray(values[:, 0], np.float32))


def scores_from_prompt(request: ScoreRequest, output: Any, topk: int) -> Scores:
    """The rows of the completion in vLLM's flat prompt log-probs: each holds the token itself, then the top k."""
    flat, start, tokens = output.prompt_logprobs, len(request.prompt_ids), len(request.completion_ids)
    width = 1 + topk
    if flat is None or len(flat) != start + tokens:
        return Scores(request.key, None)
    begin = flat.start_indices[start]
    ids = np.asarray(flat.token_ids[begin:], np.int32)
    logprobs = np.asarray(flat.logprobs[begin:], np.float32)
    if ids.size != tokens * width or logprobs.size != tokens * width:
        return Scores(request.key, None)
    ids, logprobs = ids.reshape(tokens, width), logprobs.reshape(tokens, width)
    if not np.array_equal(ids[:, 0], request.completion_ids):
        return Scores(request.key, None)
    top = (ids[:, 1:], logprobs[:, 1:]) if topk else (None, None)
    return Scores(request.key, logprobs[:, 0].copy(), *top)
