import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.dataset import open_dataset
from common.errors import DataError, StorageError
from common.progress import Progress
from common.schema import Rollout, to_rows
from precompute.score import Unscored
from precompute.worker import commit_shards, fill_shards, rollout_stats, score_stats
from tests.precompute.disk import no_room_for_files_above
from tests.precompute.rows import make_rollout, make_writer


def _progress(total: int) -> Progress:
    return Progress("test", total, "tok", stream=io.StringIO())


def _graded(rows: Sequence[Rollout], shift: int = 0) -> list[Rollout]:
    """Teacher log-probs that agree with the rollout's up to noise, moved by `shift` tokens."""
    generator = np.random.default_rng(3)
    noise = [generator.normal(0, 0.3, len(row.completion_ids)) for row in rows]
    teacher = [np.minimum(row.rollout_logprobs + extra, 0.0) for row, extra in zip(rows, noise, strict=True)]
    return [
        replace(row, teacher_logprobs=np.roll(column, shift).astype(np.float32))
        for row, column in zip(rows, teacher, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_finish_in_any_order_land_in_dataset_order(tmp_path: Path, seed: int) -> None:
    places = [Unscored(shard, row, make_rollout(f"{shard}-{row}/0")) for shard in range(4) for row in range(shard + 1)]
    finished = [places[index] for index in np.random.default_rng(seed).permutation(len(places))]
    writer = make_writer(tmp_path, "rollouts", shards=4)
    sizes = {shard: shard + 1 for shard in range(4)}
    pairs = [(place, place.rollout) for place in finished]
    commit_shards(writer, fill_shards(pairs, sizes, _progress(len(places))), rollout_stats)
    writer.finalize()
    dataset = open_dataset(str(tmp_path))
    stored = [row.uid for shard in range(4) for row in to_rows(dataset.read_shard(shard))]
    assert stored == [place.rollout.uid for place in places]


def test_a_shard_is_handed_on_as_soon_as_it_is_full() -> None:
    taken = 0

    def finished():
        nonlocal taken
        for row in range(10):
            taken += 1
            yield Unscored(row, 0, ROLLOUT), ROLLOUT

    shards = fill_shards(finished(), dict.fromkeys(range(10), 1), _progress(10))
    assert next(shards)[0] == 0
    assert taken == 1


ROLLOUT = make_rollout("x/0")


def test_aligned_teacher_logprobs_are_committed_with_their_correlation(tmp_path: Path) -> None:
    rows = _graded([make_rollout(f"{index}/0") for index in range(8)])
    writer = make_writer(tmp_path, "scored")
    commit_shards(writer, [(0, rows)], score_stats)
    writer.finalize()
    [commit] = open_dataset(str(tmp_path)).shards
    assert commit.stats["alignment"] > 0.9
    assert commit.stats["truncated"] == 8


@pytest.mark.parametrize("shift", [-1, 1])
def test_teacher_logprobs_shifted_by_one_token_are_refused_and_not_committed(tmp_path: Path, shift: int) -> None:
    rows = _graded([make_rollout(f"{index}/0") for index in range(8)], shift)
    writer = make_writer(tmp_path, "scored")
    with pytest.raises(DataError, match="not aligned"):
        commit_shards(writer, [(0, rows)], score_stats)
    assert writer.pending() == [0]
    assert not (tmp_path / "data").exists()


def test_shards_before_a_refused_one_stay_committed(tmp_path: Path) -> None:
    good, bad = make_rollout("good/0"), make_rollout("bad/0", highest=10_000)
    writer = make_writer(tmp_path, "rollouts", shards=2)
    with pytest.raises(DataError, match="outside the vocabulary"):
        commit_shards(writer, [(0, [good]), (1, [bad])], rollout_stats)
    assert writer.pending() == [1]


def test_a_disk_that_fills_up_costs_the_shard_at_hand_alone(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, "rollouts", shards=2)
    small, large = make_rollout("small/0", tokens=1), make_rollout("large/0", tokens=20_000)
    with no_room_for_files_above(20_000), pytest.raises(StorageError, match="no space left"):
        commit_shards(writer, [(0, [small]), (1, [large])], rollout_stats)
    assert writer.pending() == [1]
