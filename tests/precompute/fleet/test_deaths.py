"""Which slots get another engine, after so many of theirs have died."""

import pytest

from common.errors import RetryLater
from precompute.fleet.deaths import FAILED_STARTS, Deaths
from precompute.fleet.replica import Slot

MOST = 5
BAD, GOOD = Slot("0", (0,)), Slot("1", (1,))


def die(deaths: Deaths, slot: Slot, times: int, *, loading: bool = False) -> None:
    for _ in range(times):
        deaths.died(slot, loading=loading, why="SIGKILL", said="what it last said")


def test_a_slot_on_which_no_engine_starts_is_given_up_and_the_others_are_not() -> None:
    deaths = Deaths(MOST)
    die(deaths, BAD, FAILED_STARTS, loading=True)
    assert deaths.hopeless(BAD) and not deaths.hopeless(GOOD)
    deaths.require_hope([BAD, GOOD])


def test_engines_of_many_slots_that_fail_to_start_together_are_started_again() -> None:
    deaths = Deaths(MOST)
    slots = [Slot(str(number), (number,)) for number in range(8)]
    for slot in slots:
        die(deaths, slot, 1, loading=True)
    assert not any(map(deaths.hopeless, slots))


def test_a_slot_is_given_up_for_its_own_deaths_whatever_the_others_commit() -> None:
    deaths = Deaths(MOST)
    for _ in range(MOST + 1):
        die(deaths, BAD, 1)
        deaths.committed(GOOD)
    assert deaths.hopeless(BAD)


def test_a_slot_that_commits_is_well_again() -> None:
    deaths = Deaths(MOST)
    for _ in range(3):
        die(deaths, GOOD, MOST)
        deaths.committed(GOOD)
    assert not deaths.hopeless(GOOD) and deaths.of(GOOD) == 3 * MOST


def test_engines_that_come_to_work_in_between_are_no_failed_starts() -> None:
    deaths = Deaths(MOST)
    for _ in range(2):
        die(deaths, GOOD, FAILED_STARTS - 1, loading=True)
        die(deaths, GOOD, 1)
        deaths.convicted()
        deaths.finished()
    assert not deaths.hopeless(GOOD)


def test_rows_that_engines_die_of_count_for_no_slot_while_other_rows_get_done() -> None:
    deaths = Deaths(MOST)
    for _ in range(10):
        die(deaths, GOOD, MOST)
        deaths.convicted()
        deaths.finished()
    assert not deaths.hopeless(GOOD)


def test_a_slot_that_kills_whatever_it_is_given_is_given_up_though_rows_are_blamed() -> None:
    """Else a broken GPU would have row after row rejected, each for the price of some starts."""
    deaths = Deaths(MOST)
    die(deaths, BAD, MOST)
    deaths.convicted()
    die(deaths, BAD, MOST)
    deaths.convicted()
    die(deaths, BAD, 1)
    assert deaths.hopeless(BAD)


def test_hope_beside_a_slot_is_another_that_is_not_given_up() -> None:
    deaths = Deaths(MOST)
    assert deaths.hope_beside(BAD, [BAD, GOOD]) and not deaths.hope_beside(BAD, [BAD])
    die(deaths, GOOD, FAILED_STARTS, loading=True)
    assert not deaths.hope_beside(BAD, [BAD, GOOD]) and deaths.hope_beside(GOOD, [BAD, GOOD])


def test_the_job_ends_with_its_last_slot_and_says_what_the_last_engine_died_of() -> None:
    deaths = Deaths(MOST)
    for slot in (BAD, GOOD):
        die(deaths, slot, FAILED_STARTS, loading=True)
    with pytest.raises(RetryLater, match=r"6 engines died one after another.*SIGKILL.*what it last said"):
        deaths.require_hope([BAD, GOOD])
    deaths.require_hope([])
