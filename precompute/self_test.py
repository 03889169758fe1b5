"""By how much the company in a batch moves an engine's numbers. Pure against `requests.Scorer`.

GPU kernels add in an order that depends on the shape of the batch, so the same sequence gets slightly other log-probs
beside others. On a CPU in float32 the difference is 0; on a GPU in bfloat16 some hundredths of a nat; an engine that
mixes up its sequences shows whole nats.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from common.errors import DataError
from precompute.engine.requests import Scorer
from precompute.score import Unscored, is_sound, requests_of


def batch_noise(engine: Scorer, rows: Sequence[Unscored]) -> float | None:
    """The largest difference, in nats, of a token's log-prob between any two batches that its sequence was part of.

    Args:
        rows: a few sequences, of different lengths if possible; each is scored four times.

    Returns:
        None where the engine took none of them: nothing is known of its noise then.

    Raises:
        DataError: the engine gave no sound log-probs. Of a sequence that it will not take nothing is told here.
    """
    seen = [_logprobs(engine, batch) for batch in _batches(rows)]
    if not any(seen):
        return None
    largest = 0.0
    for index in range(len(rows)):
        found = [batch[index] for batch in seen if index in batch]
        if found:
            columns = np.stack(found)  # (batches, tokens)
            largest = max(largest, float((columns.max(axis=0) - columns.min(axis=0)).max()))
    return largest


def _batches(rows: Sequence[Unscored]) -> Iterator[list[tuple[int, Unscored]]]:
    """Each sequence alone, then all of them, in the other order, and in two parts."""
    named = list(enumerate(rows))
    yield from ([each] for each in named)
    yield named
    yield named[::-1]
    yield named[::2]
    yield named[1::2]


def _logprobs(engine: Scorer, batch: Sequence[tuple[int, Unscored]]) -> dict[int, np.ndarray]:
    """Log-probs by the number of the sequence, all of a batch given to the engine at once."""
    numbers = {id(row): number for number, row in batch}
    found: dict[int, np.ndarray] = {}
    for scores in engine.score(requests_of(row for _, row in batch)):
        row: Unscored = scores.key
        if scores.logprobs is None or not is_sound(scores, len(row.rollout.completion_ids), 0):
            raise DataError("the engine gave no sound log-probs in its self-test", where=f"row {row.uid}")
        found[numbers[id(row)]] = scores.logprobs
    return found
