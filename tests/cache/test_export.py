"""`lopd cache export`: what is written is what was stored, in the layout of each reader.

The readers here are written from what the readers of those projects do, step by step; the projects themselves are not
installed.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from common import parquet, schema
from common.cache.export import export
from common.canonical import sha256, unseal
from common.lineage import TEACHER_MISMATCH
from common.records import MANIFEST, commit_key
from common.schema import Rollout, to_rows, to_table
from common.storage import Store
from common.urls import split_key
from tests.cache.datasets import flip, lopd, make_dataset, reseal
from tests.common.rows import IDENTITY, make_row, make_shard

FORMATS = [
    ("jsonl", "out.jsonl"),
    ("jsonl", "out.jsonl.gz"),
    ("trl", "o.parquet"),
    ("verl", "o.parquet"),
    ("slime", "o.parquet"),
]


def stored_rows(topk: int = 0) -> list[Rollout]:
    """The rows of `make_dataset`, in order."""
    return [row for shard in range(3) for row in to_rows(make_shard(shard, topk=topk))]


def unscored(kind: str) -> dict[str, Any]:
    """A dataset of the kind, without teacher log-probs."""
    table = lambda shard: to_table([make_row(10 * shard + row, scored=False) for row in range(3)])  # noqa: E731
    return {"kind": kind, "teacher": None, "table": table}


def opened(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file, as the library `datasets` gives them to TRL and verl."""
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "datasets"))
    assert isinstance(rows, Dataset)
    return rows.to_list()


def same(one: Any, other: Any) -> bool:
    """Equal in every value."""
    return np.array_equal(one, other)


def fetched(output: str, tmp_path: Path) -> Path:
    """The exported file on this machine."""
    folder, key = split_key(output)
    local = tmp_path / "fetched" / key
    Store(folder).fetch(key, local)
    return local


@pytest.mark.parametrize(("layout", "name"), FORMATS)
def test_every_format_goes_to_any_store_and_says_what_it_is(
    location: str, tmp_path: Path, layout: str, name: str
) -> None:
    make_dataset(f"{location}/data")
    ran = lopd("cache", "export", f"{location}/data", "--format", layout, "--output", f"{location}/{name}", "--json")
    file = fetched(f"{location}/{name}", tmp_path)
    assert ran.code == 0 and ran.json["output"] == f"{location}/{name}" and ran.json["rows"] == 9
    assert ran.json["bytes"] == file.stat().st_size and ran.json["sha256"] == sha256(file.read_bytes())
    assert (
        ran.json["manifest_sha256"]
        == lopd("cache", "inspect", f"{location}/data", "--json").json["facts"]["manifest_sha256"]
    )


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_jsonl_holds_every_column_exactly(tmp_path: Path, name: str) -> None:
    make_dataset(str(tmp_path / "data"), topk=3)
    assert (
        lopd("cache", "export", str(tmp_path / "data"), "--format", "jsonl", "--output", str(tmp_path / name)).code == 0
    )
    text = (tmp_path / name).read_bytes()
    lines = (gzip.decompress(text) if name.endswith(".gz") else text).decode().splitlines()
    stored = pa.concat_tables([make_shard(shard, topk=3) for shard in range(3)])
    assert pa.Table.from_pylist([json.loads(line) for line in lines], schema=schema.arrow_schema(3)).equals(stored)


def test_the_papers_trainer_reads_the_same_ids_and_log_probs(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), topk=3)
    lopd("cache", "export", str(tmp_path / "data"), "--format", "slime", "--output", str(tmp_path / "out.parquet"))
    read = read_as_slime(tmp_path / "out.parquet")
    assert len(read) == 9
    for got, row in zip(read, stored_rows(topk=3), strict=True):
        assert got["tokens"] == row.prompt_ids.tolist() + row.completion_ids.tolist()
        assert got["response_length"] == len(row.completion_ids) == len(got["loss_mask"])
        assert same(np.float32(got["teacher_log_probs"]), row.teacher_logprobs)
        assert same(np.float32(got["rollout_log_probs"]), row.rollout_logprobs)
        assert got["response"] == row.completion and got["label"] == "1"


def test_verl_slices_the_same_log_probs_out_of_a_replayed_row(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), topk=3)
    lopd("cache", "export", str(tmp_path / "data"), "--format", "verl", "--output", str(tmp_path / "out.parquet"))
    read = opened(tmp_path / "out.parquet")
    for got, row in zip(read, stored_rows(topk=3), strict=True):
        output, extra = got["agent_loop_output"], got["agent_loop_output"]["extra_fields"]
        assert (output["prompt_ids"], output["response_ids"]) == (row.prompt_ids.tolist(), row.completion_ids.tolist())
        assert output["response_mask"] == [1] * len(row.completion_ids)
        assert same(np.float32(output["response_logprobs"]), row.rollout_logprobs)
        assert verl_slice(extra["teacher_ids"], output).tolist() == [[number] for number in row.completion_ids]
        assert same(verl_slice(extra["teacher_logprobs"], output)[:, 0].astype(np.float32), row.teacher_logprobs)
        assert same(verl_slice(extra["teacher_topk_ids"], output), row.topk_ids)
        assert same(np.float32(verl_slice(extra["teacher_topk_logprobs"], output)), row.topk_logprobs)
        assert got["prompt"] == [{"role": "user", "content": row.prompt}]
        assert got["reward_model"] == {"style": "rule", "ground_truth": "1"} and got["extra_info"]["uid"] == row.uid
        assert got["data_source"].startswith("lightning-opd/") and got["ability"] == ""


def test_verl_has_top_k_only_where_it_is_stored(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    lopd("cache", "export", str(tmp_path / "data"), "--format", "verl", "--output", str(tmp_path / "out.parquet"))
    extra = pq.read_schema(tmp_path / "out.parquet").field("agent_loop_output").type.field("extra_fields").type
    assert [extra.field(index).name for index in range(extra.num_fields)] == ["teacher_ids", "teacher_logprobs"]


def test_trl_gets_what_a_rollout_function_returns(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    lopd("cache", "export", str(tmp_path / "data"), "--format", "trl", "--output", str(tmp_path / "out.parquet"))
    read = opened(tmp_path / "out.parquet")
    assert list(read[0]) == ["uid", "prompt", "prompt_ids", "completion_ids", "logprobs", "teacher_logprobs"]
    for got, row in zip(read, stored_rows(), strict=True):
        assert (got["prompt_ids"], got["completion_ids"]) == (row.prompt_ids.tolist(), row.completion_ids.tolist())
        assert same(np.float32(got["logprobs"]), row.rollout_logprobs)
        assert same(np.float32(got["teacher_logprobs"]), row.teacher_logprobs)
        assert got["prompt"] == row.prompt and got["uid"] == row.uid


def test_trl_gets_the_answers_of_a_teacher_tokenised_with_loss_on_the_answer_alone(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), **unscored("sft"))
    lopd("cache", "export", str(tmp_path / "data"), "--format", "trl", "--output", str(tmp_path / "out.parquet"))
    read = opened(tmp_path / "out.parquet")
    rows = [make_row(10 * shard + row, scored=False) for shard in range(3) for row in range(3)]
    for got, row in zip(read, rows, strict=True):
        assert got["input_ids"] == row.prompt_ids.tolist() + row.completion_ids.tolist()
        assert got["labels"] == [-100] * len(row.prompt_ids) + row.completion_ids.tolist()


@pytest.mark.parametrize("layout", ["slime", "trl", "verl"])
def test_rollouts_without_scores_are_refused_where_scores_are_needed(tmp_path: Path, layout: str) -> None:
    make_dataset(str(tmp_path / "data"), **unscored("rollouts"))
    output = tmp_path / "out.parquet"
    ran = lopd("cache", "export", str(tmp_path / "data"), "--format", layout, "--output", str(output))
    assert ran.code == 64 and "needs teacher log-probs" in ran.err and "lopd precompute score" in ran.err
    assert not output.exists()


@pytest.mark.parametrize("layout", ["slime", "verl"])
def test_the_answers_of_a_teacher_are_no_scored_rollouts(tmp_path: Path, layout: str) -> None:
    make_dataset(str(tmp_path / "data"), **unscored("sft"))
    ran = lopd("cache", "export", str(tmp_path / "data"), "--format", layout, "--output", str(tmp_path / "out.parquet"))
    assert ran.code == 64 and "--format trl or jsonl" in ran.err and "precompute score" not in ran.err


@pytest.mark.parametrize(("layout", "name"), [("slime", "out.jsonl"), ("jsonl", "out.parquet"), ("trl", "out")])
def test_a_name_that_its_reader_would_not_open_is_refused(tmp_path: Path, layout: str, name: str) -> None:
    make_dataset(str(tmp_path / "data"))
    ran = lopd("cache", "export", str(tmp_path / "data"), "--format", layout, "--output", str(tmp_path / name))
    assert ran.code == 64 and "ends in" in ran.err and not (tmp_path / name).exists()


def test_what_lies_there_is_replaced_only_when_told(location: str, tmp_path: Path) -> None:
    make_dataset(f"{location}/data")
    Store(location).put("out.jsonl", b"dear to somebody")
    command = ["cache", "export", f"{location}/data", "--format", "jsonl", "--output", f"{location}/out.jsonl"]
    ran = lopd(*command)
    assert ran.code == 64 and "--overwrite" in ran.err and Store(location).get("out.jsonl") == b"dear to somebody"
    assert lopd(*command, "--overwrite").code == 0
    assert len(Store(location).get("out.jsonl").splitlines()) == 9


def test_an_altered_shard_leaves_no_half_file(location: str) -> None:
    writer = make_dataset(f"{location}/data")
    flip(writer.store, writer.store.list("data")[2].name)
    ran = lopd("cache", "export", f"{location}/data", "--format", "jsonl", "--output", f"{location}/out.jsonl")
    assert ran.code == 65 and "altered" in ran.err
    assert [entry.name for entry in Store(location).list() if not entry.name.startswith("data/")] == []


@pytest.mark.parametrize(("layout", "name"), FORMATS)
def test_the_same_dataset_makes_the_same_bytes(tmp_path: Path, layout: str, name: str) -> None:
    make_dataset(str(tmp_path / "data"))
    made = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        lopd("cache", "export", str(tmp_path / "data"), "--format", layout, "--output", str(tmp_path / attempt / name))
        made.append((tmp_path / attempt / name).read_bytes())
    assert made[0] == made[1]


def test_overrides_go_along(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), overrides=[TEACHER_MISMATCH], policy=IDENTITY)
    command = [
        "cache",
        "export",
        str(tmp_path / "data"),
        "--format",
        "slime",
        "--output",
        str(tmp_path / "out.parquet"),
    ]
    assert lopd(*command).out.startswith(f"OVERRIDDEN: {TEACHER_MISMATCH}")
    stamp = pq.read_schema(tmp_path / "out.parquet").metadata
    assert json.loads(stamp[b"lopd.overrides"]) == [TEACHER_MISMATCH] and len(stamp[b"lopd.manifest_sha256"]) == 64
    assert lopd(*command, "--overwrite", "--json").json["overrides"] == [TEACHER_MISMATCH]


@pytest.mark.parametrize("meta", ["", "7", "[1]", "{}", '{"answer": null}'])
def test_a_prompt_without_an_answer_has_an_empty_label(tmp_path: Path, meta: str) -> None:
    make_dataset(str(tmp_path / "data"), shards=1, table=lambda _: to_table([make_row(meta=meta)]))
    lopd("cache", "export", str(tmp_path / "data"), "--format", "slime", "--output", str(tmp_path / "out.parquet"))
    assert read_as_slime(tmp_path / "out.parquet")[0]["label"] == ""


@pytest.mark.parametrize("meta", ["[" * 100_000, f'{{"answer": {"9" * 5000}}}'])
def test_meta_that_no_parser_takes_has_an_empty_label(tmp_path: Path, meta: str) -> None:
    make_dataset(str(tmp_path / "data"), shards=1, table=lambda _: to_table([make_row(meta=meta)]))
    lopd("cache", "export", str(tmp_path / "data"), "--format", "slime", "--output", str(tmp_path / "out.parquet"))
    assert read_as_slime(tmp_path / "out.parquet")[0]["label"] == ""


def test_half_a_character_in_an_answer_is_a_question_mark(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), shards=1, table=lambda _: to_table([make_row(meta='{"answer": "7\\ud800"}')]))
    lopd("cache", "export", str(tmp_path / "data"), "--format", "slime", "--output", str(tmp_path / "out.parquet"))
    assert read_as_slime(tmp_path / "out.parquet")[0]["label"] == "7?"


def test_a_bucket_is_no_file(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    ran = lopd("cache", "export", str(tmp_path / "data"), "--format", "jsonl", "--output", "s3://bucket.jsonl")
    assert ran.code == 64 and "names a bucket and no file" in ran.err


def test_one_row_group_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory: what is held is bounded by the row groups of the dataset, which are bounded by tokens."""
    monkeypatch.setattr(parquet, "ROW_GROUP_TOKENS", 16)
    make_dataset(str(tmp_path / "data"))
    made = export(str(tmp_path / "data"), "trl", str(tmp_path / "out.parquet"), overwrite=False)
    written = row_group_sizes(tmp_path / "out.parquet")
    stored = [size for shard in sorted((tmp_path / "data" / "data").iterdir()) for size in row_group_sizes(shard)]
    assert written == stored and sum(written) == made.rows == 9 and len(written) > 3


def row_group_sizes(path: Path) -> list[int]:
    file = pq.ParquetFile(path)
    return [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]


def read_as_slime(path: Path) -> list[dict[str, Any]]:
    """Samples as the paper's trainer makes them of a file: a pandas row, its metadata, a prompt that may be ids.

    It takes the number of ones in the loss mask for the length of the response, and later refuses a mask of another
    length; teacher log-probs that are missing become an empty list there, which is why none may be missing here.
    """
    samples = []
    for _, series in pd.read_parquet(path, dtype_backend="pyarrow").iterrows():
        row: Any = series.to_dict()
        metadata = row["metadata"]
        assert metadata["is_lightning_opd"] and not isinstance(row["prompt"], str)
        mask = [int(value) for value in metadata["loss_mask"]]
        samples.append(
            {
                "tokens": [int(value) for value in row["prompt"]]
                + [int(value) for value in metadata["response_tokens"]],
                "loss_mask": mask,
                "response_length": sum(mask),
                "response": metadata["response"],
                "teacher_log_probs": [float(value) for value in metadata["teacher_log_probs"]],
                "rollout_log_probs": [float(value) for value in metadata["student_log_probs"]],
                "label": row["label"],
            }
        )
    return samples


def verl_slice(values: list[list[float]], output: dict[str, Any]) -> np.ndarray:
    """The entries at the response, as verl takes them of a whole sequence: from one token before it to one before its
    end, because the entry at a token grades the next one."""
    length, response = len(output["prompt_ids"]) + len(output["response_ids"]), len(output["response_ids"])
    assert len(values) == length
    return np.array(values)[length - response - 1 : length - 1]


@pytest.mark.parametrize(
    "words", [("inspect",), ("export", "--format", "slime", "--output", "out.parquet"), ("verify",)]
)
def test_a_dataset_without_rows_is_refused_by_whoever_reads_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    writer = make_dataset(str(tmp_path / "data"), shards=1)
    empty = {"rows": 0, "prompt_tokens": 0, "tokens": 0}
    shard = unseal(writer.store.get(MANIFEST), MANIFEST)["shards"][0] | empty
    reseal(writer.store, commit_key(0), **empty)
    reseal(writer.store, MANIFEST, **empty, shards=[shard])
    ran = lopd("cache", words[0], str(tmp_path / "data"), *words[1:])
    assert ran.code == 65 and "greater than or equal to 1" in ran.out + ran.err
