"""Deaths of engines, played out on rows of which some are poison: they are found, and no other is."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.fleet.replica import Slot
from precompute.fleet.suspects import GUILTY, Suspects

ROWS_A_SHARD = 8
ONE, OTHER = Slot("0", (0,)), Slot("1", (1,))


def play(
    rows: int, poison: set[str], window: int, chance: random.Random, slots: tuple[Slot, ...] = (ONE,)
) -> tuple[list[str], int]:
    """Engines that take rows, finish them in any order and die of poison; returns the rejected and the deaths.

    After a death the rows go to the next of the slots.
    """
    suspects, done, rejected, deaths = Suspects(), set[str](), list[str](), 0
    shard_of = {f"r{row}": row // ROWS_A_SHARD for row in range(rows)}
    while left := [uid for uid in shard_of if uid not in done and uid not in rejected]:
        trials = {shard: trial for shard in shard_of.values() if (trial := suspects.trial(shard))}
        tried = [uid for trial in trials.values() for uid in trial.uids if uid in left]
        stages = [(tried, min((trial.window for trial in trials.values()), default=window))]
        stages.append(([uid for uid in left if uid not in tried], window))
        inside: list[str] = []
        for waiting, width in stages:
            while waiting or inside:
                inside += [waiting.pop(0) for _ in range(min(width - len(inside), len(waiting)))]
                if poison & {*inside} and chance.random() < 0.5:
                    break
                uid = chance.choice([each for each in inside if each not in poison] or inside)
                if uid in poison:
                    break
                inside.remove(uid)
                done.add(uid)
                suspects.acquit([uid])
            if inside:
                break
        if not inside:
            continue
        slot = slots[deaths % len(slots)]
        deaths += 1
        guilty = suspects.died({uid: shard_of[uid] for uid in inside}, slot, elsewhere=len(slots) > 1)
        rejected += [guilty] if guilty else []
        done = {uid for uid in done if all(shard_of[uid] != shard_of[each] for each in inside)}  # lost with the engine
        assert deaths < 100
    return rejected, deaths


@given(
    *(st.integers(1, 60), st.sets(st.integers(0, 59), max_size=3), st.integers(1, 32), st.integers(0, 2**32)),
    st.sampled_from([(ONE,), (ONE, OTHER)]),
)
def test_poison_is_rejected_and_nothing_else_is(
    rows: int, bad: set[int], window: int, seed: int, slots: tuple[Slot, ...]
) -> None:
    poison = {f"r{row}" for row in bad if row < rows}
    rejected, _ = play(rows, poison, window, random.Random(seed), slots)
    assert sorted(rejected) == sorted(poison)


@pytest.mark.parametrize(("slots", "most"), [((ONE,), 7), ((ONE, OTHER), 8)])
def test_one_poison_among_512_rows_costs_few_engines(slots: tuple[Slot, ...], most: int) -> None:
    assert max(play(512, {f"r{seed}"}, 512, random.Random(seed), slots)[1] for seed in range(20)) <= most


def test_a_row_alone_in_an_engine_that_is_killed_once_is_not_rejected() -> None:
    suspects = Suspects()
    assert suspects.died({"r0": 0}, ONE, elsewhere=False) is None
    assert suspects.trial(0) is not None


def test_a_row_that_dies_on_one_slot_alone_is_not_rejected_while_it_can_be_tried_on_another() -> None:
    suspects = Suspects()
    for _ in range(3 * GUILTY):
        assert suspects.died({"r0": 0}, ONE, elsewhere=True) is None
    trial = suspects.trial(0)
    assert trial is not None and trial.slot == ONE
    assert suspects.died({"r0": 0}, OTHER, elsewhere=True) == "r0"


def test_company_on_another_slot_is_no_proof() -> None:
    """Else a slot that is broken would convict a row that once was beside poison elsewhere."""
    suspects = Suspects()
    suspects.died({"r0": 0, "r1": 0}, OTHER, elsewhere=True)
    for _ in range(GUILTY):
        assert suspects.died({"r0": 0}, ONE, elsewhere=True) is None


def test_when_no_other_slot_is_left_the_deaths_on_one_are_proof() -> None:
    suspects = Suspects()
    for _ in range(GUILTY):
        assert suspects.died({"r0": 0}, ONE, elsewhere=True) is None
    assert suspects.died({"r0": 0}, ONE, elsewhere=False) == "r0"


def test_a_row_that_finished_in_between_is_innocent() -> None:
    suspects = Suspects()
    for _ in range(3 * GUILTY):
        assert suspects.died({"r0": 0}, ONE, elsewhere=False) is None
        suspects.acquit(["r0"])


@pytest.mark.parametrize(("rows", "window"), [(512, 128), (7, 1), (1, 1)])
def test_suspects_go_again_a_quarter_as_many_at_once(rows: int, window: int) -> None:
    suspects = Suspects()
    suspects.died({f"r{row}": row % 2 for row in range(rows)}, ONE, elsewhere=True)
    trial = suspects.trial(0)
    assert trial is not None and trial.window == window
    assert trial.uids == tuple(f"r{row}" for row in range(0, rows, 2))


def test_a_committed_shard_has_no_suspects() -> None:
    suspects = Suspects()
    suspects.died({"r0": 0, "r1": 1}, ONE, elsewhere=True)
    suspects.committed(0)
    assert suspects.trial(0) is None and suspects.trial(1) is not None
