"""What is drawn on a terminal and what goes into a pipe, by the real command in a real pseudo-terminal."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.storage import Store
from common.terminal import say_json
from tests.cache.datasets import flip, lopd, make_dataset, orphan
from tests.common.scripts import ROOT

pytestmark = pytest.mark.slow


def on_terminal(*arguments: str, columns: int = 160, **variables: str) -> str:
    """What `lopd <arguments>` draws on a terminal of so many columns."""
    master, slave = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    environment = kept | {"TERM": "xterm-256color", "COLUMNS": str(columns)} | variables
    command = [sys.executable, "-m", "common.cli", *arguments]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT)
    os.close(slave)
    drawn = b""
    while True:
        try:
            some = os.read(master, 1 << 16)
        except OSError:  # Linux says so when the last writer has closed the terminal
            break
        if not some:
            break
        drawn += some
    os.close(master)
    process.wait()
    return drawn.decode()


@pytest.fixture
def datasets(tmp_path: Path) -> str:
    make_dataset(str(tmp_path / "whole"))
    make_dataset(str(tmp_path / "begun"), committed=[0])
    make_dataset(str(tmp_path / "broken"))
    flip(Store(str(tmp_path / "broken")), "MANIFEST.json")
    orphan(Store(str(tmp_path / "whole")), 1)
    return str(tmp_path)


def test_a_terminal_gets_colours_and_a_pipe_the_same_words_without(datasets: str) -> None:
    drawn, piped = on_terminal("cache", "ls", datasets), lopd("cache", "ls", datasets).out
    assert "\x1b[31m" in drawn and "\x1b[33m" in drawn  # the broken one red, the unfinished one yellow
    assert "\x1b" not in piped
    for word in ("whole", "complete", "1/3 shards", "damaged: MANIFEST.json", "org/model"):
        assert word in drawn and word in piped


@pytest.mark.parametrize("wish", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_plain_lines_gets_them(datasets: str, wish: dict[str, Any]) -> None:
    for words in (("ls", datasets), ("status", f"{datasets}/begun"), ("verify", f"{datasets}/whole")):
        assert "\x1b" not in on_terminal("cache", *words, **wish)


def test_on_a_narrow_terminal_nothing_is_cut_off(datasets: str) -> None:
    drawn = on_terminal("cache", "status", f"{datasets}/begun", columns=40)
    assert f"--cache {datasets}/begun" in drawn.replace("\r\n", "")


def test_a_table_too_wide_for_the_terminal_becomes_blocks_with_every_word_whole(datasets: str) -> None:
    lines = [line.split() for line in on_terminal("cache", "ls", datasets, columns=60).splitlines()]
    assert ["\x1b[2mmodel", "\x1b[0m", "org/model"] in lines


def test_json_is_one_line_on_a_terminal_too(datasets: str) -> None:
    drawn = on_terminal("cache", "ls", datasets, "--json", columns=40)
    [line] = [line for line in drawn.splitlines() if '"path"' in line]
    assert line.rpartition("[{")[2].endswith("}]}")


def test_json_obeys_no_terminal_and_can_be_written_whatever_a_name_holds(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"name": "\x9b2J\u202e\ud800漢"})
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out) == {"name": "\x9b2J\u202e\ud800漢"}


def test_findings_are_red_and_orphans_yellow(datasets: str) -> None:
    drawn = on_terminal("cache", "verify", f"{datasets}/broken")
    assert "\x1b[31mMANIFEST.json: " in drawn
    assert "\x1b[33mnote: 1 orphans" in on_terminal("cache", "verify", f"{datasets}/whole")
