import io
from collections.abc import Mapping

import pytest
from rich.cells import cell_len
from rich.console import Console

from precompute.fleet.frame import frame
from precompute.fleet.status import Status
from tests.precompute.fleet.statuses import make_replica, make_status, starting


def drawn(status: Status, width: int = 80, height: int = 24, seconds: Mapping[str, float] | None = None) -> list[str]:
    """The picture as lines of text."""
    console = Console(file=io.StringIO(), width=width, height=height, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(frame(status, seconds or {}, "*", width, height))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_picture_holds_all_that_is_asked_while_it_runs() -> None:
    head, bar, speed, checks, names, first, second = drawn(make_status(deaths=2, rejected=1))
    assert head == "* scoring s3://bucket/run1/scored: running, 10m00s"
    assert bar.endswith("12/64 shards, 806/4,096 rows (20%)")
    assert speed == "  3,401 tok/s, 32m00s left, cost 4.20, 3.1% truncated"
    assert checks == "  self-test 0.0012 nats, 2 deaths, 1 rejected"
    assert names.split() == ["replica", "on", "state", "rows", "in", "shards", "tok/s"]
    assert first.split() == ["0", "0,1", "running", "256", "12", "20", "1,700"]
    assert second.split() == ["1", "2,3", "running", "256", "12", "20", "1,700"]


def test_an_engine_that_loads_shows_for_how_long() -> None:
    assert "loading 1m15s" in drawn(starting(), seconds={"0": 75.0})[-2]


def test_an_engine_that_has_gone_silent_is_seen_before_it_is_killed() -> None:
    silent, loading = make_replica(beat_age_s=25.0), make_replica("1", state="loading", beat_age_s=25.0)
    lines = drawn(make_status(replicas=(silent, loading)))
    assert "no beat 25s" in lines[-2] and "no beat" not in lines[-1]


def test_engines_that_died_say_how_often() -> None:
    assert drawn(make_status(replicas=(make_replica(deaths=3),)))[-1].endswith("3†")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_wider_than_80_columns_or_than_a_wider_terminal(width: int) -> None:
    replica = make_replica(
        "節点" * 40, devices="0,1,2,3,4,5,6,7", shards=(123456, 123457, 3), tokens_per_s=123456.7, deaths=12
    )
    big = make_status(
        url="s3://" + "x" * 300,
        state="draining",
        reason="y" * 300,
        shards_total=123456,
        rows_total=12345678,
        cost=1e6,
        deaths=10**6,
        storage_retries=10**6,
        replicas=(replica,),
    )
    assert max(cell_len(line) for line in drawn(big, width)) <= width


def test_of_more_engines_than_lines_the_rest_is_counted() -> None:
    lines = drawn(make_status(replicas=tuple(make_replica(str(index)) for index in range(100))))
    assert len(lines) < 24
    shown = len(lines) - 6  # the lines above them, and the one that counts
    assert lines[-1].strip() == f"and {100 - shown} more"


def test_when_it_is_over_only_the_result_stays() -> None:
    lines = drawn(make_status(state="complete", shards_done=64, rows_done=4096))
    assert lines[0].startswith("✓ scoring") and "100%" in lines[1]
    assert not any("replica" in line for line in lines)


def test_words_of_strangers_do_not_reach_the_terminal_as_they_are() -> None:
    evil = make_replica("\x1b[2J", devices="\x9b31m", detail="\x1b")
    text = "".join(drawn(make_status(url="s3://b/\x1b]0;x\x07", reason="a\rb\x1b[31m", replicas=(evil,))))
    assert text.isprintable()
