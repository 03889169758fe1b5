"""A prefix that holds more than a dataset, or less: what is not ours is left alone, what is missing is named."""

import json
from pathlib import Path

import pytest
import s3fs

from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.errors import DataError, LopdError, StorageError
from common.schema import to_rows
from common.storage import Store
from tests.common.rows import make_dataset, make_plan, make_shard, same_rows
from tests.conftest import BUCKET
from tests.s3_server import READER, S3Server

SHARDS = 3  # of `make_dataset`


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return Path(make_dataset(str(tmp_path / "dataset")))


def assert_whole(folder: Path | str) -> None:
    """Every row is there as it was written."""
    opened = open_dataset(str(folder))
    for shard in range(SHARDS):
        assert same_rows(to_rows(opened.read_shard(shard)), to_rows(make_shard(shard)))


STRAY = [
    "commits/zzz.json",
    "commits/000000.json.bak",
    "commits/000000.json~",
    "commits/0.json",
    "commits/-00001.json",
    "commits/000099.json",
    "commits/0000001.json",
    "commits/٠٠٠٠٠١.json",
    "commits/００００01.json",
    "commits/000000/notes.txt",
    "commits/.DS_Store",
    "data/.DS_Store",
    "data/notes.txt",
    "data/000000-0123456789abcdef.parquet",
    "data/0000001-0123456789abcdef.parquet",
    "data/٠٠٠٠٠١-0123456789abcdef.parquet",
    "data/000001-０123456789abcdef.parquet",
    "data/deeper/000000-0123456789abcdef.parquet",
    "000000.json",
    "MANIFEST.json.bak",
    "plan.json.old",
    ".part",
    "notes/README.md",
]


@pytest.mark.parametrize("done", [0, 1, SHARDS])
def test_files_that_are_not_ours_are_left_alone(location: str, done: int) -> None:
    store = Store(location)
    writer = create_dataset(location, make_plan(SHARDS))
    for shard in range(done):
        writer.commit(shard, make_shard(shard))
    for name in STRAY:
        store.put(name, b"not ours")

    again = create_dataset(location, make_plan(SHARDS))
    assert again.pending() == list(range(done, SHARDS))
    for shard in again.shards_left():
        again.commit(shard, make_shard(shard))
    again.finalize()

    assert_whole(location)
    assert all(store.get(name) == b"not ours" for name in STRAY)
    assert "0123456789abcdef" not in store.get("README.md").decode()


def test_a_prefix_of_other_files_alone_is_no_dataset(location: str) -> None:
    for name in STRAY:
        Store(location).put(name, b"not ours")
    with pytest.raises(DataError, match="there is no dataset here"):
        open_dataset(location)


@pytest.mark.parametrize("name", ["MANIFEST.json", "plan.json", "data/000001-*"])
def test_a_folder_in_the_place_of_a_file_is_an_error_of_ours(dataset: Path, name: str) -> None:
    (file,) = dataset.glob(name)
    file.unlink()
    (file / "inside").mkdir(parents=True)
    with pytest.raises(LopdError, match=file.name):
        open_dataset(str(dataset)).read_shard(1)


@pytest.mark.parametrize("name", ["plan.json", "commits/000001.json"])
def test_a_folder_in_the_place_of_a_record_is_an_error_of_ours_for_writers(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "inside").mkdir(parents=True)
    with pytest.raises(LopdError, match=name):
        create_dataset(str(tmp_path), make_plan(SHARDS)).commit(1, make_shard(1))


def test_a_dataset_in_the_place_of_which_lies_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "dataset").write_text("a file")
    for use in (open_dataset, lambda url: create_dataset(url, make_plan(SHARDS))):
        with pytest.raises(LopdError, match="dataset"):
            use(str(tmp_path / "dataset"))


@pytest.mark.parametrize("name", ["commits/000001.json", "data"])
def test_an_object_deleted_in_the_middle_is_named_and_the_others_are_read(s3: str, name: str) -> None:
    make_dataset(s3)
    commits = open_dataset(s3).shards
    Store(s3).remove(commits[1].file if name == "data" else name)

    opened = open_dataset(s3)
    assert len(opened.read_shard(0)) == len(opened.read_shard(2)) == 3
    if name == "data":
        with pytest.raises(DataError, match=r"the shard is missing .*data/000001"):
            opened.read_shard(1)
    else:
        assert len(opened.read_shard(1)) == 3
        assert create_dataset(s3, make_plan(SHARDS)).pending() == [1]


def test_objects_that_may_not_be_read_are_an_error_of_permission(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3)
    opened = open_dataset(s3)
    key, secret = READER
    admin = s3fs.S3FileSystem(endpoint_url=s3_server.endpoint, skip_instance_cache=True)
    deny = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{s3.removeprefix('s3://')}/{opened.shards[1].file}",
    }
    admin.call_s3("put_bucket_policy", Bucket=BUCKET, Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))
    try:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        denied = open_dataset(s3)
        assert len(denied.read_shard(0)) == len(denied.read_shard(2)) == 3
        with pytest.raises(StorageError, match=r"no permission to (read|look up) .*data/000001"):
            denied.read_shard(1)
    finally:
        admin.call_s3("delete_bucket_policy", Bucket=BUCKET)
