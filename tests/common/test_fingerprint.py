import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from common import weight_files
from common.canonical import seal
from common.errors import DataError, RetryLater, StorageError
from common.fingerprint import Fingerprint, fingerprint, tensors_sha256, weights_sha256
from common.safetensors_header import read_header
from tests.common.tiny_models import RawTensor, make_tensors, repack, write_raw_safetensors, write_safetensors

FILE = "model.safetensors"
OTHER_SHA256 = "e" * 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / FILE, make_tensors())
    return folder


@pytest.fixture
def memory(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of remembered hashes, where those of new files are kept too."""
    monkeypatch.setattr(weight_files, "SETTLED_S", -1e9)
    return own_cache / "fingerprints"


def flip_a_bit(tensors: dict[str, RawTensor]) -> dict[str, RawTensor]:
    q = tensors["model.q.weight"]
    return tensors | {"model.q.weight": q._replace(data=bytes([q.data[0] ^ 1]) + q.data[1:])}


def swap_names(tensors: dict[str, RawTensor]) -> dict[str, RawTensor]:
    return tensors | {"model.k.weight": tensors["model.v.weight"], "model.v.weight": tensors["model.k.weight"]}


def change_dtype(tensors: dict[str, RawTensor]) -> dict[str, RawTensor]:
    return tensors | {"model.q.weight": tensors["model.q.weight"]._replace(dtype="F16")}


def transpose_shape(tensors: dict[str, RawTensor]) -> dict[str, RawTensor]:
    return tensors | {"model.q.weight": tensors["model.q.weight"]._replace(shape=(4, 6))}


def drop_one(tensors: dict[str, RawTensor]) -> dict[str, RawTensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "model.v.weight"}


def test_the_hashes_are_those_that_artifacts_already_hold(model: Path) -> None:
    """Provenance files and plans outlive a version of this software, so these constants never change."""
    listed = [
        [name, dtype, list(shape), hashlib.sha256(data).hexdigest()]
        for name, (dtype, shape, data) in sorted(make_tensors().items())
    ]
    files = [hashlib.sha256((model / FILE).read_bytes()).hexdigest()]
    expected = [hashlib.sha256(json.dumps(value).encode()).hexdigest() for value in (files, listed)]
    assert fingerprint(model) == tuple(expected)
    assert (weights_sha256(model), tensors_sha256(model)) == fingerprint(model)


@pytest.mark.parametrize("files", [1, 2, 4])
def test_another_packing_holds_the_same_tensors(model: Path, tmp_path: Path, files: int) -> None:
    for order in (1, -1):
        tensors = dict(list(make_tensors().items())[::order])
        packed = repack(model, tmp_path / f"packed{order}", files, tensors)
        assert len(list(packed.glob("*.safetensors"))) == files
        assert tensors_sha256(packed) == tensors_sha256(model)
        assert weights_sha256(packed) != weights_sha256(model)


@pytest.mark.parametrize("change", [flip_a_bit, swap_names, change_dtype, transpose_shape, drop_one])
@pytest.mark.parametrize("files", [1, 2])
def test_other_tensors_have_another_hash(
    model: Path, tmp_path: Path, change: Callable[[dict[str, RawTensor]], dict[str, RawTensor]], files: int
) -> None:
    other = repack(model, tmp_path / "other", files, change(make_tensors()))
    assert tensors_sha256(other) != tensors_sha256(model)
    assert weights_sha256(other) != weights_sha256(model)


def test_metadata_is_no_tensor(model: Path) -> None:
    before = fingerprint(model)
    write_safetensors(model / FILE, make_tensors(), {"lopd_provenance": "{}"})
    after = fingerprint(model)
    assert after.tensors_sha256 == before.tensors_sha256 and after.weights_sha256 != before.weights_sha256


def test_empty_and_scalar_tensors_count(model: Path) -> None:
    seen = {tensors_sha256(model)}
    for more in ({"b": RawTensor("F32", (0, 3), b"")}, {"b": RawTensor("F32", (), b"1234")}):
        write_safetensors(model / FILE, make_tensors() | more)
        seen.add(tensors_sha256(model))
    assert len(seen) == 3


def recorded(memory: Path) -> dict[str, Any]:
    """The one record that is remembered."""
    (place,) = memory.iterdir()
    return json.loads(place.read_bytes())


def test_a_file_that_stays_as_it_was_is_not_read_again(model: Path, memory: Path) -> None:
    """Its record, altered on purpose, is what the second call answers."""
    before = fingerprint(model)
    (place,) = memory.iterdir()
    record = {key: value for key, value in recorded(memory).items() if key != "seal"}
    place.write_bytes(seal(record | {"sha256": OTHER_SHA256}))

    assert weights_sha256(model) == hashlib.sha256(json.dumps([OTHER_SHA256]).encode()).hexdigest()
    os.utime(model / FILE)
    assert fingerprint(model) == before


def test_other_weights_of_the_same_size_and_date_in_the_same_place_are_read(model: Path, memory: Path) -> None:
    """As `cp -p` and `tar` leave them: path, size, date and inode are those that are remembered."""
    before, then = fingerprint(model), (model / FILE).stat()
    with open(model / FILE, "r+b") as file:
        write_safetensors(other := model.parent / "other", make_tensors(seed=1))
        file.write(other.read_bytes())
    os.utime(model / FILE, ns=(then.st_atime_ns, then.st_mtime_ns))
    now = (model / FILE).stat()

    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (then.st_size, then.st_mtime_ns, then.st_ino)
    assert fingerprint(model).tensors_sha256 != before.tensors_sha256


def test_a_file_just_written_is_not_remembered(model: Path, own_cache: Path) -> None:
    """It may be written again within the tick of its time stamp."""
    fingerprint(model)
    assert not (own_cache / "fingerprints").exists()


def cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:-9])


def flip(place: Path) -> None:
    data = place.read_bytes()
    place.write_bytes(data[:70] + bytes([data[70] ^ 1]) + data[71:])


def make_folder(place: Path) -> None:
    place.unlink()
    place.mkdir()


def make_other_record(place: Path) -> None:
    place.write_bytes(seal({"file": "none", "sha256": 1}))


@pytest.mark.parametrize("damage", [cut, flip, make_folder, make_other_record])
def test_a_damaged_record_is_no_record(model: Path, memory: Path, damage: Callable[[Path], None]) -> None:
    before = fingerprint(model)
    (place,) = memory.iterdir()
    damage(place)
    assert fingerprint(model) == before


def test_without_a_place_to_remember_the_file_is_read_every_time(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPD_CACHE_DIR", str(model / FILE))
    before = fingerprint(model)
    os.utime(model / FILE)
    assert fingerprint(model) == before


def hub_snapshot(cache: Path, sha256: str, data: bytes, revision: str = "1" * 40) -> Path:
    """A model's folder as the Hub's cache lays it out: a link to a file named by its hash."""
    repo = cache / "models--org--model"
    folder = repo / "snapshots" / revision
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    (repo / "blobs" / sha256).write_bytes(data)
    (folder / FILE).symlink_to(f"../../blobs/{sha256}")
    return folder


def test_a_snapshot_of_the_hub_has_the_fingerprint_of_its_copy(model: Path, tmp_path: Path) -> None:
    data = (model / FILE).read_bytes()
    snapshot = hub_snapshot(tmp_path, hashlib.sha256(data).hexdigest(), data)
    assert fingerprint(snapshot) == fingerprint(model)
    assert weights_sha256(snapshot) == weights_sha256(model)


def test_the_files_of_a_snapshot_are_told_by_their_names_without_reading(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, OTHER_SHA256, b"no weights at all")
    assert weights_sha256(snapshot) == hashlib.sha256(json.dumps([OTHER_SHA256]).encode()).hexdigest()


def test_a_file_that_merely_has_a_hash_for_a_name_is_read(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "blobs" / OTHER_SHA256
    elsewhere.parent.mkdir()
    shutil.copy(model / FILE, elsewhere)
    (linked := tmp_path / "linked").mkdir()
    (linked / FILE).symlink_to(elsewhere)
    assert fingerprint(linked) == fingerprint(model)


def test_a_damaged_file_of_the_hub_is_found_when_it_is_read(model: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, OTHER_SHA256, (model / FILE).read_bytes())
    with pytest.raises(DataError, match=f"Hub's cache is damaged.*{OTHER_SHA256}.*Delete it, then fetch"):
        fingerprint(snapshot)


def test_two_revisions_with_one_file_read_it_once(model: Path, tmp_path: Path, memory: Path) -> None:
    data = (model / FILE).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    one, other = (hub_snapshot(tmp_path, sha256, data, revision) for revision in ("1" * 40, "2" * 40))
    assert fingerprint(one) == fingerprint(other)
    assert recorded(memory)["file"]["path"].endswith(f"blobs/{sha256}")


@pytest.mark.parametrize("target", ["nothing", FILE, "."])
def test_weights_that_are_links_to_nothing_are_missing(tmp_path: Path, target: str) -> None:
    (tmp_path / FILE).symlink_to(target)
    for ask in (fingerprint, weights_sha256):
        with pytest.raises(DataError, match=f"incomplete: 1 files .*{FILE}.*{tmp_path}.*Fetch the model again"):
            ask(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no safetensors weights.*pickled weights are not opened"):
        fingerprint(tmp_path)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    place = folder / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    edit(index["weight_map"])
    place.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["model-9.safetensors", "../model/model.safetensors", "/etc/passwd", "", "a\nb"])
def test_an_index_that_names_a_missing_file_is_refused_on_one_line(model: Path, tmp_path: Path, name: str) -> None:
    packed = repack(model, tmp_path / "packed", 2, make_tensors())
    edit_index(packed, lambda places: places.update({"model.new.weight": name}))
    for ask in (fingerprint, weights_sha256):
        with pytest.raises(DataError, match="the model is incomplete") as raised:
            ask(packed)
        assert "\n" not in str(raised.value)


def test_a_deleted_shard_is_missed(model: Path, tmp_path: Path) -> None:
    packed = repack(model, tmp_path / "packed", 2, make_tensors())
    (packed / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"1 files of its weights are missing, the first is model-00002-of-00002"):
        fingerprint(packed)


@pytest.mark.parametrize("name", ["model.none.weight", "model.v.weight"])
def test_an_index_that_names_a_tensor_where_it_is_not_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    packed = repack(model, tmp_path / "packed", 2, make_tensors())
    edit_index(packed, lambda places: places.update({name: "model-00001-of-00002.safetensors"}))
    with pytest.raises(DataError, match=f"tensor {name} is not in model-00001-of-00002.safetensors, where"):
        fingerprint(packed)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_malformed_index_is_one_line(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match="index.json") as raised:
        fingerprint(model)
    assert "\n" not in str(raised.value)


def test_a_tensor_in_two_files_is_refused(model: Path) -> None:
    shutil.copy(model / FILE, model / "other.safetensors")
    with pytest.raises(DataError, match=r"tensor model.embed_tokens.weight lies in two files, model.safetensors and"):
        fingerprint(model)


def test_a_file_that_is_still_being_written_is_for_another_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_meanwhile(stream: Any, size: int, where: str) -> Any:
        result = read_header(stream, size, where)
        os.utime(where)
        return result

    def cut_meanwhile(stream: Any, size: int, where: str) -> Any:
        result = read_header(stream, size, where)
        os.truncate(where, 1000)
        return result

    write_safetensors(model / FILE, {"a": RawTensor("U8", (1 << 20,), bytes(1 << 20))})
    for meanwhile in (write_meanwhile, cut_meanwhile):
        monkeypatch.setattr(weight_files, "read_header", meanwhile)
        with pytest.raises(RetryLater, match=f"changed while it was read .*{FILE}"):
            fingerprint(model)


def test_a_long_reading_says_how_far_it_is(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weight_files, "PATIENCE_S", 0)
    header = json.dumps({"a": {"dtype": "U8", "shape": [1 << 26], "data_offsets": [0, 1 << 26]}}).encode()
    write_raw_safetensors(model / FILE, header, b"")
    os.truncate(model / FILE, 8 + len(header) + (1 << 26))
    fingerprint(model)
    said = capsys.readouterr()
    assert said.err.startswith("fingerprint of model: 0 B/67.1 MB") and "67.1 MB/67.1 MB (100%)" in said.err
    assert said.out == ""


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(offsets=(0, 9))}, "tensor a has 9 bytes"),
        ({"a": entry(offsets=(0, 16), shape=(4,))}, "its tensors have 16 bytes, the file holds 8"),
        ({"a": entry(offsets=(0, 4), shape=(1,))}, "its tensors have 4 bytes, the file holds 8"),
        ({"a": entry(offsets=(4, 8), shape=(1,))}, "tensor a does not begin where"),
        ({"a": entry(), "b": entry()}, "tensor b does not begin where"),
        ({"a": entry(offsets=(8, 0))}, "tensor a does not begin where"),
        ({"a": entry(offsets=(-8, 0))}, "a.data_offsets.0: "),
        ({"a": entry(offsets=(0, 8, 8))}, "a.data_offsets: "),
        ({"a": entry(shape=(3,))}, "tensor a has 8 bytes"),
        ({"a": entry(shape=(-2, -1))}, "a.shape.0: "),
        ({"a": entry(shape=("2",))}, "a.shape.0: "),
        ({"a": entry(shape=(1,) * 65)}, "a.shape: "),
        ({"a": entry(shape=(2**62,) * 64)}, "tensor a has 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "a.data_offsets: "),
        ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__.x: "),
        ({"two\nlines": {}}, r"two\nlines.dtype: "),
        ([], "object"),
    ],
)
def test_a_malformed_header_is_one_line_that_says_what_is_wrong(model: Path, header: Any, words: str) -> None:
    write_raw_safetensors(model / FILE, json.dumps(header).encode(), bytes(8))
    with pytest.raises(DataError, match=f"malformed safetensors file: .*{FILE}.*Fetch the model again") as raised:
        fingerprint(model)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40, -1])
def test_a_file_cut_short_is_refused(model: Path, length: int) -> None:
    data = (model / FILE).read_bytes()
    (model / FILE).write_bytes(data[:length])
    with pytest.raises(DataError, match=f"malformed safetensors file.*{FILE}"):
        fingerprint(model)


def test_tensors_may_have_any_name_and_a_dtype_of_the_future(model: Path) -> None:
    names = ("metadata", "about", "model_config", "__pydantic_extra__", "Ünï.漢字 🙂", "", "a\nb")
    seen = set()
    for name in names:
        write_safetensors(model / FILE, {name: RawTensor("F2_E1M1", (32,), bytes(8))})
        seen.add(tensors_sha256(model))
    assert len(seen) == len(names)


def outcome(folder: Path, data: bytes) -> Fingerprint | None:
    """What we make of a file: its hashes, or None where we refuse it."""
    (folder / FILE).write_bytes(data)
    try:
        return fingerprint(folder)
    except DataError as error:
        assert "\n" not in str(error)
        return None


def opens(data: bytes) -> bool | None:
    """Whether the reader of the format's authors takes it; None where it does not know a dtype."""
    try:
        deserialize(data)
    except SafetensorError as error:
        return None if "unknown variant" in str(error) else False
    return True


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A good file with bytes altered, cut out or put in; most of it in the header."""
    header = json.dumps({"a": entry(), "b": entry("BF16", (2, 3), (8, 20)), "__metadata__": {"k": "v"}})
    data = bytearray(len(header).to_bytes(8, "little") + header.encode() + bytes(range(20)))
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.one_of(st.just(begin), st.integers(begin, min(begin + 4, len(data)))))
        data[begin:end] = draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"0", b"9", b'"', b",", b"}", b"e9"])))
    return bytes(data)


NUMBER = st.one_of(st.integers(0, 24), st.sampled_from([-1, 2**31, 2**63, 2**64, 10**400, 0.0, 1e300, True, None, "8"]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F6_E2M3", "f32", 1]),
        "shape": st.lists(NUMBER, max_size=3),
        "data_offsets": st.lists(NUMBER, min_size=2, max_size=2),
    },
    optional={"more": NUMBER},
)


@st.composite
def strange_files(draw: st.DrawFn) -> bytes:
    """A header that says anything, before some data."""
    header = draw(st.dictionaries(st.text(max_size=3), ENTRY, max_size=3))
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2) | NUMBER, max_size=2))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    text += b" " * draw(st.integers(0, 3))
    return len(text).to_bytes(8, "little") + text + bytes(draw(st.integers(0, 24)))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("scratch")


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(damaged_files(), strange_files()))
def test_any_file_is_hashed_or_refused_as_the_reader_of_the_format_does(scratch: Path, data: bytes) -> None:
    ours, theirs = outcome(scratch, data), opens(data)
    assert theirs is None or theirs == (ours is not None)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__"),
        st.binary(max_size=40).map(lambda data: RawTensor("U8", (len(data),), data)),
        min_size=1,
        max_size=8,
    ),
    files=st.integers(1, 4),
    salt=st.randoms(use_true_random=False),
)
def test_no_packing_changes_what_any_tensors_hash_to(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, RawTensor], files: int, salt: Any
) -> None:
    base = tmp_path_factory.mktemp("packings")
    (one := base / "one").mkdir()
    write_safetensors(one / FILE, tensors)
    names = list(tensors)
    salt.shuffle(names)
    other = repack(one, base / "other", min(files, len(names)), {name: tensors[name] for name in names})
    assert tensors_sha256(other) == tensors_sha256(one)


def test_an_index_that_cannot_be_read_is_a_storage_error(model: Path) -> None:
    (model / "model.safetensors.index.json").mkdir()
    with pytest.raises(StorageError, match=r"cannot read.*index.json"):
        fingerprint(model)
