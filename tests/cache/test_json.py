"""One vocabulary: a program that reads the JSON of one command knows the words of all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.cache import cli
from common.records import commit_key
from common.storage import Store
from tests.cache.datasets import flip, lopd, make_dataset, orphan

OTHER_LISTS = {"garbage", "made_from", "unread"}
"""Lists whose names have no plural."""
COUNTS = {"rows", "tokens", "bytes", "shards", "shards_committed", "prompt_tokens", "rows_rejected"}
STATES = {"complete", "unfinished", "damaged"}
OLD_WORDS = {"committed", "finished", "sampled_by", "scored_by", "policy", "size"}


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A finished dataset with an orphan, one that is not finished, and a damaged one."""
    make_dataset(str(tmp_path / "all" / "done"))
    orphan(Store(str(tmp_path / "all" / "done")), 1)
    make_dataset(str(tmp_path / "all" / "begun"), committed=[0])
    make_dataset(str(tmp_path / "all" / "broken"))
    flip(Store(str(tmp_path / "all" / "broken")), commit_key(1))
    Store(str(tmp_path / "all" / "broken")).remove(Store(str(tmp_path / "all" / "broken")).list("data")[0].name)
    return tmp_path


COMMANDS = {
    "ls": ["all"],
    "status": ["all/done"],
    "inspect": ["all/done"],
    "copy": ["all/done", "copy"],
    "export": ["all/done", "--format", "jsonl", "--output", "rows.jsonl"],
    "gc": ["all", "--older-than", "0s"],
    "verify": ["all/done"],
}


def said(places: Path, command: str, *arguments: str) -> dict[str, Any]:
    """The JSON of a command; arguments that name something of `places` are made absolute."""
    full = [str(places / one) if not one.startswith("--") and one not in ("0s", "jsonl") else one for one in arguments]
    return lopd("cache", command, *full, "--json").json


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value, at any depth outside of a plan's own settings."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key, inner
        yield from pairs(inner) if key not in ("template", "sampling", "lineage", "statistics") else ()
    for inner in value if isinstance(value, list) else ():
        yield from pairs(inner)


def test_every_command_is_looked_at() -> None:
    assert {*COMMANDS} == {*cli.group.commands}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_one_vocabulary(command: str, places: Path) -> None:
    value = said(places, command, *COMMANDS[command])
    assert isinstance(value, dict)
    for key, inner in pairs(value):
        assert key not in OLD_WORDS
        if key == "state":
            assert inner in STATES
        if key in ("model", "teacher"):
            assert inner is None or isinstance(inner, str)
        if key in ("policy_identity", "teacher_identity"):
            assert command == "inspect" and isinstance(inner, dict)
        if key in COUNTS:
            assert isinstance(inner, int)
        if isinstance(inner, list):
            assert key.endswith("s") or key in OTHER_LISTS


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("ls", {"datasets"}),
        ("gc", {"datasets"}),
        ("status", {"state", "model", "teacher", "rows", "tokens", "bytes", "shards", "shards_committed"}),
        ("inspect", {"facts", "samples"}),
        ("copy", {"shards", "bytes", "shards_copied", "bytes_copied", "altered_records"}),
        ("export", {"rows", "tokens", "bytes"}),
        ("verify", {"sound", "state", "findings", "rows", "tokens", "bytes", "shards", "shards_committed"}),
    ],
)
def test_the_words_that_programs_rely_on_are_there(command: str, keys: set[str], places: Path) -> None:
    assert keys <= said(places, command, *COMMANDS[command]).keys()


def test_all_commands_call_one_dataset_the_same(places: Path) -> None:
    listed = {one["path"]: one for one in said(places, "ls", "all")["datasets"]}
    assert {path: one["state"] for path, one in listed.items()} == {
        "begun": "unfinished",
        "broken": "damaged",
        "done": "complete",
    }
    for path, one in listed.items():
        status, verdict = said(places, "status", f"all/{path}"), said(places, "verify", f"all/{path}")
        assert status["state"] == verdict["state"] == one["state"]
        assert status["shards"] == verdict["shards"] == one["shards"]
        assert status["shards_committed"] == verdict["shards_committed"] == one["shards_committed"]
        assert (status["model"], status["teacher"]) == (one["model"], one["teacher"]) == ("org/model", "org/model")
    facts = said(places, "inspect", "all/done")["facts"]
    same = ("state", "model", "teacher", "rows", "tokens", "shards", "kind", "manifest_sha256")
    assert {key: facts[key] for key in same} == {key: listed["done"][key] for key in same}
