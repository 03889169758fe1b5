from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cache.shard_checks import topk_problem
from common.cache.verify import verify
from common.parquet import encode
from common.records import CARD, MANIFEST, PLAN, commit_key
from common.schema import Rollout, to_rows, to_table
from common.storage import Store
from tests.cache.datasets import flip, lopd, make_dataset, orphan, plant, reseal
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.common.rows import VOCAB, make_row, make_shard, make_table
from tests.s3_server import S3Server


def lines(url: str, full: bool = True) -> list[str]:
    """The findings, a line each."""
    return [str(finding) for finding in verify(url, full).findings]


def planted(url: str, table: pa.Table | bytes, shard: int = 1, shards: int = 3, topk: int = 0, **said: Any) -> None:
    """A finished dataset of which one shard is this table, past all checks."""
    writer = make_dataset(url, shards=shards, committed=[other for other in range(shards) if other != shard], topk=topk)
    plant(writer.store, shard, table, **said)
    writer.finalize()


def topk_row(index: int, tokens: int = 6, **changes: Any) -> Rollout:
    """A row whose top-3 is as a teacher gives it; at every second position the sampled token is the most likely."""
    likely = np.log(np.array([0.5, 0.3, 0.1], np.float32))
    row = make_row(index, tokens=tokens)
    ids = (row.completion_ids[:, None] + np.array([1, 2, 3])).astype(np.int32) % VOCAB
    teacher = np.full(tokens, np.log(0.01), np.float32)
    ids[::2, 0], teacher[::2] = row.completion_ids[::2], likely[0]
    values = {
        "tokens": tokens,
        "topk_ids": ids,
        "topk_logprobs": np.tile(likely, (tokens, 1)),
        "teacher_logprobs": teacher,
    }
    return make_row(index, **(values | changes))


def scored_rows(shard: int, shift: int = 0, rows: int = 6, tokens: int = 40) -> pa.Table:
    """Rows in which two models find the same tokens hard; the teacher's column is moved by `shift` tokens."""
    made = []
    for index in range(rows):
        random = np.random.default_rng([shard, index])
        hardness = random.exponential(1.0, tokens)
        teacher = -np.abs(hardness + 0.2 * random.normal(size=tokens))
        made.append(
            make_row(
                100 * shard + index,
                tokens=tokens,
                rollout_logprobs=-hardness.astype(np.float32),
                teacher_logprobs=np.roll(teacher, shift).astype(np.float32),
            )
        )
    return to_table(made)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", ["sft", "rollouts", "scored"])
def test_a_sound_dataset_has_no_findings(location: str, kind: str, full: bool) -> None:
    def table(shard: int) -> pa.Table:
        return scored_rows(shard) if kind == "scored" else make_table(rows=3, first=10 * shard, scored=False)

    digest = make_dataset(location, kind=kind, table=table).finalize()
    ran = lopd("cache", "verify", location, "--full" if full else "--fast")
    assert ran.code == 0
    checked = "every row checked" if full else "records and sizes checked, rows not"
    assert f"{location}: sound; 3 shards, " in ran.out and checked in ran.out
    assert digest in ran.out


def test_a_sound_dataset_with_topk_has_no_findings(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, topk=3, table=lambda shard: to_table([topk_row(10 * shard + row) for row in range(3)], 3))
    assert lines(url) == []


def test_a_sound_dataset_with_the_students_topk_has_no_findings(tmp_path: Path) -> None:
    """Graded by the teacher they are in the student's order, and a sampled token may be likelier than all of them."""
    url, own = str(tmp_path / "rollouts"), np.arange(15, dtype=np.int32).reshape(5, 3)
    rows = [make_row(row, scored=False, rollout_topk_ids=own) for row in range(9)]
    shards = lambda shard: to_table(rows[3 * shard : 3 * shard + 3], 0, 3)  # noqa: E731
    make_dataset(url, kind="rollouts", table=shards, rollout_topk=3).finalize()
    assert lines(url) == []

    graded = str(tmp_path / "scored")
    unranked = [changed("not sorted"), replace(changed("missing"), uid="p1/0", prompt_id="p1"), topk_row(2)]
    make_dataset(graded, shards=1, topk=3, table=lambda _: to_table(unranked, 3), topk_support="student").finalize()
    assert lines(graded) == []


@pytest.mark.parametrize("name", ["twice", "more than 1", "another log-prob"])
def test_what_contradicts_itself_does_so_whoever_finds_it_most_likely(name: str) -> None:
    assert name in (topk_problem(changed(name), ranked=False) or "")


def test_json_tells_what_was_checked(location: str) -> None:
    make_dataset(location)
    store = Store(location)
    flip(store, store.list("data")[0].name)
    ran = lopd("cache", "verify", location, "--json")
    assert ran.code == 65
    assert ran.json["findings"] == [{"where": "shard 0", "what": "the shard was altered: its sha256 differs"}]
    assert (ran.json["mode"], ran.json["shards"], ran.json["rows"]) == ("full", 3, 9)
    assert (ran.json["state"], ran.json["shards_committed"], ran.json["sound"]) == ("damaged", 3, False)
    fast = lopd("cache", "verify", location, "--fast", "--json").json
    assert (fast["findings"], fast["unread"], fast["state"], fast["sound"]) == ([], [], "complete", True)


def test_a_dataset_that_is_not_finished_is_not_damaged_for_that(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), committed=[1])
    told = lopd("cache", "verify", str(tmp_path), "--json").json
    assert (told["state"], told["shards"], told["shards_committed"], told["sound"]) == ("unfinished", 3, 1, False)


BREAKAGES: dict[str, tuple[Callable[[Store], object], str]] = {
    "a flipped bit in the plan": (lambda store: flip(store, PLAN), "plan.json: "),
    "a flipped bit in the manifest": (lambda store: flip(store, MANIFEST), "MANIFEST.json: "),
    "a flipped bit in a commit": (lambda store: flip(store, commit_key(1)), "shard 1: "),
    "no plan": (lambda store: store.remove(PLAN), "plan.json: no such object"),
    "no manifest": (lambda store: store.remove(MANIFEST), "dataset: it is not finished: 3 of 3 shards are committed"),
    "no card": (lambda store: store.remove(CARD), "README.md: the card is missing"),
    "no commit": (lambda store: store.remove(commit_key(2)), "shard 2: its commit is missing"),
    "no shard": (lambda store: store.remove(store.list("data")[1].name), "shard 1: data/000001-"),
    "a shorter shard": (
        lambda store: store.put(store.list("data")[1].name, store.get(store.list("data")[1].name)[:-9]),
        "bytes, its commit says",
    ),
    "counts that do not add up": (lambda store: reseal(store, MANIFEST, tokens=1), "counts of tokens do not add up"),
    "another id": (lambda store: reseal(store, MANIFEST, dataset_id="0" * 16), "MANIFEST.json: dataset_id '0000"),
    "other overrides": (
        lambda store: reseal(store, MANIFEST, overrides=["teacher-mismatch"]),
        "MANIFEST.json: overrides ",
    ),
    "another plan": (lambda store: reseal(store, PLAN, topk=5), "plan.json is not the plan of this manifest"),
    "a commit of other counts": (
        lambda store: reseal(store, commit_key(0), rows=99),
        "shard 0: commit and manifest differ in rows",
    ),
    "the commit of another shard": (
        lambda store: store.put(commit_key(2), store.get(commit_key(1))),
        "shard 2: this is the commit of shard 1",
    ),
    "a commit too many": (
        lambda store: plant(store, 7, make_shard(7)),
        "shard 7: it is committed, but the plan has 3 shards",
    ),
    "a card of other files": (
        lambda store: store.put(CARD, b"---\nconfigs:\n- config_name: default\n  data_files: evil.parquet\n---\n"),
        "README.md: it names other files",
    ),
    "a card of one file more": (
        lambda store: store.put(CARD, store.get(CARD).replace(b"data_files:", b"data_files:\n      - evil.parquet")),
        "README.md: it names other files",
    ),
    "a card of one config more": (
        lambda store: store.put(CARD, store.get(CARD).replace(b"configs:", b"configs:\n  - config_name: evil")),
        "README.md: it names other files",
    ),
    "a card without front matter": (lambda store: store.put(CARD, b"# Data"), "README.md: it names other files"),
    "a card that is no text": (lambda store: store.put(CARD, b"---\n\xff\n---\n"), "README.md: it names other files"),
    "a card that is no YAML": (lambda store: store.put(CARD, b"---\n[{]\n---\n"), "README.md: it names other files"),
    "a card nested too deep": (
        lambda store: store.put(CARD, b"---\n" + 9999 * b"[" + b"\n---\n"),
        "README.md: it names other files",
    ),
    "a card of another size altogether": (
        lambda store: store.put(CARD, bytes(2 << 20)),
        "README.md: the object has 2097152 bytes",
    ),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", BREAKAGES)
def test_records_at_odds_are_found_fast_and_full(name: str, full: bool, tmp_path: Path) -> None:
    location = str(tmp_path)
    make_dataset(location)
    break_it, words = BREAKAGES[name]
    break_it(Store(location))
    ran = lopd("cache", "verify", location, "--full" if full else "--fast")
    assert ran.code == 65
    assert words in ran.out, ran.out


def test_a_card_that_says_more_of_the_same_files_is_sound(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    card = (tmp_path / CARD).read_text()
    (tmp_path / CARD).write_text(card.replace("tags:", "license: mit\ntags:") + "\n## More\n\nOur notes.\n")
    assert lines(str(tmp_path), full=False) == []


@pytest.mark.parametrize("name", ["truncated", "rollout_logprob_sum", "teacher_logprob_sum"])
def test_sums_in_a_commit_that_its_rows_do_not_have_are_found(tmp_path: Path, name: str) -> None:
    url, rows = str(tmp_path), to_rows(make_shard(0))
    sums = {
        "truncated": 0.0,
        "rollout_logprob_sum": float(np.concatenate([row.rollout_logprobs for row in rows]).sum()),
        "teacher_logprob_sum": sum(
            float(row.teacher_logprobs.sum()) for row in rows if row.teacher_logprobs is not None
        ),
    }
    writer = make_dataset(url, shards=2, committed=[])
    writer.commit(0, make_shard(0), sums | {"mean_length": 4.0})
    plant(writer.store, 1, make_shard(0), stats=sums | {name: sums[name] + 1})
    writer.finalize()
    [found] = [line for line in lines(url) if "uids" not in line]
    assert found.startswith(f"shard 1: the commit says {name} ")
    assert lines(url, full=False) == []


def test_all_findings_are_told_and_not_the_first_alone(location: str) -> None:
    make_dataset(location, shards=6)
    store = Store(location)
    shards = [entry.name for entry in store.list("data")]
    store.remove(shards[0])
    flip(store, shards[1])
    store.put(shards[2], store.get(shards[3]))
    flip(store, commit_key(4))
    store.remove(CARD)
    found = lines(location)
    assert [line.partition(":")[0] for line in found] == ["README.md", "shard 0", "shard 1", "shard 2", "shard 4"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_logprobs": np.array([-1, np.nan, -1, -1], np.float32)}, "row p11/0: teacher_logprobs holds nan"),
        ({"rollout_logprobs": np.array([-1, 2, -1, -1], np.float32)}, "row p11/0: rollout_logprobs holds 2.0"),
        ({"completion_ids": np.array([1, VOCAB, 1, 1], np.int32)}, f"row p11/0: token id {VOCAB}"),
        ({"uid": "p10/0"}, "a uid stands twice"),
        ({"uid": "else"}, "the uid is not that of its prompt and sample: row else"),
        ({"sample_idx": 3}, "the uid is not that of its prompt and sample: row p11/0"),
        ({"uid": "p0/0", "prompt_id": "p0"}, "shard 1: 1 uids are those of rows in shard 0"),
    ],
)
def test_rows_that_break_the_contract_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    url = str(tmp_path)
    planted(url, make_table(rows=3, first=10, **change))
    found = lines(url)
    assert len(found) == 1 and found[0].startswith("shard 1: ") and words in found[0]
    assert lines(url, full=False) == []


def test_a_column_that_is_longer_in_one_row_and_shorter_in_another_is_found(tmp_path: Path) -> None:
    url = str(tmp_path)
    columns = [-np.ones(tokens, np.float32) for tokens in (3, 5)]
    planted(url, to_table([make_row(index, tokens=4, teacher_logprobs=column) for index, column in enumerate(columns)]))
    [found] = [line for line in lines(url) if "teacher_logprobs" in line]
    assert found == "shard 1: row p0/0: teacher_logprobs and completion_ids differ in length"


def test_a_uid_that_stands_in_two_row_groups_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path)
    monkeypatch.setattr("common.parquet.ROW_GROUP_TOKENS", 1)
    planted(url, make_table(rows=3, first=10, uid="p10/0", prompt_id="p10"))
    assert lines(url) == ["shard 1: 1 uids stand twice"]


@pytest.mark.parametrize("said", [{"rows": 4}, {"tokens": 13}, {"prompt_tokens": 1}])
def test_counts_that_lie_are_found(said: dict[str, int], tmp_path: Path) -> None:
    url = str(tmp_path)
    planted(url, make_shard(1), **said)
    [found] = lines(url)
    assert found.startswith("shard 1: the footer says ")


def test_a_shard_that_is_no_parquet_is_found_and_the_next_one_looked_at(tmp_path: Path) -> None:
    url = str(tmp_path)
    writer = make_dataset(url, committed=[0])
    plant(writer.store, 1, b"not parquet at all", rows=3, prompt_tokens=1, tokens=12)
    plant(writer.store, 2, make_table(rows=3, first=20, uid="x"))
    writer.finalize()
    assert [line.partition(":")[0] for line in lines(url)] == ["shard 1", "shard 2"]


def test_a_page_whose_checksum_is_wrong_is_found(tmp_path: Path) -> None:
    """The hash is right, for it was made after the flip."""
    url = str(tmp_path)
    altered = bytearray(encode(make_shard(1)))
    altered[60] ^= 1
    planted(url, bytes(altered), rows=3, prompt_tokens=12, tokens=12)
    found = lines(url)
    assert len(found) == 1 and found[0].startswith("shard 1: ")


def test_a_shard_of_another_topk_is_found(tmp_path: Path) -> None:
    url = str(tmp_path)
    planted(url, make_shard(1, topk=2))
    [found] = lines(url)
    assert found.startswith("shard 1: the footer ")


def test_a_shifted_column_is_found_in_its_shard(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, shards=4, table=lambda shard: scored_rows(shard, shift=shard == 2))
    [found] = lines(url)
    assert found.startswith("shard 2: teacher log-probs are not aligned")


def test_a_shift_that_no_shard_is_long_enough_to_show_is_found_in_the_whole(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, shards=12, table=lambda shard: scored_rows(shard, shift=1, rows=1, tokens=100))
    [found] = lines(url)
    assert found.startswith("dataset: teacher log-probs are not aligned")


def changed(name: str) -> Rollout:
    """A row whose top-k has one thing wrong, at its third position."""
    row = topk_row(0)
    ids, logprobs, teacher = row.topk_ids, row.topk_logprobs, row.teacher_logprobs
    assert ids is not None and logprobs is not None and teacher is not None
    ids, logprobs, teacher = ids.copy(), logprobs.copy(), teacher.copy()
    if name == "twice":
        ids[2, 1] = ids[2, 0]
    elif name == "not sorted":
        logprobs[2, 1:] = logprobs[2, 2:0:-1]
    elif name == "more than 1":
        logprobs[3] = np.log(0.4)
        teacher[3] = np.log(0.01)
    elif name == "another log-prob":
        teacher[2] -= 0.1
    elif name == "missing":
        teacher[3] = np.log(0.2)
    return topk_row(0, topk_ids=ids, topk_logprobs=logprobs, teacher_logprobs=teacher)


@pytest.mark.parametrize("name", ["twice", "not sorted", "more than 1", "another log-prob", "missing"])
def test_a_topk_that_contradicts_itself_is_found(name: str, tmp_path: Path) -> None:
    assert topk_problem(topk_row(0)) is None
    assert name in (topk_problem(changed(name)) or "")

    url = str(tmp_path)
    make_dataset(url, shards=1, topk=3, table=lambda shard: to_table([changed(name), *map(topk_row, (1, 2))], 3))
    [found] = lines(url)
    assert found.startswith("shard 0: the ") and name in found and found.endswith(": row p0/0")


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_the_topk_of_a_true_distribution_is_in_order(seed: int, topk: int, tokens: int) -> None:
    random = np.random.default_rng(seed)
    logits = 4 * random.normal(size=(tokens, VOCAB))
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-logprobs, axis=1)[:, :topk].astype(np.int32)
    sampled = random.integers(0, VOCAB, tokens).astype(np.int32)
    row = make_row(
        0,
        tokens=tokens,
        completion_ids=sampled,
        teacher_logprobs=logprobs[np.arange(tokens), sampled],
        topk_ids=ids,
        topk_logprobs=np.take_along_axis(logprobs, ids, axis=1),
    )
    assert topk_problem(row) is None


def test_many_rows_with_one_problem_are_one_finding(tmp_path: Path) -> None:
    url = str(tmp_path)
    bad = [make_row(index, prompt_id="other") for index in range(10)]
    make_dataset(url, shards=1, table=lambda shard: to_table(bad))
    assert lines(url) == ["shard 0: the uid is not that of its prompt and sample: row p0/0, p1/0, p2/0 and 7 more"]


def test_orphans_and_other_files_are_notes_and_no_findings(location: str) -> None:
    make_dataset(location)
    left = orphan(Store(location), 1)
    Store(location).put("notes/mine.txt", b"text")
    ran = lopd("cache", "verify", location, "--fast")
    assert ran.code == 0
    assert f"note: 1 orphans, 36 B, such as {left}" in ran.out
    assert "note: 1 other files, such as notes/mine.txt" in ran.out


def test_what_is_committed_of_an_unfinished_dataset_is_checked_too(location: str) -> None:
    make_dataset(location, committed=[0, 2])
    store = Store(location)
    flip(store, store.list("data")[1].name)
    assert lines(location) == [
        "dataset: it is not finished: 2 of 3 shards are committed",
        "shard 2: the shard was altered: its sha256 differs",
    ]


@pytest.mark.slow
def test_an_object_that_may_not_be_read_is_no_finding_and_the_rest_is_checked(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3, shards=5)
    flip(Store(s3), Store(s3).list("data")[4].name)
    forbidden = [
        Fault(Kind.REFUSE, path=path, status=403, code="AccessDenied") for path in ("data/000001", "commits/000002")
    ]
    with fault_proxy(s3_server.endpoint, Faults(*forbidden)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ran, told = lopd("cache", "verify", s3), lopd("cache", "verify", s3, "--json").json
    assert ran.code == 74 and "no permission to" in ran.err
    assert "shard 4: the shard was altered: its sha256 differs\nnot checked: shard 1: no permission to" in ran.out
    assert "1 findings; " in ran.out and "2 objects could not be read" in ran.out
    assert [one["where"] for one in told["unread"]] == ["shard 1", "shard 2"] and not told["sound"]
    assert [one["where"] for one in told["findings"]] == ["shard 4"]


@pytest.mark.slow
def test_an_outage_is_no_finding_and_the_same_command_is_to_be_run_again(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3)
    fault = Fault(Kind.REFUSE, path="data/000001", status=400, code="ExpiredToken")
    with fault_proxy(s3_server.endpoint, Faults(fault)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ran = lopd("cache", "verify", s3)
    assert ran.code == 75 and "Renew, then run again" in ran.err
    assert ran.out.startswith("not checked: shard 1: the credentials or the clock are off")
    assert "no verdict; 3 shards" in ran.out and "sound" not in ran.out


@pytest.mark.slow
def test_a_store_out_of_reach_is_no_verdict_on_the_dataset(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3, shards=12)
    with fault_proxy(
        s3_server.endpoint, Faults(Fault(Kind.REFUSE, path="/data/", status=400, code="ExpiredToken"))
    ) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ran = lopd("cache", "verify", s3)
    assert ran.code == 75 and "Renew, then run again" in ran.err
    assert "no verdict" in ran.out and ran.out.count("not checked: ") == 6  # it did not try all twelve


@pytest.mark.slow
def test_bits_that_flip_on_the_way_are_read_again_and_no_finding(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3, shards=5)
    faults = Faults(
        *(Fault(Kind.FLIP, path=path, times=2) for path in ("data/000001", "data/000003", "commits/000002"))
    )
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert lines(s3) == []
    assert faults.injected[Kind.FLIP] == 6


@pytest.mark.slow
def test_shards_are_downloaded_whatever_a_local_cache_holds(s3: str) -> None:
    from common.dataset import open_dataset

    make_dataset(s3)
    assert len(open_dataset(s3).read_shard(0)) == 3  # now a local cache holds it
    flip(Store(s3), Store(s3).list("data")[0].name)
    assert len(open_dataset(s3).read_shard(0)) == 3
    assert lines(s3) == ["shard 0: the shard was altered: its sha256 differs"]


def test_where_there_is_no_dataset_there_is_nothing_to_verify(location: str) -> None:
    Store(location).put("notes.txt", b"text")
    ran = lopd("cache", "verify", location)
    assert ran.code == 65 and "there is no dataset here" in ran.err


@pytest.mark.slow
def test_a_reader_verifies_what_others_made(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(s3)
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    assert lopd("cache", "verify", s3).code == 0


def test_names_of_rows_do_not_command_the_terminal(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, shards=1, table=lambda shard: to_table([make_row(0, uid="\x1b[2Jgone")]))
    ran = lopd("cache", "verify", url)
    assert ran.code == 65 and "gone" in ran.out and "\x1b" not in ran.out


def test_a_dataset_with_rejected_rows_and_an_empty_shard_is_sound_and_tells_of_them(location: str) -> None:
    writer = make_dataset(location, shards=2, committed=[0])
    writer.commit(1, to_table([]), {"truncated": 0.0}, {"p10/0": "engine died"})
    writer.finalize()
    for full in (False, True):
        verdict = verify(location, full)
        assert verdict.sound and verdict.rows_rejected == 1
        assert verdict.notes == ("rejected rows: 1 by the reason: engine died (p10/0)",)


def test_a_rejected_row_that_is_there_and_a_sum_without_rows_are_found(tmp_path: Path) -> None:
    url, there = str(tmp_path), to_rows(make_shard(0))[1].uid
    writer = make_dataset(url, shards=2, committed=[])
    rejected = [{"uid": uid, "reason": "poison"} for uid in (there, "x/0", "x/0")]
    plant(writer.store, 0, make_shard(0), rejected=rejected)
    plant(writer.store, 1, to_table([]), stats={"truncated": 2.0})
    writer.finalize()
    found = lines(url)
    assert f"shard 0: it is rejected, and there: row {there}" in found
    assert "shard 0: it is rejected twice: row x/0" in found
    assert any("the commit says truncated 2, its rows have 0" in line for line in found)
