"""Lengths are read once, kept beside the shards, and believed only where the commits bear them out."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from common.dataset import Dataset, open_dataset
from common.errors import DataError
from common.lengths import RowLengths, keep_lengths, kept_lengths
from common.storage import Store
from tests.common.rows import make_dataset

COLUMNS = ("shard", "row", "prompt", "completion", "prompt_key")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset(make_dataset(str(tmp_path / "data"), shards=20))


def same(one: RowLengths, other: RowLengths) -> bool:
    return all(
        (getattr(one, name) == getattr(other, name)).all() and getattr(one, name).dtype == getattr(other, name).dtype
        for name in COLUMNS
    )


def test_what_is_kept_is_what_was_read(dataset: Dataset) -> None:
    lengths = dataset.row_lengths()
    keep_lengths(dataset.manifest_sha256, lengths)
    kept = kept_lengths(dataset.manifest_sha256, dataset.shards)
    assert kept is not None and same(kept, lengths)
    assert len(kept) == dataset.num_rows
    assert kept.total.sum() == dataset.num_tokens + dataset.manifest["prompt_tokens"]


def test_a_prompt_has_the_same_key_in_every_dataset(dataset: Dataset) -> None:
    keys = dataset.row_lengths().prompt_key
    first = dataset.read_shard(0)["prompt_id"][0].as_py()
    assert int(keys[0]) == int.from_bytes(hashlib.sha256(first.encode()).digest()[:8], "little")


def test_some_rows_are_taken_by_number_or_by_mask(dataset: Dataset) -> None:
    lengths = dataset.row_lengths()
    assert same(lengths.take(np.arange(len(lengths)) % 2 == 0), lengths.take(np.arange(0, len(lengths), 2)))


def test_a_file_that_was_altered_or_belongs_to_other_commits_is_not_believed(
    dataset: Dataset, own_cache: Path, tmp_path: Path
) -> None:
    lengths = dataset.row_lengths()
    keep_lengths(dataset.manifest_sha256, lengths)
    file = own_cache / "lengths" / dataset.manifest_sha256
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"?", b"", whole + b"?"):
        file.write_bytes(damaged)
        assert kept_lengths(dataset.manifest_sha256, dataset.shards) is None
    lengths.completion[0] += 1
    lengths.completion[-1] -= 1
    keep_lengths(dataset.manifest_sha256, lengths)  # sealed, and the sum over all shards is right
    assert kept_lengths(dataset.manifest_sha256, dataset.shards) is None


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_copy(dataset: Dataset, own_cache: Path) -> None:
    (own_cache / "lengths").write_text("a file where the folder should be")
    keep_lengths(dataset.manifest_sha256, dataset.row_lengths())
    assert kept_lengths(dataset.manifest_sha256, dataset.shards) is None


def test_a_missing_shard_is_named_although_many_are_read_at_once(dataset: Dataset) -> None:
    (Path(dataset.url) / dataset.shards[13].file).unlink()
    with pytest.raises(DataError, match=r"the shard is missing .*data/000013"):
        dataset.row_lengths()


def test_the_next_run_reads_no_shard_of_a_remote_dataset_for_its_lengths(s3: str, own_cache: Path) -> None:
    expected = open_dataset(make_dataset(s3)).row_lengths()
    for commit in open_dataset(s3).shards:
        Store(s3).remove(commit.file)
    for file in (own_cache / "shards").iterdir():
        file.unlink()
    assert same(open_dataset(s3).row_lengths(), expected)
