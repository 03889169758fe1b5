"""What the boxes at work say of themselves lies within a dataset, and disturbs none of the commands on datasets."""

from pathlib import Path

import pytest

from common.dataset import open_dataset
from common.status_files import box_name, status_key
from common.storage import Store
from tests.cache.datasets import lopd, make_dataset


def say(url: str, data: bytes = b'{"state":"running"}') -> str:
    """A status of this box, within the dataset; returns its key."""
    Store(url).put(status_key(box_name()), data)
    return status_key(box_name())


@pytest.fixture
def dataset(location: str) -> str:
    make_dataset(location)
    return location


@pytest.mark.parametrize("data", [b'{"state":"running"}', b"\x00 not ours"])
def test_a_dataset_with_a_status_is_whole_for_all_who_read_it(dataset: str, data: bytes) -> None:
    say(dataset, data)
    verified = lopd("cache", "verify", dataset)
    assert verified.code == 0 and "note" not in verified.out
    assert [one["state"] for one in lopd("cache", "ls", dataset, "--json").json["datasets"]] == ["complete"]
    assert lopd("cache", "status", dataset, "--json").json["state"] == "complete"
    assert lopd("cache", "inspect", dataset).code == 0
    assert open_dataset(dataset).num_rows == 9


def test_gc_leaves_a_status_alone(dataset: str) -> None:
    key = say(dataset)
    ran = lopd("cache", "gc", dataset, "--older-than", "0s", "--delete")
    assert ran.code == 0 and "deleted 0 of 0 objects" in ran.out
    assert Store(dataset).exists(key)


def test_a_half_written_status_is_collected_as_any_half_written_file(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    (tmp_path / "status").mkdir()
    (tmp_path / "status" / ".box-1.json.0123abcd.part").write_text("{")
    assert "younger" in lopd("cache", "gc", str(tmp_path), "--older-than", "0s").out


def test_a_copy_goes_without_the_status(dataset: str, tmp_path: Path) -> None:
    say(dataset)
    assert lopd("cache", "copy", dataset, str(tmp_path / "copy")).code == 0
    assert not (tmp_path / "copy" / "status").exists()
