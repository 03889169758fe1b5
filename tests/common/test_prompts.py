import datetime
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import DataError, LopdError, StorageError
from common.prompt_spool import ROWS as BATCH
from common.prompts import load_prompts, open_prompts
from common.storage import Store
from tests.common import scripts
from tests.common.faults import Failing, Fault, Kind

MOST_MEMORY = """
import sys
from common.prompts import load_prompts
assert sum(len(prompt.text) == 1000 for prompt in load_prompts(sys.argv[1]).prompts) % 1000 == 0
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ROWS = [{"prompt": "What is 1+1?", "answer": 2}, {"prompt": "Größe?", "answer": "ja", "source": "x"}]


def write_jsonl(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_text_prompts_come_in_order_with_all_else_as_meta(tmp_path: Path, write: Any) -> None:
    rows = [{"question": f"What is {index}?", "answer": index} for index in range(5)]
    prompts = load_prompts(write(tmp_path / f"p.{write.__name__[6:]}", rows)).prompts

    assert [prompt.text for prompt in prompts] == [row["question"] for row in rows]
    assert [json.loads(prompt.meta) for prompt in prompts] == [{"answer": index} for index in range(5)]
    assert len({prompt.id for prompt in prompts}) == 5


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_messages_are_prompts_too(tmp_path: Path, write: Any) -> None:
    (prompt,) = load_prompts(write(tmp_path / f"p.{write.__name__[6:]}", [{"messages": MESSAGES, "level": 3}])).prompts

    assert prompt.messages == MESSAGES
    assert prompt.as_text() == "system: Be brief.\nuser: Hi"
    assert json.loads(prompt.meta) == {"level": 3}


def test_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", [{"prompt": "third"}])
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "first"}, {"prompt": "second"}])
    (tmp_path / "README.md").write_text("not a prompt")

    assert [prompt.text for prompt in load_prompts(str(tmp_path)).prompts] == ["first", "second", "third"]


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "test.jsonl"],
        ["data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"],
        ["main/train.jsonl", "socratic/train.jsonl"],
        ["train/a.jsonl", "dev/a.jsonl"],
        ["prompts.jsonl", "prompts_eval.jsonl"],
        ["prompts.jsonl", "more/prompts.jsonl"],
    ],
)
def test_a_folder_of_several_splits_is_refused_by_their_names(location: str, names: list[str]) -> None:
    for name in names:
        Store(location).put(name, b'{"prompt": "x"}')
    with pytest.raises(DataError, match="several splits or configurations lie here") as raised:
        load_prompts(location)
    assert all(name in str(raised.value) for name in names) and "\n" not in str(raised.value)
    assert len(load_prompts(f"{location}/{names[0]}").prompts) == 1


def test_one_split_of_several_is_named_by_its_folder_or_its_files(location: str) -> None:
    for name in ("train-0", "train-1", "test-0", "old/train-0"):
        Store(location).put(f"data/{name}.jsonl", json.dumps({"prompt": name}).encode())

    assert [prompt.text for prompt in load_prompts(f"{location}/data/train-*.jsonl").prompts] == ["train-0", "train-1"]
    assert [prompt.text for prompt in load_prompts(f"{location}/data/old").prompts] == ["old/train-0"]
    with pytest.raises(DataError, match=r"several splits .*test-0.jsonl, train-0.jsonl"):
        load_prompts(f"{location}/data/t*.jsonl")
    with pytest.raises(DataError, match=r"no .jsonl or .parquet file is here .*none-\*"):
        load_prompts(f"{location}/data/none-*.jsonl")


def test_a_word_within_another_names_no_split(tmp_path: Path) -> None:
    for name in ("latest", "training_set", "constraints.train"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    with pytest.raises(DataError, match="several splits"):
        load_prompts(str(tmp_path))
    (tmp_path / "latest.jsonl").unlink()
    assert len(load_prompts(str(tmp_path)).prompts) == 2


def test_prompts_are_read_from_any_url(location: str, tmp_path: Path) -> None:
    data = Path(write_jsonl(tmp_path / "p.jsonl", ROWS)).read_bytes()
    Store(location).put("deep/p.jsonl", data)

    alone = load_prompts(f"{location}/deep/p.jsonl")
    assert [prompt.text for prompt in alone.prompts] == ["What is 1+1?", "Größe?"]
    assert load_prompts(location).sha256 == alone.sha256 == load_prompts(str(tmp_path / "p.jsonl")).sha256
    with pytest.raises(DataError, match=r"does not exist .*deep/none.jsonl"):
        load_prompts(f"{location}/deep/none.jsonl")


def test_the_source_is_written_down_without_secrets(s3: str, tmp_path: Path) -> None:
    Store(s3).put("p.jsonl", b'{"prompt": "x"}')
    secretive = s3.replace("s3://", "s3://key:canary@") + "/p.jsonl"
    assert load_prompts(secretive).source == f"{s3}/p.jsonl"


def test_a_relative_path_and_blank_lines_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('\n{"prompt": "x"}\r\n\n{"prompt": "y"}')
    assert [prompt.text for prompt in load_prompts("p.jsonl").prompts] == ["x", "y"]


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": "y"}\nnot read\n')
    assert [prompt.text for prompt in load_prompts(str(file), limit=2).prompts] == ["x", "y"]


def test_the_hash_changes_with_whatever_changes_the_prompts(tmp_path: Path) -> None:
    variants = [
        [{"prompt": "a"}],
        [{"prompt": "b"}],
        [{"prompt": "a", "answer": 1}],
        [{"prompt": "a", "id": "1"}],
        [{"prompt": "a"}, {"prompt": "b"}],
        [{"prompt": "b"}, {"prompt": "a"}],
        [{"prompt": [{"role": "user", "content": "a"}]}],
    ]
    hashes = {load_prompts(write_jsonl(tmp_path / "p.jsonl", rows)).sha256 for rows in variants}
    again = load_prompts(write_jsonl(tmp_path / "elsewhere.jsonl", variants[0])).sha256

    assert len(hashes) == len(variants)
    assert again in hashes


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=8)
)
def test_any_text_survives_and_ids_are_distinct(texts: list[str]) -> None:
    data = "".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode()
    Store("memory://prompts").put("p.jsonl", data)
    prompts = load_prompts("memory://prompts/p.jsonl").prompts

    assert [prompt.text for prompt in prompts] == texts
    assert len({prompt.id for prompt in prompts}) == len(texts)


def test_a_repeated_prompt_without_id_is_sampled_anew(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "x", "id": None}]
    ids = [prompt.id for prompt in load_prompts(write_jsonl(tmp_path / "p.jsonl", rows)).prompts]
    assert len(set(ids)) == 3


def test_a_given_id_is_kept_and_must_be_unique(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "task_id": "t/1"}, {"prompt": "y", "task_id": "t/2"}]
    assert [prompt.id for prompt in load_prompts(write_jsonl(tmp_path / "p.jsonl", rows)).prompts] == ["t/1", "t/2"]

    with pytest.raises(DataError, match=r"prompt id 't/1' stands 3 times .*q.jsonl"):
        load_prompts(write_jsonl(tmp_path / "q.jsonl", rows + rows[:1] * 2))


def test_a_named_column_is_taken_and_a_wrong_one_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "no", "instruction": "yes"}])
    assert load_prompts(file, column="instruction").prompts[0].text == "yes"

    with pytest.raises(DataError, match=r"has not column 'instructions' .*p.jsonl:1.*Did you mean 'instruction'"):
        load_prompts(file, column="instructions")
    with pytest.raises(DataError, match=r"has not any of the columns prompt, messages, .*Known: body"):
        load_prompts(write_jsonl(tmp_path / "q.jsonl", [{"body": "x"}]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x"', "bad JSON"),
        (b'{"prompt": "\xff"}', "bad JSON"),
        (b'["x"]', "must be a JSON object, not list"),
        (b'{"prompt": "  "}', "the prompt is empty"),
        (b'{"prompt": null}', "must be text or a list"),
        (b'{"prompt": []}', "must be text or a list"),
        (b'{"prompt": [{"role": "user"}]}', "must be text or a list"),
        (b'{"prompt": [{"role": "user", "content": [1]}]}', "must be text or a list"),
        (b"{}", "has not any of the columns"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"{message}.*p.jsonl:3"):
        load_prompts(str(file))


def test_a_bad_row_of_parquet_is_refused_with_its_number(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "p.parquet", [{"prompt": "fine"}, {"prompt": " "}])
    with pytest.raises(DataError, match=r"the prompt is empty .*p.parquet, row 2"):
        load_prompts(file)


def test_values_that_json_does_not_know_travel_as_text(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "p.parquet", [{"prompt": "x", "when": datetime.date(2026, 1, 2)}])
    assert json.loads(load_prompts(file).prompts[0].meta) == {"when": "2026-01-02"}
    with pytest.raises(DataError, match="must be text or a list"):
        load_prompts(file, column="when")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet", "folder"])
def test_a_missing_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        load_prompts(str(tmp_path / name))


def test_a_hub_dataset_without_the_hub_says_so() -> None:
    with pytest.raises(StorageError, match="the Hub is switched off .hf://datasets/org/name.*HF_HUB_OFFLINE"):
        load_prompts("hf://datasets/org/name")


def test_an_empty_source_or_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n\n")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match="there are no prompts .*p.jsonl"):
        load_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match="not readable Parquet.*p.parquet"):
        load_prompts(str(tmp_path / "p.parquet"))
    with pytest.raises(LopdError, match="missing-bucket|cannot open"):
        load_prompts("nonsense://missing-bucket/p.jsonl")


def test_prompts_are_a_sequence_in_the_order_of_their_source(tmp_path: Path) -> None:
    texts = [f"prompt {number}" for number in range(2 * BATCH + 7)]
    prompts = load_prompts(write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])).prompts
    assert len(prompts) == len(texts)
    assert [prompt.text for prompt in prompts] == texts
    for places in (
        slice(0, 3), slice(BATCH - 1, BATCH + 1), slice(5, 5), slice(9, 2), slice(-4, None), slice(None, None, 100),
        slice(2 * BATCH, 9 * BATCH), slice(None, None, -1),
    ):  # fmt: skip
        assert [prompt.text for prompt in prompts[places]] == texts[places]
    assert [prompts[place].text for place in (0, BATCH, -1)] == [texts[place] for place in (0, BATCH, -1)]
    with pytest.raises(IndexError):
        prompts[len(texts)]


@given(
    st.lists(
        st.tuples(st.text(min_size=1).filter(str.strip), st.booleans(), st.dictionaries(st.text(), st.integers())),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_as_it_was_under_the_hash_that_plans_have(
    tmp_path: Path, rows: list[tuple[str, bool, dict[str, int]]]
) -> None:
    records = [
        {"id": str(number), "prompt": [{"role": "user", "content": text}] if talk else text, "more": more}
        for number, (text, talk, more) in enumerate(rows)
    ]
    loaded = load_prompts(write_jsonl(tmp_path / "p.jsonl", records))
    digest = hashlib.sha256()
    for record, prompt in zip(records, loaded.prompts, strict=True):
        text, messages = ("", record["prompt"]) if isinstance(record["prompt"], list) else (record["prompt"], None)
        meta = json.dumps({"id": record["id"], "more": record["more"]}, sort_keys=True, ensure_ascii=False)
        assert (prompt.id, prompt.text, prompt.messages, prompt.meta) == (record["id"], text, messages, meta)
        assert messages is None or list((prompt.messages or [])[0]) == ["role", "content"]
        digest.update(json.dumps([prompt.id, text, messages, meta], sort_keys=True).encode())
    assert loaded.sha256 == digest.hexdigest()


def test_lines_end_as_python_ends_them(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\r\n\r{"prompt": "b"}\r{"prompt": "c"}\n\nnonsense')
    with pytest.raises(DataError, match="bad JSON.*p.jsonl:6"):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_another_process_opens_them_by_their_hash_without_their_source(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    loaded = load_prompts(file)
    Path(file).unlink()
    opened = open_prompts(loaded.sha256, file)
    assert [prompt.text for prompt in opened.prompts] == ["x", "y"]
    assert (opened.sha256, opened.source) == (loaded.sha256, loaded.source)


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "bit"])
def test_a_damaged_copy_is_not_trusted_but_made_again(tmp_path: Path, own_cache: Path, damage: str) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"prompt {number}"} for number in range(600)])
    digest = load_prompts(file).sha256
    copy = own_cache / "prompts" / f"{digest}.arrow"
    data = copy.read_bytes()
    place = data.index(b"prompt 300")
    harmed = {"empty": b"", "cut": data[: len(data) // 2], "bit": data[:place] + b"P" + data[place + 1 :]}
    if damage == "gone":
        copy.unlink()
    else:
        copy.write_bytes(harmed[damage])

    assert open_prompts(digest, file).prompts[300].text == "prompt 300"
    assert copy.read_bytes() == data


def test_prompts_that_changed_since_the_plan_are_refused(tmp_path: Path, own_cache: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}])
    digest = load_prompts(file).sha256
    (own_cache / "prompts" / f"{digest}.arrow").unlink()
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "z"}])
    with pytest.raises(DataError, match="no longer those of the plan .*p.jsonl"):
        open_prompts(digest, file)


def test_nothing_half_made_stays_and_old_leavings_go(tmp_path: Path, own_cache: Path) -> None:
    folder = own_cache / "prompts"
    folder.mkdir()
    for name, age in ((".dead.part", 2 * 86400), (".alive.part", 60), ("old.arrow", 31 * 86400)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age, time.time() - age))
    rows = [{"prompt": "x"}] * 300
    with pytest.raises(DataError, match=r"p.jsonl:301"):
        load_prompts(write_jsonl(tmp_path / "p.jsonl", [*rows, {"prompt": " "}]))
    assert [file.name for file in folder.iterdir()] == [".alive.part"]

    kept = load_prompts(write_jsonl(tmp_path / "p.jsonl", rows)).sha256
    assert {file.name for file in folder.iterdir()} == {".alive.part", f"{kept}.arrow"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOPD_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot write.*file/prompts"):
        load_prompts(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}]))


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path) -> None:
    most = []
    for count in (3_000, 24_000):
        file = write_jsonl(tmp_path / f"{count}.jsonl", [{"prompt": f"{number:01000}"} for number in range(count)])
        result = scripts.run(MOST_MEMORY, file)
        assert result.returncode == 0, result.stderr
        most.append(int(result.stdout))
    assert most[1] - most[0] < 8 * 2**20, "24 MB of prompts"


def test_a_large_file_is_read_in_one_request_whose_checksum_tells_a_flipped_bit(s3: str, failing: Failing) -> None:
    store, text = Store(s3), "x" * 51 * 2**20  # more than s3fs reads at once
    store.put("p.jsonl", json.dumps({"prompt": text}).encode())
    with failing(Fault(Kind.FLIP, "GET", "p.jsonl", times=1, checksums=True)) as faults:
        assert load_prompts(f"{s3}/p.jsonl").prompts[0].text == text
    assert faults.injected[Kind.FLIP] == 1
