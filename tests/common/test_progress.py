import io
import re
import threading
import time

import pytest

from common import progress
from common.progress import BYTES, Progress, duration, followed, size, waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Watched(io.StringIO):
    """A pipe whose reader can wait for the first line."""

    def __init__(self) -> None:
        super().__init__()
        self.told = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        self.told.set()
        return written


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own wishes about colours stay out of the tests."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def shown(stream: io.StringIO) -> list[str]:
    """What was drawn, one text a drawing, without the terminal's codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()


def test_elsewhere_than_on_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    with Progress("rollouts", total=4, unit="tok", done=1, stream=stream) as progress:
        progress.advance(3, 3000)

    first, last = stream.getvalue().splitlines()
    assert first.startswith("rollouts: 1/4 (25%)") and "time left unknown" in first
    assert last.startswith("rollouts: 4/4 (100%)") and "tok/s" in last
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_wants_no_colours_gets_plain_lines(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    stream = Terminal()
    with Progress("score", total=2, unit="tok", stream=stream) as progress:
        progress.advance(2, 10)

    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines()[-1].startswith("score: 2/2 (100%)")


def test_on_a_terminal_one_line_is_redrawn() -> None:
    stream = Terminal()
    with Progress("score [1]", total=2, unit="tok", stream=stream) as progress:
        progress.advance(2, 10)

    assert stream.getvalue().count("\n") == 1
    assert "score [1]" in shown(stream)[-1] and "2/2 (100%)" in shown(stream)[-1]
    assert "took" in shown(stream)[-1]


def test_on_a_terminal_an_interruption_leaves_the_cursor_as_it_was() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress("score", total=2, unit="tok", stream=stream):
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_bytes_are_counted_in_units_of_people() -> None:
    stream = io.StringIO()
    with Progress("copy", total=3_000_000, unit=BYTES, stream=stream) as progress:
        progress.advance(1_500_000, 1_500_000)

    assert stream.getvalue().splitlines()[-1].startswith("copy: 1.5 MB/3.0 MB (50%), ")
    assert re.search(r"B/s, took \d+s", stream.getvalue())


def test_nothing_to_do_is_done() -> None:
    stream = io.StringIO()
    with Progress("score", total=0, unit="tok", stream=stream):
        pass
    assert "0/0 (100%)" in stream.getvalue()


def test_a_step_of_unknown_length_is_announced_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    stream = Watched()
    with waiting("listing s3://bucket", stream):
        assert stream.told.wait(30)
    assert stream.getvalue() == "listing s3://bucket...\n"


def test_a_short_step_is_not_announced() -> None:
    stream = io.StringIO()
    with waiting("listing", stream):
        pass
    assert stream.getvalue() == ""


def test_on_a_terminal_a_step_of_unknown_length_spins() -> None:
    stream = Terminal()
    with waiting("listing [all]", stream):
        pass
    assert "listing [all]" in "".join(shown(stream))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3600, "1h00m"), (90061, "25h01m")]
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (12_345_678, "12.3 MB"),
     (5.5e9, "5.5 GB"), (2e15, "2000.0 TB")],
)  # fmt: skip
def test_sizes_are_read_at_a_glance(count: float, text: str) -> None:
    assert size(count) == text


def test_a_brief_job_leaves_nothing_behind() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with Progress("verifying", total=2, unit="tok", stream=stream, brief=True) as progress:
            progress.advance(2, 10)
    assert plain.getvalue() == ""
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is wiped


def test_a_brief_job_that_lasts_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    stream = Watched()
    with Progress("verifying", total=2, unit="tok", stream=stream, brief=True) as job:
        assert stream.told.wait(30)
        job.advance(2, 10)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("verifying: 0/2 (0%)") and last.startswith("verifying: 2/2 (100%)")


def test_items_are_handed_through_as_they_are_counted() -> None:
    assert list(followed(iter("abc"), "reading", 3, "letters")) == ["a", "b", "c"]


def test_a_job_within_a_job_is_drawn_below_it() -> None:
    stream = Terminal()
    with Progress("datasets", total=1, unit="datasets", stream=stream) as outer:
        with Progress("commits", total=2, unit="commits", stream=stream, brief=True):
            deadline = time.monotonic() + 30
            while "commits ━" not in stream.getvalue().replace("\x1b[90m", "") and time.monotonic() < deadline:
                time.sleep(0.01)
        outer.advance(1, 1)
    texts = shown(stream)
    below = next(index for index, text in enumerate(texts) if "commits" in text)
    assert "datasets" in texts[below - 1]
    assert "datasets" in texts[-1] and "1/1 (100%)" in texts[-1]
