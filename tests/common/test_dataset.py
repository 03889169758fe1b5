import hashlib
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from common.canonical import seal, unseal
from common.dataset import Dataset, is_finished, open_dataset, require_kind
from common.dataset_writer import DatasetWriter, create_dataset
from common.errors import DataError, UsageError
from common.lineage import DatasetRef, Provenance
from common.plans import dataset_id
from common.records import read_commit
from common.schema import to_rows, to_table
from common.storage import Store
from tests.common.rows import IDENTITY, make_plan, make_row, make_shard, make_table, same_rows

SHARDS = 3


def make_dataset(url: str, shards: int = SHARDS, topk: int = 0) -> str:
    """A finished dataset at `url`; returns its manifest's hash."""
    writer = create_dataset(url, make_plan(shards, topk=topk))
    for shard in writer.pending():
        writer.commit(shard, make_shard(shard, topk=topk), {"mean_length": 4.0})
    return writer.finalize()


def shard_file(folder: Path, shard: int) -> Path:
    return next(folder.glob(f"data/{shard:06d}-*.parquet"))


def edit_record(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed record and seal it again, as one who means harm would."""
    value = unseal(file.read_bytes(), str(file))
    change(value)
    file.write_bytes(seal(value))


def lineage_of(url: str) -> dict[str, Any]:
    """The lineage of a student fine-tuned on the dataset at `url`."""
    sft_data = DatasetRef(manifest_sha256="e" * 64, url=url)
    return Provenance(role="sft", sft_data=sft_data).model_dump(mode="json")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished dataset in a local folder."""
    make_dataset(str(tmp_path / "dataset"))
    return tmp_path / "dataset"


@pytest.mark.parametrize("topk", [0, 2])
def test_what_was_committed_is_read_back(location: str, topk: int) -> None:
    manifest_sha256 = make_dataset(location, topk=topk)
    dataset = open_dataset(location)

    assert dataset.manifest_sha256 == manifest_sha256
    assert (dataset.num_shards, dataset.num_rows, dataset.topk, dataset.kind) == (SHARDS, 9, topk, "scored")
    for shard in range(SHARDS):
        assert same_rows(to_rows(dataset.read_shard(shard)), to_rows(make_shard(shard, topk=topk)))
    assert dataset.num_tokens == sum(
        len(row.completion_ids) for shard in range(3) for row in to_rows(make_shard(shard))
    )


def test_a_pinned_dataset_is_that_one_or_refused(location: str) -> None:
    pin = make_dataset(location)
    assert open_dataset(location, pin).manifest_sha256 == pin
    with pytest.raises(DataError, match=f"another dataset lies here: its manifest has sha256 {pin}, not {'0' * 64}"):
        open_dataset(location, "0" * 64)


def test_a_resumed_job_does_only_what_is_left(location: str) -> None:
    first = create_dataset(location, make_plan(4))
    assert first.pending() == [0, 1, 2, 3]
    first.commit(2, make_shard(2))

    again = create_dataset(location, make_plan(4))
    assert again.pending() == [0, 1, 3]
    with pytest.raises(DataError, match="3 of 4 shards are not committed yet"):
        again.finalize()
    for shard in again.pending():
        again.commit(shard, make_shard(shard))
    again.finalize()

    assert again.pending() == []
    assert is_finished(location)


def test_the_first_commit_of_a_shard_wins_and_the_loser_takes_it_over(location: str) -> None:
    ours, theirs = (create_dataset(location, make_plan(1)) for _ in range(2))
    won = ours.commit(0, make_shard(0))
    lost = theirs.commit(0, make_shard(5))

    assert lost == won
    theirs.finalize()
    assert same_rows(to_rows(open_dataset(location).read_shard(0)), to_rows(make_shard(0)))


def test_many_workers_on_one_plan_make_one_dataset(location: str) -> None:
    def work(worker: int) -> str:
        writer = create_dataset(location, make_plan())
        for turn in range(SHARDS):
            shard = (worker + turn) % SHARDS
            if shard in writer.pending():
                writer.commit(shard, make_table(rows=2, first=100 * worker + 10 * shard))
        return writer.finalize()

    with ThreadPoolExecutor(3) as pool:
        hashes = set(pool.map(work, range(3)))

    dataset = open_dataset(location)
    assert hashes == {dataset.manifest_sha256}
    assert sum(len(dataset.read_shard(shard)) for shard in range(SHARDS)) == dataset.num_rows == 6


def test_finalizing_twice_gives_the_same_manifest(location: str) -> None:
    first = make_dataset(location)
    data = Store(location).get("MANIFEST.json")

    assert create_dataset(location, make_plan()).finalize() == first
    assert make_dataset(location) == first
    assert Store(location).get("MANIFEST.json") == data


def test_equal_plans_have_equal_ids_and_other_plans_others() -> None:
    shuffled = dict(reversed(make_plan().items()))
    assert dataset_id(make_plan()) == dataset_id(shuffled)
    assert dataset_id(make_plan()) != dataset_id(make_plan(vocab_size=101))


def test_names_of_a_box_do_not_make_another_dataset(location: str) -> None:
    """Two boxes hold the same weights in other folders: one plan, and the names of the first to come stay."""
    theirs = make_plan(1, lineage=lineage_of("s3://old"))
    renamed = {**IDENTITY, "name": "/home/me/model", "revision": "v1", "weights_sha256": "8" * 64}
    ours = {**theirs, "policy": renamed, "lineage": lineage_of("/new")}
    create_dataset(location, theirs)
    writer = create_dataset(location, ours)

    assert dataset_id(ours) == dataset_id(theirs)
    assert writer.plan == theirs
    writer.commit(0, make_shard(0))
    writer.finalize()
    dataset = open_dataset(location)
    assert dataset.plan["policy"]["name"] == "org/model"
    assert dataset.manifest["plan_sha256"] == hashlib.sha256(Store(location).get("plan.json")).hexdigest()
    ours["policy"] = {**renamed, "config_sha256": "f" * 64}
    with pytest.raises(DataError, match=r"it differs in policy.config_sha256 \("):
        create_dataset(location, ours)


def test_a_name_that_the_chat_template_reads_does_make_another_dataset(tmp_path: Path) -> None:
    ours, theirs = (
        make_plan(template={"mode": "chat", "system": None, "arguments": {"name": name}}) for name in ("Ann", "Bob")
    )
    create_dataset(str(tmp_path), ours)
    with pytest.raises(DataError, match=r"differs in template.arguments.name \("):
        create_dataset(str(tmp_path), theirs)


def test_a_long_value_stands_on_one_line_of_the_comparison(tmp_path: Path) -> None:
    create_dataset(str(tmp_path), make_plan(chat_template="{{ one }}\n" * 100))
    with pytest.raises(DataError) as raised:
        create_dataset(str(tmp_path), make_plan(chat_template="{{ two }}\n" * 100))
    assert len(str(raised.value).splitlines()) == 3
    assert max(len(line) for line in raised.value.detail.splitlines()) < 130


def test_a_table_that_breaks_the_contract_leaves_nothing(tmp_path: Path) -> None:
    writer = create_dataset(str(tmp_path), make_plan())
    bad = make_table(rollout_logprobs=np.array([-1, -1, -1, 0.5], np.float32))
    own = to_table([make_row(0, tokens=4, rollout_topk_ids=np.zeros((4, 3), np.int32))], 0, 3)
    for table, message in (
        (bad, "no log-prob"),
        (make_table(topk=2), "top-k of 2, the plan says 0"),
        (own, "the student's top-k of 3, the plan says 0"),
    ):
        with pytest.raises(DataError, match=f"{message}.*shard 1"):
            writer.commit(1, table)
    assert [entry.name for entry in Store(str(tmp_path)).list()] == ["plan.json"]


def test_an_unfinished_dataset_says_how_far_it_is_and_how_to_resume(location: str) -> None:
    writer = create_dataset(location, make_plan())
    writer.commit(1, make_shard(1))

    assert not is_finished(location)
    with pytest.raises(DataError, match=r"not finished: 1 of 3 shards are committed .*`lopd precompute`.*resumes"):
        open_dataset(location)


def test_where_nothing_is_there_is_no_dataset(location: str) -> None:
    with pytest.raises(DataError, match="there is no dataset here") as raised:
        open_dataset(location)
    assert location in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"vocab_size": 7}, "vocab_size"),
        ({"sampling": {**make_plan()["sampling"], "seed": 1}}, "sampling.seed"),
        ({"sampling": {"temperature": 1.0, "max_tokens": 8, "seed": 0}}, "sampling.stop_ids"),
        ({"template": {"mode": "chat", "system": None, "arguments": {"enable_thinking": False}}}, "enable_thinking"),
        ({"teacher": None}, "teacher"),
        ({"added": 1}, "added"),
    ],
)
def test_another_plan_at_the_same_url_names_the_keys_that_differ(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    plans = make_plan(), make_plan(**changes)
    for name, (there, here) in {"one": plans, "other": plans[::-1]}.items():
        url = str(tmp_path / name)
        create_dataset(url, there)
        with pytest.raises(DataError, match="another plan lies here") as raised:
            create_dataset(url, here)
        first, *table = str(raised.value).splitlines()
        assert key in first and url in first
        assert any(key in line for line in table[1:])
        for unchanged in ("topk", "sampling.temperature"):
            assert unchanged not in first


def test_another_version_of_the_schema_is_refused(finished: Path) -> None:
    edit_record(finished / "MANIFEST.json", lambda manifest: manifest.update(schema_version=99))
    with pytest.raises(DataError, match="schema version 99, this software reads version 2"):
        open_dataset(str(finished))


def remove(file: Path, other: Path) -> None:
    file.unlink()


def flip_a_bit(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_short(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def swap(file: Path, other: Path) -> None:
    shutil.copy(other, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(remove, "the shard is missing"), (flip_a_bit, "altered"), (cut_short, "altered"), (swap, "altered")],
)
@pytest.mark.parametrize("columns", [None, ["completion_ids"]])
def test_a_damaged_shard_is_refused_by_name(
    finished: Path, damage: Callable[[Path, Path], None], message: str, columns: list[str] | None
) -> None:
    file = shard_file(finished, 1)
    damage(file, shard_file(finished, 2))
    dataset = open_dataset(str(finished))

    assert len(dataset.read_shard(0, columns)) == 3
    with pytest.raises(DataError, match=f"{message}.*{file.name}"):
        dataset.read_shard(1, columns)


@pytest.mark.parametrize("damage", [remove, cut_short])
def test_a_shard_lost_before_the_end_is_noticed_by_finalize(
    tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    writer = create_dataset(str(tmp_path), make_plan(1))
    writer.commit(0, make_shard(0))
    damage(shard_file(tmp_path, 0), tmp_path)

    with pytest.raises(DataError, match="missing or has another size .*data/000000"):
        writer.finalize()
    assert not is_finished(str(tmp_path))


@pytest.mark.parametrize(
    "file", ["../outside.parquet", "/etc/passwd", "s3://other/data/000001-0123456789abcdef.parquet", "data/x.parquet"]
)
def test_a_manifest_that_points_elsewhere_is_refused(finished: Path, file: str) -> None:
    edit_record(finished / "MANIFEST.json", lambda manifest: manifest["shards"][1].update(file=file))
    with pytest.raises(DataError, match="not a path of a shard"):
        open_dataset(str(finished))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("rows"), "rows"),
        (lambda manifest: manifest.update(rows="many"), "rows"),
        (lambda manifest: manifest.update(rows=1), "counts of rows do not add up"),
        (lambda manifest: manifest.update(kind="other"), "kind: Input should be"),
        (lambda manifest: manifest["shards"].reverse(), "not in its place"),
        (lambda manifest: manifest["shards"][0].pop("sha256"), "shards.0.sha256"),
        (lambda manifest: manifest.update(extra=1), "extra"),
        (lambda manifest: manifest.pop("schema_version"), "schema version None"),
    ],
)
def test_a_malformed_manifest_says_what_is_wrong(
    finished: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_record(finished / "MANIFEST.json", change)
    with pytest.raises(DataError, match=f"{message}.*MANIFEST.json"):
        open_dataset(str(finished))


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe\x00", b""])
@pytest.mark.parametrize("name", ["MANIFEST.json", "commits/000001.json"])
def test_what_is_not_json_is_our_error(finished: Path, data: bytes, name: str) -> None:
    (finished / name).write_bytes(data)
    with pytest.raises(DataError, match=f"not (valid JSON|a JSON object).*{name}"):
        create_dataset(str(finished), make_plan()).finalize() if "commits" in name else open_dataset(str(finished))


@pytest.mark.parametrize("record", ["plan.json", "commits/000001.json", "MANIFEST.json"])
def test_a_record_with_one_flipped_bit_is_refused_wherever_it_flips(finished: Path, record: str) -> None:
    """A flipped digit of a count is still JSON of the right shape."""
    file = finished / record
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(DataError, match=record):
            read_commit(Store(str(finished)), 1) if "commits" in record else open_dataset(str(finished))


def test_an_altered_or_missing_plan_is_refused(finished: Path) -> None:
    edit_record(finished / "plan.json", lambda plan: plan.update(vocab_size=10**6))
    with pytest.raises(DataError, match="plan.json is not the plan of this manifest"):
        open_dataset(str(finished))

    (finished / "plan.json").unlink()
    with pytest.raises(DataError, match="lost its plan.json"):
        open_dataset(str(finished))


def test_a_commit_of_another_shard_is_refused(finished: Path) -> None:
    shutil.copy(finished / "commits/000001.json", finished / "commits/000000.json")
    with pytest.raises(DataError, match=r"this is the commit of shard 1 .*000000"):
        create_dataset(str(finished), make_plan()).finalize()


def test_a_statistic_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="statistic mean_length is nan .*shard 0"):
        create_dataset(str(tmp_path), make_plan()).commit(0, make_shard(0), {"mean_length": float("nan")})


def test_every_shard_is_handed_out_once_and_not_what_others_committed_meanwhile(location: str) -> None:
    ours, theirs = (create_dataset(location, make_plan(12)) for _ in range(2))
    taken = []
    for shard in ours.shards_left():
        taken.append(shard)
        ours.commit(shard, make_shard(shard))
        if len(taken) == 4:
            others = theirs.pending()[:4]
            for other in others:
                theirs.commit(other, make_shard(other))
            time.sleep(0.5)  # for `ours` to list again
    assert len(taken) == len(set(taken)) == 8
    assert not set(taken) & set(others)


def test_workers_take_the_shards_in_different_orders(tmp_path: Path) -> None:
    orders = {tuple(create_dataset(str(tmp_path), make_plan(20)).shards_left()) for _ in range(3)}
    assert len(orders) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(20))}


def test_a_shard_that_breaks_the_contract_is_refused_at_reading_too(finished: Path) -> None:
    """Other software may have written it: every hash fits, the rows do not."""
    edit_record(finished / "plan.json", lambda plan: plan.update(vocab_size=10))
    plan = (finished / "plan.json").read_bytes()
    said = {"plan_sha256": hashlib.sha256(plan).hexdigest(), "dataset_id": dataset_id(unseal(plan, "plan.json"))}
    edit_record(finished / "MANIFEST.json", lambda manifest: manifest.update(said))

    with pytest.raises(DataError, match=r"outside the vocabulary of 10 .*data/000000.*, row"):
        open_dataset(str(finished)).read_shard(0)


def test_columns_are_read_alone_and_in_the_order_asked(finished: Path) -> None:
    dataset = open_dataset(str(finished))
    whole = dataset.read_shard(1)

    assert dataset.read_shard(1, ["meta", "uid"]).equals(whole.select(["meta", "uid"]))


def test_row_lengths_name_place_and_size_of_every_row(location: str) -> None:
    make_dataset(location)
    dataset = open_dataset(location)
    lengths = dataset.row_lengths()

    assert len(lengths.row) == dataset.num_rows
    for shard, row, prompt, completion in zip(
        lengths.shard, lengths.row, lengths.prompt, lengths.completion, strict=True
    ):
        rollout = to_rows(dataset.read_shard(int(shard)))[int(row)]
        assert (len(rollout.prompt_ids), len(rollout.completion_ids)) == (prompt, completion)


def test_the_local_copy_of_a_remote_shard_is_verified_and_repaired(s3: str, own_cache: Path) -> None:
    make_dataset(s3)
    dataset = open_dataset(s3)
    expected = dataset.read_shard(0)
    copy = own_cache / "shards" / f"{dataset.shards[0].sha256}.parquet"
    whole = copy.read_bytes()

    flip_a_bit(copy, copy)
    assert open_dataset(s3).read_shard(0).equals(expected)
    assert copy.read_bytes() == whole


def test_a_shard_in_the_local_cache_is_read_from_there(s3: str) -> None:
    make_dataset(s3)
    dataset = open_dataset(s3)
    expected = dataset.read_shard(0)
    Store(s3).put(dataset.shards[0].file, b"gone")

    assert dataset.read_shard(0).equals(expected)
    with pytest.raises(DataError, match="altered"):
        Store(s3).put(dataset.shards[1].file, b"gone")
        dataset.read_shard(1)


def test_a_dataset_of_this_machine_is_not_copied_into_the_cache(tmp_path: Path, own_cache: Path) -> None:
    url = (tmp_path / "a dataset").as_uri()
    make_dataset(url)
    assert len(open_dataset(url).read_shard(0)) == 3
    assert not (own_cache / "shards").exists()


def test_a_cache_that_cannot_be_written_costs_the_copy_not_the_read(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOPD_CACHE_DIR", str(tmp_path / "file"))
    assert len(open_dataset(s3).read_shard(0)) == 3


def test_an_orphan_of_a_dead_worker_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "000000-0123456789abcdef.parquet").write_bytes(b"half")
    make_dataset(str(tmp_path))

    assert open_dataset(str(tmp_path)).num_rows == 9
    assert "0123456789abcdef" not in (tmp_path / "README.md").read_text()


def test_nothing_secret_is_written(s3: str) -> None:
    store = Store(s3)
    make_dataset(s3.replace("s3://", "s3://key:canary-password@"))
    for entry in store.list():
        assert b"canary" not in store.get(entry.name)


def test_another_kind_is_refused_with_the_command_that_makes_the_right_one(finished: Path) -> None:
    dataset = open_dataset(str(finished))
    require_kind(dataset, "scored")
    with pytest.raises(UsageError, match="kind 'scored', 'rollouts' is needed .*lopd precompute rollouts"):
        require_kind(dataset, "rollouts")


@pytest.mark.parametrize("topk", [0, 2])
def test_datasets_and_duckdb_read_the_files_as_they_lie(tmp_path: Path, topk: int) -> None:
    import datasets

    folder = tmp_path / "dataset"
    make_dataset(str(folder), topk=topk)
    rows = [row for shard in range(SHARDS) for row in to_rows(make_shard(shard, topk=topk))]
    lengths = [len(row.completion_ids) for row in rows]

    loaded = datasets.load_dataset(
        "parquet", data_files=str(folder / "data" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded, datasets.Dataset)
    assert [len(row) for row in loaded["teacher_logprobs"]] == lengths
    assert np.array_equal(loaded[4]["rollout_logprobs"], rows[4].rollout_logprobs)
    found = duckdb.execute(
        f"select len(completion_ids), len(rollout_logprobs), list_sum(completion_ids), uid "
        f"from '{folder}/data/*.parquet' order by filename, file_row_number"
    ).fetchall()
    assert found == [
        (size, size, int(row.completion_ids.sum()), row.uid) for size, row in zip(lengths, rows, strict=True)
    ]
    if topk:
        assert [[len(token) for token in row] for row in loaded["teacher_topk_ids"]] == [
            [topk] * size for size in lengths
        ]


def test_the_card_loads_exactly_the_committed_files(finished: Path) -> None:
    import yaml

    card = (finished / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    committed = [shard.file for shard in open_dataset(str(finished)).shards]

    assert front["configs"][0]["data_files"] == committed
    assert "Overridden" not in card


def test_an_override_is_stamped_into_manifest_and_card(tmp_path: Path) -> None:
    writer: DatasetWriter = create_dataset(str(tmp_path), make_plan(1, overrides=["teacher-mismatch"]))
    writer.commit(0, make_shard(0))
    writer.finalize()

    assert open_dataset(str(tmp_path)).manifest["overrides"] == ("teacher-mismatch",)
    assert "teacher-mismatch" in (tmp_path / "README.md").read_text()


def test_a_commit_table_in_chunks_is_stored_whole(tmp_path: Path) -> None:
    writer = create_dataset(str(tmp_path), make_plan(1))
    parts = [make_table(rows=2, first=first) for first in (0, 10)]
    commit = writer.commit(0, pa.concat_tables(parts))

    assert commit.rows == 4
    assert commit.tokens == sum(len(row.completion_ids) for part in parts for row in to_rows(part))
    assert commit.prompt_tokens == sum(len(row.prompt_ids) for part in parts for row in to_rows(part))
    assert make_row(10).uid in open_finished(writer).read_shard(0)["uid"].to_pylist()


def open_finished(writer: DatasetWriter) -> Dataset:
    writer.finalize()
    return open_dataset(writer.url)
