"""Shards come before they are needed, no more of them than said, and what goes wrong is told where it matters."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from common.dataset import Dataset, open_dataset
from common.errors import DataError
from common.schema import Rollout
from common.storage import Store
from tests.trainer import build
from trainer.config import SftConfig
from trainer.read_ahead import ReadAhead, held_bytes, room, visits
from trainer.reader import Reader, ahead, check_budget, plan_line, step_batches
from trainer.world import World

PATIENCE_S = 60.0
"""After so long a test fails instead of hanging."""


def config(**settings) -> SftConfig:
    defaults = {"token_budget": 90, "rows_per_step": 2, "shuffle_shards": 2, "read_ahead": 2}
    return SftConfig(**{"model": "", "data": "", "output": "", **defaults, **settings})


def row(index: int, tokens: int) -> Rollout:
    return Rollout(
        uid=f"p{index}-0",
        prompt_id=f"p{index}",
        sample_idx=0,
        prompt_ids=np.full(3, index % build.VOCAB, np.int32),
        completion_ids=np.full(tokens, index % build.VOCAB, np.int32),
        rollout_logprobs=np.full(tokens, -1.0, np.float32),
    )


def dataset_of(folder: Path, teacher: Path, shards: int, rows: Sequence[Rollout]) -> Dataset:
    return open_dataset(build.make_dataset(folder, rows, kind="sft", policy=teacher, shards=shards))


@pytest.fixture
def twelve(example, tmp_path) -> Dataset:
    """Twelve shards of two rows."""
    return dataset_of(tmp_path / "twelve", example.teacher, 12, [row(index, 5 + index) for index in range(24)])


class GatedStore(Store):
    """A store that notes when the reading of a shard begins, and lets it go on when its gate is open."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset.url)
        self._shards = {commit.file: commit.shard for commit in dataset.shards}
        self.begun: list[int] = []
        self.changed = threading.Condition()
        self.shut: set[int] = set()

    def get(self, key: str, at_most: int | None = None) -> bytes:
        shard = self._shards[key]
        with self.changed:
            self.begun.append(shard)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: shard not in self.shut, PATIENCE_S)
        return super().get(key, at_most)

    def open(self) -> None:
        with self.changed:
            self.shut.clear()
            self.changed.notify_all()

    def has_begun(self, shards: Sequence[int]) -> bool:
        """Wait until the reading of all these has begun."""
        with self.changed:
            return self.changed.wait_for(lambda: {*shards} <= {*self.begun}, PATIENCE_S)


def test_the_next_window_is_read_while_this_one_is_trained_on(twelve, alone):
    settings = config()
    lengths = twelve.row_lengths()
    order = [visit.shard for visit in visits(lengths, settings, 0, 12)]
    twelve.store = store = GatedStore(twelve)
    store.shut = {*order[2:]}
    batches = step_batches(Reader(twelve, lengths), settings, alone, first=0, stop=12, topk=0)
    first = next(batches)  # and from here on nobody asks for anything: step 0 trains
    assert store.has_begun(order[:4])
    second = next(batches)  # which the window has, although the next one still hangs in the store
    assert {uid for step in (first, second) for batch in step for uid in batch.uids} == {
        f"p{2 * shard + index}-0" for shard in order[:2] for index in range(2)
    }
    store.open()
    assert len([*batches]) == 10


def test_shards_are_read_several_at_a_time(twelve, alone):
    settings = config(read_ahead=3)
    lengths = twelve.row_lengths()
    order = [visit.shard for visit in visits(lengths, settings, 0, 12)]
    twelve.store = store = GatedStore(twelve)
    store.shut = {*order}
    with ReadAhead(twelve, lengths, settings, 0, 12):
        assert store.has_begun(order[:3])  # none of which has come yet
        store.open()


@pytest.mark.parametrize("ahead_by", [1, 4])
def test_no_more_shards_are_held_than_the_window_and_those_ahead(twelve, alone, ahead_by):
    settings = config(read_ahead=ahead_by, rows_per_step=3)
    lengths = twelve.row_lengths()
    planned = [*visits(lengths, settings, 0, 24)]
    twelve.store = store = GatedStore(twelve)
    batches = step_batches(Reader(twelve, lengths), settings, alone, first=0, stop=24, topk=0)
    for step, _ in enumerate(batches):
        ended = sum(visit.last <= step for visit in planned)
        assert len(store.begun) <= ended + room(settings)
    assert store.begun == [visit.shard for visit in planned]


def test_memory_is_what_the_plan_says_and_not_the_dataset(example, tmp_path, alone):
    rows = [row(index, 20_000) for index in range(120)]
    dataset = dataset_of(tmp_path / "large", example.teacher, 60, rows)
    settings = config(token_budget=21_000, shuffle_shards=3)
    one = held_bytes(dataset, settings) / room(settings)
    before, most = pa.total_allocated_bytes(), 0.0
    for _ in step_batches(Reader(dataset, dataset.row_lengths()), settings, alone, first=0, stop=60, topk=0):
        most = max(most, pa.total_allocated_bytes() - before)
    assert one * 60 > 18e6
    # On top of what it is when held, a shard that is being read is there up to three times: decompressed, decoded, and
    # in pieces. The rows of a step are copies, here as many as a shard has.
    assert most <= held_bytes(dataset, settings) + 3 * settings.read_ahead * one + one


def test_a_dataset_that_fits_is_read_once(twelve, alone):
    settings = config(shuffle_shards=10)
    lengths = twelve.row_lengths()
    twelve.store = store = GatedStore(twelve)
    assert len([*step_batches(Reader(twelve, lengths), settings, alone, first=3, stop=40, topk=0)]) == 37
    assert sorted(store.begun) == [*range(12)]


@pytest.mark.parametrize("rows_per_step", [1, 2, 5, 24, 100])
def test_every_epoch_has_every_row_once_whatever_the_window(twelve, alone, rows_per_step):
    settings = config(rows_per_step=rows_per_step, shuffle_shards=1, read_ahead=1)
    per_epoch = -(-24 // rows_per_step)
    reader = Reader(twelve, twelve.row_lengths())
    steps = [*step_batches(reader, settings, alone, first=0, stop=3 * per_epoch, topk=0)]
    for number in range(3):
        uids = [uid for step in steps[number * per_epoch :][:per_epoch] for batch in step for uid in batch.uids]
        assert sorted(uids) == sorted(f"p{index}-0" for index in range(24))


def test_a_resumed_reader_goes_on_where_the_other_would_have(twelve, alone):
    settings = config(rows_per_step=5)
    reader = Reader(twelve, twelve.row_lengths())
    whole = [*step_batches(reader, settings, alone, first=0, stop=15, topk=0)]
    rest = [*step_batches(reader, settings, alone, first=7, stop=15, topk=0)]
    assert [[batch.uids for batch in step] for step in rest] == [[batch.uids for batch in step] for step in whole[7:]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_read_the_rows_of_one_between_them(twelve, alone, ranks):
    settings = config(rows_per_step=7)
    reader = Reader(twelve, twelve.row_lengths())
    whole = step_batches(reader, settings, alone, first=0, stop=8, topk=0)
    each = [World(rank, ranks, alone.device, alone.mesh, alone.saving) for rank in range(ranks)]
    shares = [step_batches(reader, settings, world, first=0, stop=8, topk=0) for world in each]
    for step, *parts in zip(whole, *shares, strict=True):
        assert len({len(part) for part in parts}) == 1
        uids = [uid for part in parts for batch in part for uid in batch.uids]
        assert sorted(uids) == sorted(uid for batch in step for uid in batch.uids)


def test_rows_carry_all_that_trains_and_no_text(example):
    dataset = open_dataset(example.scored)
    numbers = [17, 3, 8]
    for ours, theirs in zip(Reader(dataset, dataset.row_lengths()).rows(numbers), numbers, strict=True):
        expected = example.rows[theirs]
        assert (ours.uid, ours.prompt, ours.completion, ours.meta) == (expected.uid, "", "", "")
        for name in (
            "prompt_ids",
            "completion_ids",
            "rollout_logprobs",
            "teacher_logprobs",
            "topk_ids",
            "topk_logprobs",
        ):
            assert (getattr(ours, name) == getattr(expected, name)).all()


def test_a_shard_lost_on_the_way_is_an_error_in_the_training_thread_at_its_step(twelve, alone):
    settings = config()
    lengths = twelve.row_lengths()
    lost = [*visits(lengths, settings, 0, 12)][4]
    (Path(twelve.url) / twelve.shards[lost.shard].file).unlink()
    steps = ahead(step_batches(Reader(twelve, lengths), settings, alone, first=0, stop=12, topk=0))
    before = 0
    with pytest.raises(DataError, match=r"the shard is missing \(.*data/.*parquet\)\. ."):
        for _ in steps:
            before += 1
    assert lost.first <= before <= lost.last
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "shard"))]


def test_a_reader_that_is_closed_early_leaves_no_thread_behind(twelve, alone):
    steps = ahead(step_batches(Reader(twelve, twelve.row_lengths()), config(), alone, first=0, stop=500, topk=0))
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "shard"))]


def test_a_row_longer_than_the_budget_is_named_with_the_budget_it_needs(twelve):
    with pytest.raises(DataError, match=r"2 rows do not fit token_budget=29.*31 tokens.*p23-0.*token_budget=31"):
        check_budget(twelve, twelve.row_lengths(), 29)


def test_the_plan_is_told_before_the_run(twelve):
    line = plan_line(twelve, twelve.row_lengths(), config(rows_per_step=12), ranks=2)
    assert line.startswith("plan: 4.0 passes a step, ") and "reader: at most 4 shards, " in line


@pytest.mark.slow
def test_an_error_of_one_rank_is_the_error_of_all(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(build.ROOT / "tests/trainer/failing_rank.py")
    subprocess.run([*command, script, str(tmp_path)], env=build.environment(), check=True)
    said = [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)]
    assert said == ["DataError: rank 1 cannot read (a shard). Mend it"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shard_lost_in_mid_training_ends_the_run_with_one_line(example, tmp_path, ranks):
    rows = [row(index, 5 + index) for index in range(24)]
    dataset = dataset_of(tmp_path / "data", example.teacher, 24, rows)
    words = [f"model={example.teacher}", f"data={dataset.url}", f"output={tmp_path / 'out'}", "max_steps=100000"]
    words += ["shuffle_shards=2", "read_ahead=1", "rows_per_step=2", "token_budget=90", "validation_share=0"]
    process = subprocess.Popen(
        build.trainer_command("sft", *words, ranks=ranks), env=build.environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("step"):
        assert process.poll() is None
    (Path(dataset.url) / dataset.shards[7].file).unlink()
    rest = process.stderr.read()
    assert process.wait() == 65, rest
    assert rest.count("error: the shard is missing") == 1 and "Traceback" not in rest and "RuntimeError" not in rest


def test_shards_without_rows_are_never_read_and_every_row_is_trained_on(example, tmp_path, alone) -> None:
    dataset = dataset_of(tmp_path / "holes", example.teacher, 5, [row(index, 5 + index) for index in range(3)])
    assert [commit.rows for commit in dataset.shards] == [1, 1, 1, 0, 0]
    reader = Reader(dataset, dataset.row_lengths())
    steps = list(step_batches(reader, config(), alone, first=0, stop=4, topk=0))
    assert [sum(len(batch.uids) for batch in step) for step in steps] == [2, 1, 2, 1]
    assert "at most 4 shards" in plan_line(dataset, reader.lengths, config(), 1)
