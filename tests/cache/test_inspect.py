"""`lopd cache inspect` as a user runs it."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from common.cache import inspect_text
from common.cache.inspect import inspect
from common.cache.samples import spread
from common.chat import load_tokenizer
from common.lineage import PROVENANCE, TEACHER_MISMATCH, DatasetRef, ModelIdentity, Provenance, tokenizer_sha256
from common.schema import to_rows, to_table
from common.storage import Store
from tests.cache.datasets import flip, lopd, make_dataset
from tests.common.rows import IDENTITY, make_row, make_shard
from tests.common.tiny_models import make_model

TEACHER = ModelIdentity.model_validate(IDENTITY)
SFT = Provenance(role="sft", base_model=TEACHER, teacher=TEACHER, weights_sha256="3" * 64)


def all_rows(shards: int = 3) -> list[Any]:
    return [row for shard in range(shards) for row in to_rows(make_shard(shard))]


def test_json_holds_facts_statistics_lineage_and_rows(location: str) -> None:
    make_dataset(location, lineage=SFT.model_dump(mode="json"))
    ran = lopd("cache", "inspect", location, "--rows", "2", "--json")

    assert ran.code == 0
    facts = ran.json["facts"]
    stored = sum(entry.size for entry in Store(location).list("data"))
    rows = all_rows()
    tokens = sum(len(row.completion_ids) for row in rows)
    assert facts["kind"] == "scored" and facts["state"] == "complete" and facts["rows"] == 9
    assert facts["tokens"] == tokens and facts["bytes"] == stored
    assert facts["bytes_per_token"] == pytest.approx(stored / tokens)
    assert facts["columns"]["completion_ids"] == "list<int32>" and facts["created"]["owner"] == "ann"
    gap = np.concatenate([row.teacher_logprobs.astype(float) - row.rollout_logprobs for row in rows]).mean()
    assert ran.json["statistics"]["gap"]["mean"] == pytest.approx(gap)
    assert ran.json["lineage"]["made_from"][0]["marks"] == [{"text": "the SFT teacher", "level": "good"}]
    assert [row["uid"] for row in ran.json["samples"]] == [rows[index].uid for index in spread(9, 2)]


def test_text_says_what_json_says(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--rows", "1")
    assert ran.code == 0 and "\x1b" not in ran.out
    assert "begun by" in ran.out and "ann at 2026-01-02" in ran.out
    assert re.search(r"gap, teacher minus rollout +-?\d\.\d{4} ± \d\.\d{4} nats a token", ran.out)
    assert "└── rollouts" in ran.out and "finish reasons" in ran.out
    assert "What is" in ran.out and "the tokenizer of org/model is not on this machine" in ran.out


def test_reading_shows_progress_on_stderr(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    assert "9/9 (100%)" in lopd("cache", "inspect", str(tmp_path / "data"), "--json").err


def test_one_row_is_found_by_its_uid_and_shown_whole(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    wanted = all_rows()[7]
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--row", wanted.uid, "--json")
    (row,) = ran.json["samples"]
    assert row["uid"] == wanted.uid
    assert [number for piece in row["pieces"] for number in piece["ids"]] == wanted.completion_ids.tolist()
    assert ran.json["statistics"]["completion_tokens"]["max"] == max(len(row.completion_ids) for row in all_rows())


def test_a_uid_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--row", "p999")
    assert ran.code == 64 and "there is no row 'p999'" in ran.err


def test_overrides_are_seen_first_and_on_the_page(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), overrides=[TEACHER_MISMATCH])
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--html", str(tmp_path / "page.html"))
    assert ran.out.startswith(f"OVERRIDDEN: {TEACHER_MISMATCH}")
    assert f'<p class="alarm">Overridden checks: {TEACHER_MISMATCH}</p>' in (tmp_path / "page.html").read_text()


def test_tokens_are_read_with_the_policys_own_tokenizer_or_a_given_one(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    policy = IDENTITY | {"name": str(folder), "tokenizer_sha256": tokenizer_sha256(load_tokenizer(folder))}
    here = make_dataset(str(tmp_path / "here"), shards=1, vocab_size=300, policy=policy, table=_spelled(folder))
    there = make_dataset(str(tmp_path / "there"), shards=1, vocab_size=300, table=_spelled(folder))
    own = lopd("cache", "inspect", here.url, "--json").json
    given = lopd("cache", "inspect", there.url, "--tokenizer", str(folder), "--json").json
    assert own["samples"] == given["samples"] and not own["note"] and not given["note"]
    assert "".join(piece["text"] for piece in own["samples"][0]["pieces"]) == "漢 th"


def test_the_tokenizer_of_another_model_is_not_believed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", words=("he", "th", "ov"))
    right = make_model(tmp_path / "right")
    make_dataset(str(tmp_path / "data"), shards=1, vocab_size=300, table=_spelled(right))
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--tokenizer", str(folder), "--json").json
    assert "does not spell these rows" in ran["note"] and ran["samples"][0]["pieces"][0]["text"] is None


def test_a_folder_of_the_policys_name_that_holds_another_tokenizer_is_not_the_policys(tmp_path: Path) -> None:
    """Where no text is stored, nothing else would tell."""
    folder = make_model(tmp_path / "model")
    policy = IDENTITY | {"name": str(folder)}
    make_dataset(str(tmp_path / "data"), shards=1, vocab_size=300, policy=policy, table=_spelled(folder, completion=""))
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--json").json
    assert "is not on this machine" in ran["note"] and ran["samples"][0]["pieces"][0]["text"] is None


@pytest.mark.parametrize("name", ["m" * 5000, f"org/{'m' * 5000}", "org/model\0"])
def test_a_name_that_no_folder_can_have_is_a_policy_that_is_not_here(tmp_path: Path, name: str) -> None:
    make_dataset(str(tmp_path / "data"), policy=IDENTITY | {"name": name})
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--json")
    assert ran.code == 0 and "is not on this machine" in ran.json["note"]


def test_a_revision_that_no_folder_can_have_is_a_policy_that_is_not_here(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), policy=IDENTITY | {"revision": "r" * 5000})
    assert lopd("cache", "inspect", str(tmp_path / "data")).code == 0


def test_a_report_is_replaced_and_no_other_file(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"))
    command = ("cache", "inspect", str(tmp_path / "data"), "--html", str(tmp_path / "page.html"))
    assert lopd(*command).code == 0 and lopd(*command).code == 0
    (tmp_path / "page.html").write_text("dear to somebody")
    ran = lopd(*command)
    assert ran.code == 64 and "what lies there is no report" in ran.err and ran.out == ""
    assert (tmp_path / "page.html").read_text() == "dear to somebody"


@pytest.mark.parametrize(("kind", "topk"), [("scored", 3), ("scored", 0), ("rollouts", 0), ("sft", 0)])
def test_the_page_is_one_file_without_script_that_fetches_nothing(tmp_path: Path, kind: str, topk: int) -> None:
    scored = kind == "scored"
    make_dataset(
        str(tmp_path / "data"),
        kind=kind,
        topk=topk,
        teacher=IDENTITY if scored else None,
        table=lambda shard: to_table([make_row(10 * shard + row, topk=topk, scored=scored) for row in range(3)], topk),
    )
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--html", str(tmp_path / "page.html"), "--json")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == (5 if scored else 3) and page.count("<details") == 3
    assert ran.json["facts"]["manifest_sha256"] in page
    assert "<script" not in page and "<link" not in page and "@import" not in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert ("Gap by position" in page) == scored and ("top-k" in page) == (topk > 0)


def test_hostile_records_and_rows_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    evil = "\x1b[2J</pre><script>alert(1)</script>[red]$\\frac"
    make_dataset(
        str(tmp_path / "data"),
        shards=1,
        created={"owner": evil, "at": evil, "by": evil},
        policy=IDENTITY | {"name": evil},
        overrides=[evil],
        sampling={evil: evil},
        engine={"version": evil},
        table=lambda _: to_table(
            [make_row(0, uid=evil, prompt=evil, completion=evil, finish_reason=evil), make_row(1)]
        ),
    )
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert ran.code == 0 and "\x1b" not in ran.out and "␛[2J</pre><script>" in ran.out
    assert "\x1b" not in page and "<script" not in page and "&lt;script&gt;" in page


class Terminal(io.StringIO):
    """A stream that a terminal reads."""

    def isatty(self) -> bool:
        return True


def on_terminal(url: str, monkeypatch: pytest.MonkeyPatch, tokenizer: Path, **environment: str) -> str:
    """What a terminal is sent."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm", "COLORTERM": "truecolor", "COLUMNS": "200"} | environment).items():
        monkeypatch.setenv(name, value)
    found = inspect(url, rows=3, uid=None, tokenizer=tokenizer)
    with contextlib.redirect_stdout(Terminal()) as stream:
        inspect_text.show(found, whole=False)
    return stream.getvalue()


def test_a_terminal_gets_colours_and_one_that_wants_none_gets_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model")
    worse = {"rollout_logprobs": np.full(5, -1.0, np.float32), "teacher_logprobs": np.full(5, -9.0, np.float32)}
    make_dataset(
        str(tmp_path / "data"), shards=1, vocab_size=300, overrides=["x"], table=_spelled(folder, "漢 th", **worse)
    )
    coloured = on_terminal(str(tmp_path / "data"), monkeypatch, folder)
    plain = on_terminal(str(tmp_path / "data"), monkeypatch, folder, NO_COLOR="1")
    assert "\x1b[30;48;2;248;113;113m漢" in coloured and "⟦" not in coloured.partition("Rows")[2]
    assert "\x1b[1;37;41mOVERRIDDEN: x" in coloured
    assert "\x1b" not in plain and "漢⟦-24.0⟧" in plain


def test_a_terminal_is_sent_no_code_of_the_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    evil = "\x1b[2J\x1b]0;owned\x07[red]\r\x9b"
    make_dataset(
        str(tmp_path / "data"),
        shards=1,
        vocab_size=300,
        created={"owner": evil, "at": evil, "by": evil},
        policy=IDENTITY | {"name": evil},
        overrides=[evil],
        table=_spelled(folder, evil, uid=evil, prompt=evil, finish_reason=evil),
    )
    sent = on_terminal(str(tmp_path / "data"), monkeypatch, folder)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;]*m", "", sent))
    assert sent.count("[red]") >= 6


def test_of_an_export_the_lineage_is_shown(location: str) -> None:
    provenance = Provenance(
        role="opd",
        teacher=TEACHER,
        scored_data=DatasetRef(manifest_sha256="8" * 64, url="s3://bucket/scored"),
        parent=SFT,
        weights_sha256="9" * 64,
    )
    Store(location).put(PROVENANCE, provenance.model_dump_json().encode())
    text = lopd("cache", "inspect", location)
    assert text.code == 0 and "distilled student, round 1" in text.out and "SFT student" in text.out
    made = lopd("cache", "inspect", location, "--json").json
    assert made["facts"]["role"] == "opd" and made["statistics"] is None and made["samples"] == []
    assert made["lineage"]["made_from"][0]["name"] == "s3://bucket/scored"


def test_the_page_of_an_export(tmp_path: Path) -> None:
    Store(str(tmp_path)).put(PROVENANCE, SFT.model_dump_json().encode())
    assert lopd("cache", "inspect", str(tmp_path), "--html", str(tmp_path / "page.html")).code == 0
    assert "SFT student" in (tmp_path / "page.html").read_text()


def test_where_nothing_lies_the_error_says_so(tmp_path: Path) -> None:
    ran = lopd("cache", "inspect", str(tmp_path))
    assert ran.code == 65 and "neither a dataset nor a model" in ran.err


def test_a_malformed_lineage_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_text('{"teacher": 7}')
    ran = lopd("cache", "inspect", str(tmp_path))
    assert ran.code == 65 and PROVENANCE in ran.err


def test_an_unfinished_dataset_says_how_far_it_is(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "data"), committed=[0])
    ran = lopd("cache", "inspect", str(tmp_path / "data"))
    assert ran.code == 65 and "1 of 3 shards" in ran.err


def test_an_altered_shard_is_refused(tmp_path: Path) -> None:
    writer = make_dataset(str(tmp_path / "data"))
    flip(writer.store, writer.store.list("data")[1].name)
    ran = lopd("cache", "inspect", str(tmp_path / "data"), "--json")
    assert ran.code == 65 and ran.out == "" and "altered" in ran.err


def _spelled(folder: Path, text: str = "漢 th", **changes: Any) -> Any:
    """A shard of one row, which the tokenizer in `folder` spells."""
    tokenizer = load_tokenizer(folder)
    ids = np.array(tokenizer.encode(text), np.int32)
    row = {"tokens": len(ids), "completion_ids": ids, "completion": str(tokenizer.decode(ids.tolist()))}

    def table(_: int) -> pa.Table:
        return to_table([make_row(0, **(row | changes))])

    return table


def test_rejected_rows_are_shown_with_their_reasons(location: str) -> None:
    writer = make_dataset(location, shards=2, committed=[0])
    writer.commit(1, to_table([]), {}, {"p10/0": "engine died"})
    writer.finalize()
    ran = lopd("cache", "inspect", location, "--json")
    assert ran.json["facts"]["rejected_rows"] == [{"uid": "p10/0", "reason": "engine died"}]
    assert ran.json["facts"]["rows"] == 3
    assert re.search(r"rejected rows +1 by the reason: engine died \(p10/0\)", lopd("cache", "inspect", location).out)


def test_filters_are_shown_with_what_they_dropped(location: str) -> None:
    writer = make_dataset(location, shards=2, committed=[], filters={"drop_loops": True, "max_tokens": None})
    for shard in range(2):
        writer.commit(shard, make_shard(shard), {"dropped_loop": 3.0})
    writer.finalize()
    facts = lopd("cache", "inspect", location, "--json").json["facts"]
    assert facts["dropped"] == {"ending in a loop": 6} and facts["filters"]["drop_loops"] is True
    shown = lopd("cache", "inspect", location).out
    assert re.search(r"filters +drop_loops true\n", shown) and re.search(
        r"dropped by filters +6 ending in a loop\n", shown
    )
