"""Datasets that somebody damaged, swapped or sealed anew, or put other things into: refused by name, or read whole."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from common import parquet
from common.canonical import canonical, seal, sha256, unseal
from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.errors import DataError
from common.records import data_key
from tests.common import forge
from tests.common.rows import make_dataset, make_plan, make_shard, make_table

SHARDS = 3  # of `make_dataset`
TOTALS = ("rows", "prompt_tokens", "tokens")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return Path(make_dataset(str(tmp_path / "dataset")))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record and seal it anew."""
    record = unseal(file.read_bytes(), str(file))
    change(record)
    file.write_bytes(seal(record))


def shard_file(folder: Path, shard: int) -> Path:
    return next((folder / "data").glob(f"{shard:06d}-*.parquet"))


def put_table(folder: Path, shard: int, table: pa.Table) -> None:
    """Put another table in the place of a shard; the manifest says so and is sealed anew."""
    said = parquet.announced(table)
    put_shard(folder, shard, parquet.encode(table), **{total: getattr(said, total) for total in TOTALS})


def put_shard(folder: Path, shard: int, data: bytes, **said: int) -> None:
    """The same for bytes, of which the manifest says what it said before, or `said`."""
    digest = sha256(data)
    (folder / data_key(shard, digest)).write_bytes(data)

    def name_it(manifest: dict[str, Any]) -> None:
        manifest["shards"][shard] |= {"file": data_key(shard, digest), "sha256": digest, "bytes": len(data), **said}
        for total in TOTALS:
            manifest[total] = sum(commit[total] for commit in manifest["shards"])

    edit(folder / "MANIFEST.json", name_it)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("name", ["MANIFEST.json", "plan.json"])
def test_a_truncated_record_is_refused(dataset: Path, name: str, part: float) -> None:
    data = (dataset / name).read_bytes()
    (dataset / name).write_bytes(data[: int(part * (len(data) - 1))])
    with pytest.raises(DataError, match=name):
        open_dataset(str(dataset))


FOREIGN = [
    "../data/000001-0123456789abcdef.parquet",
    "data/../../000001-0123456789abcdef.parquet",
    "/data/000001-0123456789abcdef.parquet",
    "file:///etc/passwd",
    "s3://other/data/000001-0123456789abcdef.parquet",
    "https://example.org/000001-0123456789abcdef.parquet",
    "data/000001-0123456789abcdef.parquet\n",
    "data/٠٠٠٠٠١-0123456789abcdef.parquet",
    "DATA/000001-0123456789ABCDEF.parquet",
    "",
]


@pytest.mark.parametrize("file", FOREIGN)
def test_a_file_that_is_not_a_shard_of_the_dataset_is_neither_read_nor_finished(dataset: Path, file: str) -> None:
    edit(dataset / "commits" / "000001.json", lambda commit: commit.update(file=file))
    with pytest.raises(DataError, match=r"not a path of a shard|is not the content of"):
        create_dataset(str(dataset), make_plan(SHARDS)).finalize()
    edit(dataset / "MANIFEST.json", lambda manifest: manifest["shards"][1].update(file=file))
    with pytest.raises(DataError, match=r"not a path of a shard|is not the content of"):
        open_dataset(str(dataset))


@pytest.mark.parametrize("number", TOTALS)
@pytest.mark.parametrize("step", [-1, 1, 10**15])
def test_a_count_that_lies_in_manifest_and_commit_alike_is_refused_by_the_shard(
    dataset: Path, number: str, step: int
) -> None:
    def lie(manifest: dict[str, Any]) -> None:
        manifest[number] += step
        manifest["shards"][1][number] += step

    edit(dataset / "MANIFEST.json", lie)
    opened = open_dataset(str(dataset))
    assert len(opened.read_shard(0)) == 3
    for read in (opened.read_shard, lambda shard: list(opened.iter_row_groups(shard))):
        with pytest.raises(DataError, match="the footer says .*, the commit .*data/000001"):
            read(1)


@pytest.mark.parametrize("number", TOTALS)
def test_a_count_that_lies_in_a_total_alone_is_refused(dataset: Path, number: str) -> None:
    edit(dataset / "MANIFEST.json", lambda manifest: manifest.update({number: manifest[number] + 1}))
    with pytest.raises(DataError, match=f"the counts of {number} do not add up"):
        open_dataset(str(dataset))


def test_a_count_that_lies_in_a_commit_is_refused_by_the_readers_of_the_finished_dataset(tmp_path: Path) -> None:
    writer = create_dataset(str(tmp_path), make_plan(1))
    writer.commit(0, make_shard(0))
    edit(tmp_path / "commits" / "000000.json", lambda commit: commit.update(rows=4))
    writer.finalize()
    with pytest.raises(DataError, match="the footer says 3 rows, the commit 4"):
        open_dataset(str(tmp_path)).read_shard(0)


def test_a_count_that_lies_in_the_footer_is_refused_though_all_hashes_fit(dataset: Path) -> None:
    forgery = forge.take_apart(shard_file(dataset, 1).read_bytes())
    forgery.footer[forge.NUM_ROWS].value = 2
    put_shard(dataset, 1, forgery.data())
    with pytest.raises(DataError, match=r"the footer says 2 rows, the commit 3 .*do not trust this dataset"):
        open_dataset(str(dataset)).read_shard(1)


def test_a_size_that_lies_is_refused_before_the_shard_is_fetched(dataset: Path) -> None:
    edit(dataset / "MANIFEST.json", lambda manifest: manifest["shards"][1].update(bytes=10))
    with pytest.raises(DataError, match="bytes, not 10"):
        open_dataset(str(dataset)).read_shard(1)


def test_another_shard_in_the_place_of_one_is_refused(dataset: Path) -> None:
    shutil.copy(shard_file(dataset, 2), shard_file(dataset, 1))
    with pytest.raises(DataError, match=r"(altered|bytes, not).*data/000001"):
        open_dataset(str(dataset)).read_shard(1)


def test_the_same_shard_of_another_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    other = Path(make_dataset(str(tmp_path / "other"), first=SHARDS))
    shutil.copy(shard_file(other, 1), shard_file(dataset, 1))
    with pytest.raises(DataError, match=r"(altered|bytes, not).*data/000001"):
        open_dataset(str(dataset)).read_shard(1)


def test_a_shard_under_the_number_of_another_is_refused_though_the_manifest_is_sealed_anew(dataset: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        manifest["shards"][1] = manifest["shards"][2] | {"shard": 1}

    edit(dataset / "MANIFEST.json", swap)
    with pytest.raises(DataError, match=r"shard 1 is not the content of data/000002|counts of .* do not add up"):
        open_dataset(str(dataset))


def test_a_shard_of_another_topk_is_refused_though_the_manifest_is_sealed_anew(dataset: Path) -> None:
    put_table(dataset, 1, make_shard(1, topk=2))
    with pytest.raises(DataError, match=r"does not speak of 11 columns .*data/000001"):
        open_dataset(str(dataset)).read_shard(1)


def test_a_shard_of_another_kind_is_refused_though_the_manifest_is_sealed_anew(dataset: Path) -> None:
    put_table(dataset, 1, make_table(rows=3, scored=False))
    with pytest.raises(DataError, match=r"teacher_logprobs is missing .*data/000001"):
        open_dataset(str(dataset)).read_shard(1)


def test_a_shard_of_another_vocabulary_is_refused_though_the_manifest_is_sealed_anew(dataset: Path) -> None:
    put_table(dataset, 1, make_table(rows=3, completion_ids=np.array([1, 2, 3, 100], np.int32)))
    with pytest.raises(DataError, match=r"token id 100 .*outside the vocabulary of 100 .*data/000001"):
        open_dataset(str(dataset)).read_shard(1)


def test_a_manifest_of_another_dataset_is_refused(dataset: Path, tmp_path: Path) -> None:
    other = Path(make_dataset(str(tmp_path / "other"), vocab_size=101))
    shutil.copy(other / "MANIFEST.json", dataset / "MANIFEST.json")
    with pytest.raises(DataError, match="plan.json is not the plan of this manifest"):
        open_dataset(str(dataset))


@pytest.mark.parametrize(("version", "sealed"), [(1, False), (3, True), (3, False), ("2", True), (None, False)])
@pytest.mark.parametrize("finished", [True, False])
def test_another_version_of_the_schema_is_named_with_the_way_out(
    dataset: Path, version: Any, sealed: bool, finished: bool
) -> None:
    """Version 1 had no seals, and of version 3 nobody knows whether it has them."""
    for name in ("plan.json", "MANIFEST.json"):
        record = unseal((dataset / name).read_bytes(), name) | {"schema_version": version}
        (dataset / name).write_bytes((seal if sealed else canonical)(record))
    if not finished:
        (dataset / "MANIFEST.json").unlink()
    with pytest.raises(DataError, match=f"schema version {version}, this software reads version 2 .*the release"):
        open_dataset(str(dataset))
    with pytest.raises(DataError, match=f"schema version {version}, this software reads version 2 .*the release"):
        create_dataset(str(dataset), make_plan(SHARDS))


COERCED: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("a number for a text", lambda plan: plan["created"].update(at=2)),
    ("a key without which we would guess", lambda plan: plan["policy"].pop("revision")),
    ("a text for a number", lambda plan: plan.update(vocab_size="100")),
    ("a truth for a number", lambda plan: plan.update(topk=False)),
]


@pytest.mark.parametrize(("what", "change"), COERCED)
def test_a_plan_that_is_only_nearly_one_is_refused(tmp_path: Path, what: str, change: Callable[..., object]) -> None:
    create_dataset(str(tmp_path), make_plan())
    edit(tmp_path / "plan.json", change)
    with pytest.raises(DataError, match="plan.json"):
        create_dataset(str(tmp_path), make_plan())


def test_a_manifest_that_hides_an_override_is_refused(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), overrides=["teacher-mismatch"])
    edit(tmp_path / "MANIFEST.json", lambda manifest: manifest.update(overrides=[]))
    with pytest.raises(DataError, match=r"overrides \(\), the plan says .*teacher-mismatch"):
        open_dataset(str(tmp_path))


def test_a_plan_of_more_shards_than_one_can_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shards: Input should be less than or equal to"):
        create_dataset(str(tmp_path), make_plan(10**18))
