"""What vLLM returns for a finished request, as ours. What was not asked for comes back as None, never mended."""

from typing import Any

import numpy as np

from common.errors import DataError
from precompute.engine.requests import EngineDied, GenerateRequest, Generation, ScoreRequest, Scores

FINISH_REASONS = ("stop", "length")
"""How a completion ends when nothing went wrong."""


def generation(request: GenerateRequest, output: Any, topk: int) -> Generation:
    """A sampled completion, with the `topk` most likely ids at each position.

    Raises:
        EngineDied: vLLM gave the request up, or its numbers broke down while it sampled.
        DataError: vLLM returned log-probs of other tokens.
    """
    completion, where = output.outputs[0], f"row {request.uid}"
    if completion.finish_reason not in FINISH_REASONS:
        raise EngineDied(f"vLLM gave a request up ({completion.finish_reason})", where=where)
    ids = np.asarray(completion.token_ids, np.int32)
    found = _columns(completion.logprobs, 0, ids, topk) if len(ids) else None
    if found is None:
        raise DataError("vLLM returned log-probs of other tokens than it sampled", where=where)
    named, logprobs = found
    if not np.isfinite(logprobs[:, 0]).all():
        raise EngineDied("vLLM sampled with log-probs that are no numbers", where=where)
    top = named[:, 1:] if topk else None
    return Generation(request.key, ids, logprobs[:, 0].copy(), str(completion.finish_reason), top)


def scores_by_id(request: ScoreRequest, output: Any) -> Scores:
    """Log-probs of the ids that were given, one row a position: the completion's own token, then the further ones."""
    values, topk_ids = output.prompt_token_id_logprobs, request.topk_ids
    width = 1 + (0 if topk_ids is None else topk_ids.shape[1])
    if values is None or values.shape != (len(request.completion_ids), width):
        return Scores(request.key, None)
    values = np.asarray(values, np.float32)
    top = (None, None) if topk_ids is None else (topk_ids, values[:, 1:])
    return Scores(request.key, values[:, 0].copy(), *top)


def scores_from_prompt(request: ScoreRequest, output: Any, topk: int) -> Scores:
    """The rows of the completion in vLLM's flat prompt log-probs: each holds the token itself, then the top k."""
    found = _columns(output.prompt_logprobs, len(request.prompt_ids), request.completion_ids, topk)
    if found is None:
        return Scores(request.key, None)
    ids, logprobs = found
    top = (ids[:, 1:], logprobs[:, 1:]) if topk else (None, None)
    return Scores(request.key, logprobs[:, 0].copy(), *top)


def _columns(flat: Any, start: int, chosen: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and log-probs, (tokens, 1 + k) each, of flat log-probs from position `start` on; None where they do not fit.

    Args:
        chosen: (tokens,) the ids that the first column must hold.
    """
    shape = (len(chosen), 1 + topk)
    if flat is None or len(flat) != start + len(chosen):
        return None
    begin = flat.start_indices[start]
    ids = np.asarray(flat.token_ids[begin:], np.int32)
    logprobs = np.asarray(flat.logprobs[begin:], np.float32)
    if ids.size != shape[0] * shape[1] or logprobs.size != ids.size:
        return None
    ids, logprobs = ids.reshape(shape), logprobs.reshape(shape)
    return (ids, logprobs) if np.array_equal(ids[:, 0], chosen) else None
