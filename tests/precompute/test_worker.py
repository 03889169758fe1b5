"""What a worker says of a whole shard, and what it refuses to commit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError, StorageError
from common.schema import Rollout, to_table
from precompute.tasks import score_stats
from tests.precompute.disk import no_room_for_files_above
from tests.precompute.rows import make_rollout, make_writer


def _graded(rows: Sequence[Rollout], shift: int = 0) -> list[Rollout]:
    """Teacher log-probs that agree with the rollout's up to noise, moved by `shift` tokens."""
    generator = np.random.default_rng(3)
    noise = [generator.normal(0, 0.3, len(row.completion_ids)) for row in rows]
    teacher = [np.minimum(row.rollout_logprobs + extra, 0.0) for row, extra in zip(rows, noise, strict=True)]
    return [
        replace(row, teacher_logprobs=np.roll(column, shift).astype(np.float32))
        for row, column in zip(rows, teacher, strict=True)
    ]


def test_aligned_teacher_logprobs_are_told_with_their_correlation() -> None:
    stats = score_stats(_graded([make_rollout(f"{index}/0") for index in range(8)]), "shard 0")
    assert stats["alignment"] > 0.9
    assert stats["truncated"] == 8


@pytest.mark.parametrize("shift", [-1, 1])
def test_teacher_logprobs_shifted_by_one_token_are_refused(shift: int) -> None:
    rows = _graded([make_rollout(f"{index}/0") for index in range(8)], shift)
    with pytest.raises(DataError, match=r"not aligned.*shard 0"):
        score_stats(rows, "shard 0")


def test_a_shard_that_lost_all_its_rows_has_statistics_of_nothing() -> None:
    assert score_stats([], "shard 0") == {"truncated": 0, "rollout_logprob_sum": 0, "teacher_logprob_sum": 0}


def test_a_disk_that_fills_up_costs_the_shard_at_hand_alone(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, "rollouts", shards=2)
    small, large = make_rollout("small/0", tokens=1), make_rollout("large/0", tokens=20_000)
    with no_room_for_files_above(20_000):
        writer.commit(0, to_table([small]))
        with pytest.raises(StorageError, match="no space left"):
            writer.commit(1, to_table([large]))
    assert writer.pending() == [1]
