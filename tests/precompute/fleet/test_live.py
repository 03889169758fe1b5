import io
import re

import pytest

from precompute.fleet.live import LINE_EVERY_S, View
from tests.precompute.fleet.statuses import make_replica, make_status, starting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own wishes about colours stay out of the tests."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def shown(stream: io.StringIO) -> str:
    """What was drawn, without the terminal's codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")


def test_elsewhere_than_on_a_terminal_a_line_comes_at_a_change_and_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with View("score", stream, clock) as view:
        view.show(starting())
        for _ in range(4):
            clock.now += LINE_EVERY_S / 4
            view.show(starting())
        view.show(make_status())
        view.show(make_status(tokens=2_000_000))
        view.show(make_status(state="complete"))

    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "scoring: starting",
        "scoring: replica 0 (0",
        "scoring: starting",
        "scoring: starting",
        "scoring: replicas 0 (0",
        "scoring: 12/64 shards (19%)",
        "scoring: complete",
    ]
    assert "1 loading (10s)" in stream.getvalue().splitlines()[3]


def test_the_time_in_a_state_begins_anew_with_each_state() -> None:
    stream, clock = io.StringIO(), Clock()
    with View("score", stream, clock) as view:
        for state, seconds in (("loading", 50.0), ("testing", 12.0)):
            replica = make_replica(state=state)
            view.show(starting(replicas=(replica,)))
            clock.now += seconds
            view.show(starting(replicas=(replica,)))

    assert "1 loading (50s)" in stream.getvalue() and "1 testing (12s)" in stream.getvalue()


def test_a_line_in_between_is_one_line_of_the_phase() -> None:
    stream = io.StringIO()
    with View("rollouts", stream) as view:
        view.say("replica 0 died: \x1b[2J\nout of memory")
    assert stream.getvalue().splitlines()[-1] == "sampling rollouts: replica 0 died: ␛[2J↵out of memory"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_wants_no_colours_gets_plain_lines(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    stream = Terminal()
    with View("score", stream) as view:
        view.show(make_status())
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_shows_life_before_there_is_a_status() -> None:
    stream = Terminal()
    with View("sft_data", stream):
        pass
    assert "sampling answers: starting" in shown(stream)


def test_on_a_terminal_the_last_picture_stays_below_the_lines_in_between() -> None:
    stream = Terminal()
    with View("score", stream) as view:
        view.show(make_status())
        view.say("replica 1 died: \x1b[2JSIGKILL", "yellow")
        view.show(make_status(state="complete", shards_done=64, rows_done=4096))

    text = shown(stream)
    assert "scoring: replica 1 died: ␛[2JSIGKILL" in text
    assert text.rindex("✓ scoring s3://bucket/run1/scored: complete") > text.index("died")


def test_on_a_terminal_an_interruption_leaves_the_cursor_as_it_was() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), View("score", stream):
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
