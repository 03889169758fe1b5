"""Boxes that share a dataset without a word: every shard is done, few of them twice, and no loop waits for a store."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.dataset_writer import create_dataset
from common.errors import RetryLater
from precompute.fleet.shards import Listing, ShardQueue, visiting_order
from tests.common.rows import make_plan, make_shard


def ignore(text: str) -> None:
    """For what waits for no store."""


def queue_of(commits: set[int], total: int, index: int = 0, count: int = 1) -> ShardQueue:
    """A box's queue; `commits` is the store."""
    return ShardQueue(visiting_order(total, index, count), Listing(lambda: {*commits}, 0, ignore, pause_s=0))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(1e-4)


def see(queue: ShardQueue, commits: set[int]) -> None:
    """Refresh until the queue knows of all these commits."""

    def seen() -> bool:
        queue.refresh()
        return queue.listed and queue.committed >= len(commits)

    until(seen)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))
def test_boxes_and_replicas_that_die_now_and_then_do_every_shard(total: int, boxes: int, seed: int) -> None:
    chance, commits = random.Random(seed), set[int]()
    queues = [queue_of(commits, total, index, boxes) for index in range(boxes)]
    out: list[list[int]] = [[] for _ in queues]
    while len(commits) < total:
        box = chance.randrange(boxes)
        queue, mine = queues[box], out[box]
        step = chance.random()
        if step < 0.2:
            see(queue, commits)
        elif step < 0.6 and len(mine) < 3:
            shard = queue.take()
            assert shard not in mine, "handed out twice"
            mine += [] if shard is None else [shard]
        elif mine:
            shard = mine.pop(chance.randrange(len(mine)))
            if chance.random() < 0.3:
                queue.put_back(shard)
            else:
                commits.add(shard)
                queue.done(shard)
    for queue in queues:
        see(queue, commits)
        assert queue.finished
        assert queue.take() is None


@given(st.integers(1, 200), st.integers(1, 12))
def test_every_box_visits_every_shard_and_its_own_slice_first(total: int, count: int) -> None:
    orders = [visiting_order(total, index, count) for index in range(count)]
    assert all(sorted(order) == [*range(total)] for order in orders)
    if count > 1:
        shares = [total * (index + 1) // count - total * index // count for index in range(count)]
        own = [order[:share] for order, share in zip(orders, shares, strict=True)]
        assert sorted(shard for some in own for shard in some) == [*range(total)]
        assert all(some == sorted(some) for some in own)


@pytest.mark.parametrize("told", [True, False])
def test_boxes_do_few_shards_twice_told_of_each_other_or_not(told: bool) -> None:
    boxes, total, commits, runs = 4, 400, set[int](), 0
    queues = [queue_of(commits, total, index if told else 0, boxes if told else 1) for index in range(boxes)]
    out: list[int | None] = [None] * boxes
    while len(commits) < total:
        for box, queue in enumerate(queues):
            if (shard := out[box]) is not None:
                commits.add(shard)
                queue.done(shard)
            see(queue, commits)
            out[box] = queue.take()
            runs += out[box] is not None
    assert runs < total * (1.01 if told else 1.1) + boxes


def test_nothing_is_handed_out_before_the_first_listing() -> None:
    commits = {0, 2}
    queue = queue_of(commits, 3)
    assert (queue.take(), queue.listed, queue.finished) == (None, False, False)
    see(queue, commits)
    assert (queue.take(), queue.take(), queue.finished) == (1, None, False)
    queue.done(1)
    assert queue.finished


def test_a_shard_of_a_dead_replica_comes_again_first_unless_another_box_has_committed_it() -> None:
    commits = set[int]()
    queue = queue_of(commits, 9, 0, 3)
    see(queue, commits)
    assert [queue.take() for _ in range(3)] == [0, 1, 2]
    queue.put_back(1)
    queue.put_back(2)
    commits.add(1)
    see(queue, commits)
    assert queue.take() == 2


def test_who_may_not_have_a_shard_is_given_the_next_and_it_keeps_its_place() -> None:
    queue = queue_of(set(), 6, 0, 2)
    see(queue, set())
    assert [queue.take(), queue.take()] == [0, 1]
    queue.put_back(0)
    queue.put_back(1)
    assert queue.again == [0, 1]
    assert queue.take(lambda shard: shard > 1) == 2
    assert queue.again == [0, 1]
    assert queue.take(lambda shard: shard == 1) == 1
    assert [queue.take(lambda shard: False), queue.take(), queue.again] == [None, 0, []]


def test_a_store_that_does_not_answer_stops_no_loop_and_is_not_asked_twice_at_once() -> None:
    answer, asked = threading.Event(), []

    def ask() -> set[int]:
        asked.append(1)
        answer.wait(60)
        return {0}

    queue = ShardQueue([0], Listing(ask, 0, ignore, pause_s=0))
    for _ in range(1000):
        queue.refresh()
    assert (queue.take(), len(asked)) == (None, 1)
    answer.set()
    see(queue, {0})
    assert queue.finished


def test_listings_take_a_tenth_of_the_time_at_most() -> None:
    spans = list[tuple[float, float]]()

    def ask() -> set[int]:
        began = time.monotonic()
        time.sleep(0.05)
        spans.append((began, time.monotonic()))
        return set()

    queue = ShardQueue([0], Listing(ask, 0, ignore, pause_s=0))

    def three() -> bool:
        queue.refresh()
        return len(spans) == 3

    until(three)
    rests = [later - ended for (_, ended), (later, _) in zip(spans, spans[1:], strict=False)]
    assert all(rest >= 9 * 0.05 for rest in rests)


def test_a_store_that_comes_back_is_waited_for_and_one_that_does_not_is_told_of() -> None:
    away, said = [True], list[str]()

    def ask() -> set[int]:
        if away[0]:
            raise RetryLater("cannot list: SlowDown", where="s3://b/x")
        return {0}

    patient = ShardQueue([0], Listing(ask, 60, said.append, pause_s=0))

    def told() -> bool:
        patient.refresh()
        return bool(said)

    until(told)
    assert patient.take() is None
    away[0] = False
    see(patient, {0})
    assert said[0] == "s3://b/x: cannot list: SlowDown; trying again for 1m00s"
    assert said[1].startswith("the store is back after")

    away[0] = True
    hasty = ShardQueue([0], Listing(ask, 0, ignore, pause_s=0))
    with pytest.raises(RetryLater, match="SlowDown"):
        see(hasty, {0})


def test_it_knows_the_commits_of_a_real_dataset(tmp_path: Path) -> None:
    writer = create_dataset(str(tmp_path / "dataset"), make_plan(4))
    writer.commit(2, make_shard(2))
    queue = ShardQueue.of(writer, 1, 2, patience_s=1, say=ignore)
    see(queue, {2})
    assert queue.take() == 3
    assert (queue.committed, queue.total) == (1, 4)
    queue.close()
