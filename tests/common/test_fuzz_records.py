"""Records that nobody wrote: every way to open them ends with the rows that were written or with an error of ours."""

import copy
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.canonical import seal, sha256
from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.errors import LopdError
from common.records import commit_key
from common.schema import to_rows
from tests.common.rows import make_dataset, make_plan, make_shard, same_rows

pytestmark = pytest.mark.slow

SHARDS = 2
PLAN, MANIFEST = "plan.json", "MANIFEST.json"
HUGE = [2**31, 2**53 + 1, 2**63, 2**64, 10**400, -1, -(2**63), -(10**400)]
TEXTS = ["", "\ud800", "\x00", "../../etc/passwd", "s3://elsewhere/x", "NaN", "é" * 10_000]
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(HUGE),
    st.floats(),  # NaN and the infinities among them
    st.text(max_size=20),
    st.sampled_from(TEXTS),
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset in a local folder."""
    return Path(make_dataset(str(tmp_path_factory.mktemp("fuzz") / "dataset"), SHARDS, topk=2))


class Altered:
    """Files of a dataset with other content for the length of a `with`."""

    def __init__(self, folder: Path, **files: bytes) -> None:
        self._files = {folder / name: data for name, data in files.items()}

    def __enter__(self) -> None:
        self._were = {file: file.read_bytes() for file in self._files}
        for file, data in self._files.items():
            file.write_bytes(data)

    def __exit__(self, *_: object) -> None:
        for file, data in self._were.items():
            file.write_bytes(data)


def open_and_read(folder: Path) -> None:
    """Read all rows; they are those of the dataset, or it is an error of ours."""
    try:
        dataset = open_dataset(str(folder))
        tables = [dataset.read_shard(shard) for shard in range(dataset.num_shards)]
    except LopdError as error:
        assert_harmless(error)
        return
    assert len(tables) == SHARDS
    for shard, table in enumerate(tables):
        assert same_rows(to_rows(table), to_rows(make_shard(shard, topk=2)))


def join(folder: Path) -> None:
    """Join the dataset as a worker does, see what is left, and finish it."""
    try:
        writer = create_dataset(str(folder), make_plan(SHARDS, topk=2))
        assert writer.pending() == []
        writer.finalize()
    except LopdError as error:
        assert_harmless(error)


def assert_harmless(error: LopdError) -> None:
    """It can be printed, and no terminal obeys it."""
    obeyed = {character for character in str(error) if unicodedata.category(character) in ("Cc", "Cs")}
    assert obeyed <= {"\n", "\t"}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of every object and list in `value`."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


@st.composite
def altered(draw: st.DrawFn, record: dict[str, Any]) -> dict[str, Any]:
    """The record with one to three values exchanged, lost, added, doubled or moved."""
    changed = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(changed))
        if not found:
            break
        holder, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["exchange", "step", "lose", "add", "move"])):
            case "exchange":
                holder[key] = draw(VALUES)
            case "step" if isinstance(holder[key], int):
                holder[key] += draw(st.sampled_from([-1, 1, 2**32]))
            case "lose":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = draw(VALUES)
            case "add":
                holder.append(copy.deepcopy(holder[key]))
            case "move":
                other, place = draw(st.sampled_from(found))
                holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else (other or [None])[0])
    return changed


def sealed(record: dict[str, Any]) -> bytes:
    """The record under a seal that fits, as far as it can be written at all."""
    try:
        return seal(record)
    except ValueError:  # NaN, or half a surrogate pair
        digest = sha256(json.dumps(record, sort_keys=True).encode())
        return json.dumps({**record, "seal": digest}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def read_record(folder: Path, name: str) -> dict[str, Any]:
    record = json.loads((folder / name).read_bytes())
    del record["seal"]
    return record


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_manifest(dataset: Path, data: st.DataObject) -> None:
    manifest = data.draw(altered(read_record(dataset, MANIFEST)))
    with Altered(dataset, **{MANIFEST: sealed(manifest)}):
        open_and_read(dataset)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_plan_under_a_manifest_that_names_it(dataset: Path, data: st.DataObject) -> None:
    plan = sealed(data.draw(altered(read_record(dataset, PLAN))))
    manifest = read_record(dataset, MANIFEST) | {"plan_sha256": sha256(plan)}
    with Altered(dataset, **{PLAN: plan, MANIFEST: sealed(manifest)}):
        open_and_read(dataset)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_plan_of_a_dataset_that_is_being_made(dataset: Path, data: st.DataObject) -> None:
    with Altered(dataset, **{PLAN: sealed(data.draw(altered(read_record(dataset, PLAN))))}):
        join(dataset)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_commit(dataset: Path, data: st.DataObject) -> None:
    commit = data.draw(altered(read_record(dataset, commit_key(1))))
    with Altered(dataset, **{commit_key(1): sealed(commit)}):
        join(dataset)
        open_and_read(dataset)


@given(
    st.sampled_from([PLAN, MANIFEST, commit_key(0)]), st.binary(max_size=200) | VALUES.map(json.dumps).map(str.encode)
)
@settings(max_examples=200, deadline=None)
def test_any_bytes(dataset: Path, name: str, data: bytes) -> None:
    with Altered(dataset, **{name: data}):
        open_and_read(dataset)
        join(dataset)


@given(st.sampled_from([PLAN, MANIFEST, commit_key(0)]), st.integers(0), st.integers(1, 255), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_flipped_or_missing_byte_is_never_read_as_another_record(
    dataset: Path, name: str, position: int, mask: int, cut: bool
) -> None:
    data = bytearray((dataset / name).read_bytes())
    position %= len(data)
    data[position:] = data[position:][:0] if cut else bytes([data[position] ^ mask]) + data[position + 1 :]
    with Altered(dataset, **{name: bytes(data)}), pytest.raises(LopdError, match=name):
        if name == commit_key(0):
            create_dataset(str(dataset), make_plan(SHARDS, topk=2)).finalize()
        else:
            open_dataset(str(dataset))


DEEP = 100_000
MONSTERS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "a list in a list, and so on": lambda record: b'{"schema_version":2,"x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "an object in an object, and so on": lambda record: b'{"schema_version":2,' + b'"x":{' * DEEP + b"}" * DEEP + b"}",
    "five hundred levels, sealed": lambda record: sealed(record | {"x": nested(300)}),
    "a text of ten megabytes": lambda record: sealed(record | {"x": "é" * 5_000_000}),
    "a key of ten megabytes": lambda record: sealed(record | {"é" * 5_000_000: 1}),
    "many keys": lambda record: sealed(record | {"x": {str(key): key for key in range(30_000)}}),
    "a number of a megabyte": lambda record: (
        json.dumps(record).encode().replace(b"{", b'{"x":' + b"9" * 10**6 + b",", 1)
    ),
    "a key twice": lambda record: sealed(record).replace(b"{", b'{"schema_version":2,', 1),
    "numbers beyond floats": lambda record: sealed(record).replace(b"{", b'{"a":1e999,', 1),
    "NaN": lambda record: sealed(record).replace(b"{", b'{"a":NaN,', 1),
    "UTF-16": lambda record: json.dumps(record).encode("utf-16"),
    "a byte order mark": lambda record: b"\xef\xbb\xbf" + sealed(record),
    "a line more": lambda record: sealed(record) + b"\n",
    "nothing": lambda record: b"",
    "null": lambda record: b"null",
}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize("name", [PLAN, MANIFEST, commit_key(0)])
@pytest.mark.parametrize("monster", MONSTERS)
def test_a_monster_is_an_error_of_ours_or_harmless(dataset: Path, name: str, monster: str) -> None:
    data = MONSTERS[monster](read_record(dataset, name))
    files = {name: data}
    if name == PLAN:
        files[MANIFEST] = sealed(read_record(dataset, MANIFEST) | {"plan_sha256": sha256(data)})
    with Altered(dataset, **files):
        open_and_read(dataset)
        join(dataset)
