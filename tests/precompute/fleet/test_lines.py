import pytest

from precompute.fleet.lines import changes, line_of
from tests.precompute.fleet.statuses import make_replica, make_status, starting


def test_a_line_says_how_far_how_fast_and_how_long_it_takes_yet() -> None:
    assert line_of(make_status(), {}) == ("12/64 shards (19%), 3,401 tok/s, 32m00s left, cost 4.20, 3.1% truncated")


def test_a_line_from_before_the_first_token_says_what_is_waited_for_and_how_long_already() -> None:
    assert line_of(starting(), {"0": 75.0, "1": 2.0}) == (
        "starting, 0/64 shards (0%), 3s so far, replicas: 1 loading (1m15s), 1 starting (2s)"
    )


def test_a_line_tells_the_engines_that_do_not_run_from_those_that_do() -> None:
    replicas = (make_replica("0"), make_replica("1", state="loading"), make_replica("2", state="loading"))
    assert "1 of 3 replicas running, 2 loading (40s)" in line_of(make_status(replicas=replicas), {"1": 40.0, "2": 3.0})


def test_a_line_counts_what_went_wrong_and_nothing_that_did_not() -> None:
    line = line_of(make_status(deaths=1, rejected=2, storage_retries=3), {})
    assert line.endswith("3.1% truncated, 1 death, 2 rejected, 3 storage retries")
    assert "death" not in line_of(make_status(), {})


def test_what_is_not_known_is_not_made_up() -> None:
    line = line_of(make_status(eta_s=None, cost=None, truncated=None), {})
    assert line == "12/64 shards (19%), 3,401 tok/s, time left unknown"


@pytest.mark.parametrize("state", ["complete", "stopped", "failed"])
def test_the_last_line_says_how_it_ended(state: str) -> None:
    line = line_of(make_status(state=state, reason="as asked"), {})
    assert line.startswith(f"{state}, 12/64 shards (19%), 1,624,690 tokens here, took 10m00s")
    assert line.endswith(": as asked") and "left" not in line


def test_engines_that_come_to_one_state_together_are_told_in_one_line() -> None:
    assert changes(starting(), make_status()) == ["replicas 0 (0,1), 1 (2,3): running"]
    many = tuple(make_replica(str(index)) for index in range(9))
    assert changes(None, make_status(replicas=many))[0].endswith("3 (0,1) and 5 more: running")


def test_a_new_state_is_told_with_its_detail_and_once() -> None:
    loads = make_status(replicas=(make_replica(state="loading", detail="org/teacher"),))
    assert changes(None, loads) == ["replica 0 (0,1): loading, org/teacher"]
    assert changes(loads, loads) == []


@pytest.mark.parametrize("turn", ["idle", "storing", "draining"])
def test_turns_of_an_engine_that_runs_are_not_told(turn: str) -> None:
    other = make_status(replicas=(make_replica("0", state=turn), make_replica("1")))
    assert changes(make_status(), other) == changes(other, make_status()) == []


@pytest.mark.parametrize("wait", ["idle", "storing"])
def test_an_engine_that_comes_to_its_first_rows_by_way_of_waiting_is_told(wait: str) -> None:
    waits = make_status(replicas=(make_replica("0", state=wait, rows=0, in_engine=0), make_replica("1")))
    assert changes(waits, make_status()) == ["replica 0 (0,1): running"]


def test_words_of_strangers_do_not_reach_the_terminal_as_they_are() -> None:
    evil = make_replica("\x1b[2J", devices="\x1b]0;x\x07", state="loading", detail="a\nb\x1b[31m")
    said = [*changes(None, make_status(replicas=(evil,))), line_of(make_status(reason="\x1b[2J\n"), {})]
    assert all(text.isprintable() for text in said) and len(said) == 2
