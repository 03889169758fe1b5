import io

import pytest

from common.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    with Progress("rollouts", total=4, unit="tok", done=1, stream=stream) as progress:
        progress.advance(3, 3000)

    first, last = stream.getvalue().splitlines()
    assert first.startswith("rollouts: 1/4 (25%)") and "time left unknown" in first
    assert last.startswith("rollouts: 4/4 (100%)") and "tok/s" in last
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_one_line_is_redrawn() -> None:
    stream = Terminal()
    with Progress("score", total=2, unit="tok", stream=stream) as progress:
        progress.advance(2, 10)

    assert stream.getvalue().count("\n") == 1
    assert "2/2 (100%)" in stream.getvalue()


def test_nothing_to_do_is_done() -> None:
    stream = io.StringIO()
    with Progress("score", total=0, unit="tok", stream=stream):
        pass
    assert "0/0 (100%)" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3600, "1h00m"), (90061, "25h01m")]
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text
