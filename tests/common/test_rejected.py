"""Rows that are left out: named by their commit, shown, and no trouble to any reader, even where none is left."""

from pathlib import Path

import pytest

from common.canonical import seal, unseal
from common.card import dataset_card
from common.dataset import Dataset, open_dataset
from common.dataset_writer import DatasetWriter, create_dataset
from common.errors import DataError
from common.lengths import keep_lengths, kept_lengths
from common.records import commit_key, read_commit
from common.rejected import REASON, Rejected, rejected_lines
from common.schema import to_rows, to_table
from tests.common.rows import make_plan, make_row, make_shard, make_table, same_rows

EMPTY = 1
"""The shard of which nothing is left."""


def make_holes(url: str, topk: int = 0) -> DatasetWriter:
    """A finished dataset of four shards: two of three rows, one without rows, and one without rows at the end."""
    writer = create_dataset(url, make_plan(4, topk=topk))
    writer.commit(0, make_shard(0, topk=topk), {"truncated": 1.0}, {"p8/0": "engine died", "p9/0": "engine died"})
    writer.commit(EMPTY, to_table([], topk), {"truncated": 0.0}, {"p10/0": "two\nlines"})
    writer.commit(2, make_shard(2, topk=topk))
    writer.commit(3, make_table(topk=topk).slice(0, 0))
    writer.finalize()
    return writer


@pytest.mark.parametrize("topk", [0, 2])
def test_a_shard_without_rows_is_read_like_any_other(location: str, topk: int) -> None:
    make_holes(location, topk)
    dataset = open_dataset(location)
    assert [len(dataset.read_shard(shard)) for shard in range(4)] == [3, 0, 3, 0]
    assert dataset.read_shard(EMPTY).schema.equals(dataset.read_shard(0).schema)
    assert [sum(map(len, dataset.iter_row_groups(shard))) for shard in range(4)] == [3, 0, 3, 0]
    assert to_rows(dataset.read_shard(EMPTY)) == []
    assert len(dataset.read_shard(EMPTY, columns=["uid"])) == 0
    assert same_rows(to_rows(dataset.read_shard(2)), to_rows(make_shard(2, topk=topk)))
    assert (dataset.num_rows, dataset.shards[EMPTY].tokens, dataset.shards[EMPTY].prompt_tokens) == (6, 0, 0)


def lengths_kept_and_read(dataset: Dataset) -> tuple[list[int], list[int]]:
    read = dataset.row_lengths()
    keep_lengths(dataset.manifest_sha256, read)
    kept = kept_lengths(dataset.manifest_sha256, dataset.shards)
    assert kept is not None
    return kept.shard.tolist(), read.shard.tolist()


def test_lengths_skip_a_shard_without_rows_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPD_CACHE_DIR", str(tmp_path / "cache"))
    make_holes(str(tmp_path / "data"))
    kept, read = lengths_kept_and_read(open_dataset(str(tmp_path / "data")))
    assert kept == read == [0, 0, 0, 2, 2, 2]


def test_rejected_rows_stand_in_commit_and_manifest_with_their_reasons(location: str) -> None:
    writer = make_holes(location)
    said = (Rejected(uid="p8/0", reason="engine died"), Rejected(uid="p9/0", reason="engine died"))
    assert read_commit(writer.store, 0).rejected == said
    assert open_dataset(location).shards[0].rejected == said
    assert open_dataset(location).shards[EMPTY].rejected == (Rejected(uid="p10/0", reason="two lines"),)


def test_the_card_tells_how_many_rows_were_rejected_and_why(tmp_path: Path) -> None:
    make_holes(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert (
        "| rejected rows | `2 by the reason: engine died (p8/0, p9/0)`, `1 by the reason: two lines (p10/0)` |" in card
    )


def test_where_nothing_is_rejected_records_and_card_are_those_of_before(tmp_path: Path) -> None:
    """Datasets that were written before there were rejected rows keep their hashes when they are copied or shown."""
    writer = create_dataset(str(tmp_path), make_plan(1))
    commit = writer.commit(0, make_shard(0), {"truncated": 0.0})
    digest = writer.finalize()
    record = unseal((tmp_path / commit_key(0)).read_bytes(), "")
    keys = {"shard", "file", "sha256", "bytes", "rows", "prompt_tokens", "tokens", "stats"}
    assert set(record) == keys
    assert seal(commit.model_dump()) == (tmp_path / commit_key(0)).read_bytes()
    dataset = open_dataset(str(tmp_path))
    assert seal(dataset.manifest) == (tmp_path / "MANIFEST.json").read_bytes()
    assert digest in dataset_card(dataset.plan, dataset.manifest)
    assert "rejected" not in dataset_card(dataset.plan, dataset.manifest)


def test_a_dataset_without_any_row_is_not_finished_and_says_why(location: str) -> None:
    writer = create_dataset(location, make_plan(2))
    writer.commit(0, to_table([]))
    writer.commit(1, to_table([]), rejected={"p1/0": "out of memory"})
    with pytest.raises(DataError, match=r"no shard has any row; 1 were rejected, the first \(p1/0\): out of memory"):
        writer.finalize()
    with pytest.raises(DataError, match="not finished"):
        open_dataset(location)


def test_a_row_is_not_rejected_and_kept(tmp_path: Path) -> None:
    row = make_row(3)
    with pytest.raises(DataError, match=f"it is rejected, and a row of the shard .*row {row.uid}"):
        create_dataset(str(tmp_path), make_plan()).commit(1, to_table([row]), rejected={row.uid: "poison"})
    assert not (tmp_path / "data").exists()


def test_a_reason_is_one_line_and_never_a_page(tmp_path: Path) -> None:
    writer = create_dataset(str(tmp_path), make_plan())
    commit = writer.commit(0, make_shard(0), rejected={"a/0": "x\n" * 10_000, "b/0": " \n"})
    assert [len(row.reason) for row in commit.rejected] == [REASON, len("no reason was given")]
    assert "\n" not in commit.rejected[0].reason


def test_frequent_reasons_are_told_first_and_the_rest_counted() -> None:
    rows = [Rejected(uid=f"{reason}{number}", reason=reason * 3) for reason in "abcde" for number in range(ord(reason))]
    lines = rejected_lines(rows)
    assert lines[0] == "101 by the reason: eee (e0, e1, e2 and 98 more)"
    assert lines[-1] == f"{ord('a') + ord('b')} for 2 other reasons"
    assert len(lines) == 4
    assert rejected_lines([]) == []
