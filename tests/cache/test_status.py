import os
import shlex
import time
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import cli
from common.cache.find import find
from common.cache.resume import resume_command
from common.cache.status import status
from common.chat import Template
from common.config import load_section
from common.pace import PATIENCE_S, RECENT_COMMITS, pace_of
from common.records import MANIFEST, PLAN, REBUILD, commit_key
from common.storage import Store
from common.untrusted import one_line
from precompute.cli import _as_settings
from precompute.config import Filters, Generate, Score
from precompute.filters.keeper import NOT_PLANNED
from tests.cache.datasets import flip, lopd, make_dataset, orphan
from tests.common.rows import IDENTITY, make_plan
from tests.s3_server import S3Server

TIMES = st.lists(st.floats(1e9, 1e9 + 1e6), max_size=40)


def written(url: str, key: str, seconds: float) -> None:
    """Say that the file was written then."""
    os.utime(Path(url) / key, (seconds, seconds))


def test_an_unfinished_dataset_tells_how_far_it_is(location: str) -> None:
    make_dataset(location, shards=5, committed=[0, 2, 3])
    orphan(Store(location), 2)
    orphan(Store(location), 4)

    found = status(location)
    assert (found.state, found.activity, found.shards_committed, found.shards) == ("unfinished", "running", 3, 5)
    assert (found.rows, found.tokens, found.estimated) == (9, 36, False)
    assert found.orphans == 2
    assert found.manifest_sha256 is None
    assert found.pace.last == pytest.approx(time.time(), abs=300)


def test_a_finished_dataset_needs_no_going_on(location: str) -> None:
    digest = make_dataset(location).finalize()
    found = status(location, now=time.time() + 1e6)
    assert (found.state, found.resume, found.eta_s, found.orphans) == ("complete", None, None, 0)
    assert (found.rows, found.tokens, found.manifest_sha256) == (9, 36, digest)
    assert not found.pace.stalled
    assert f"{location}: complete, 9 rows" in lopd("cache", "status", location).out


def test_a_dataset_that_lacks_its_manifest_alone_says_so(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), finish=False)
    assert "3/3 shards (100%), no manifest yet" in lopd("cache", "status", str(tmp_path)).out
    assert "3/3 shards, no manifest" in lopd("cache", "ls", str(tmp_path)).out


def test_the_pace_is_told_by_when_the_store_took_the_commits(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, shards=10, committed=range(6))
    written(url, PLAN, 1_000_000)
    for shard in range(6):
        written(url, commit_key(shard), 1_000_000 + 600 + 30 * shard)

    found = status(url, now=1_000_000 + 600 + 150 + 10)
    assert found.pace.recent == pytest.approx(2.0)  # shards a minute
    assert found.pace.overall == pytest.approx(60 * 6 / 750)
    assert found.eta_s == pytest.approx(4 * 30)
    assert found.activity == "running"


def test_silence_longer_than_the_pace_lets_expect_is_a_stall(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, shards=10, committed=range(3))
    written(url, PLAN, 1_000_000)
    for shard in range(3):
        written(url, commit_key(shard), 1_001_000 + 30 * shard)

    found = status(url, now=1_001_060 + PATIENCE_S + 1)
    assert (found.activity, found.eta_s) == ("stalled", None)
    assert status(url, now=1_001_060 + PATIENCE_S - 1).activity == "running"


def test_a_plan_on_which_nobody_works_has_not_started(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), committed=[])
    assert status(str(tmp_path)).activity == "running"  # an engine takes minutes to start
    assert status(str(tmp_path), now=time.time() + 4 * PATIENCE_S).activity == "not started"


def test_the_present_pace_knows_nothing_of_last_night() -> None:
    night, day = [0.0, 60.0, 120.0, 180.0], [50_000.0, 50_020.0, 50_040.0]
    pace = pace_of(1.0, [*day, *night], now=50_045)
    assert pace.recent == pytest.approx(3.0)
    assert pace.overall == pytest.approx(60 * 7 / 50_039)


def test_the_present_pace_is_that_of_the_last_commits() -> None:
    slow = [100.0 * index for index in range(100)]
    fast = [slow[-1] + 1.0 * (index + 1) for index in range(RECENT_COMMITS)]
    pace = pace_of(1.0, slow + fast, now=fast[-1])
    assert pace.recent == pytest.approx(60.0)


def test_shards_that_end_together_tell_no_pace_of_their_own() -> None:
    pace = pace_of(1000.0, [1600.0, 1600.2, 1600.4], now=1601)
    assert pace.recent is None and pace.overall == pytest.approx(0.3, rel=0.01)


def test_times_by_whole_seconds_may_all_be_one() -> None:
    pace = pace_of(100.0, [100.0, 100.0, 100.0], now=100.0)
    assert (pace.recent, pace.overall, pace.stalled) == (None, None, False)


@given(plan=st.floats(0, 2e9), commits=TIMES, now=st.floats(0, 2e9))
def test_no_clock_however_wrong_makes_a_pace_of_nonsense(plan: float, commits: list[float], now: float) -> None:
    pace = pace_of(plan, commits, now)
    for rate in (pace.recent, pace.overall):
        assert rate is None or rate > 0
    assert pace.last == (max(commits) if commits else None)
    if commits and now <= max(commits):
        assert not pace.stalled


TEMPLATES = [
    {"mode": "chat", "system": None, "arguments": {}},
    {"mode": "raw", "system": None, "arguments": {}},
    {
        "mode": "chat",
        "system": 'Say "so",\n\tin \\LaTeX: \u202e 漢字 🙂 \x7f',
        "arguments": {"enable_thinking": False, "a key": [1, {"x": 0.5}]},
    },
    {"mode": "chat", "system": " ", "arguments": {}},
]


def settings_of(command: str) -> dict[str, Any]:
    """What the command line makes of it, as a plan is made of that."""
    words = shlex.split(command)
    assert words[:2] == ["lopd", "precompute"]
    precompute = cli.group.get_command(click.Context(cli.group), "precompute")
    assert isinstance(precompute, click.Group)
    verb = precompute.get_command(click.Context(cli.group), words[2])
    assert verb is not None
    values = verb.make_context(words[2], words[3:]).params
    model, section = {
        "sft-data": (Generate, "sft_data"),
        "rollouts": (Generate, "rollouts"),
        "score": (Score, "score"),
    }[words[2]]
    config, settings = values.pop("config"), values.pop("settings")
    return load_section(model, config, section, [*settings, *_as_settings(values)], env={}).model_dump()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["sft", "rollouts"])
def test_the_command_that_goes_on_samples_by_the_same_plan(kind: str, template: dict[str, object]) -> None:
    sampling = {
        "samples": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 1e-5, "max_tokens": 8,
        "stop_ids": [2, 7], "seed": 11,
    }  # fmt: skip
    plan = make_plan(
        kind=kind,
        template=template,
        sampling=sampling,
        keep_text=False,
        policy=IDENTITY | {"revision": "4" * 40},
        engine={"version": "1", "dtype": "bfloat16", "head_dtype": "model"},
    )
    command = resume_command(plan, "s3://bucket/a run")
    assert one_line(command) == command  # what the terminal shows is what it is

    said = settings_of(command)
    assert (said["model"], said["cache"]) == (f"org/model@{'4' * 40}", "s3://bucket/a run")
    assert said["sampling"] == sampling | {"stop_ids": (2, 7)}
    assert (said["template"] or Template().model_dump()) == template
    assert (said["keep_text"], said["prompts_per_shard"]) == (False, plan["prompts_per_shard"])
    assert {"dtype": "bfloat16", "head_dtype": "model"}.items() <= said["engine"].items()


def test_the_command_that_goes_on_filters_by_the_same_plan() -> None:
    filters = Filters(drop_loops=True, max_repetition=0.5, verifier="checks/my file.py:f", keep="correct")
    planned = filters.model_dump(exclude=NOT_PLANNED)
    planned["verifier"] = {"name": filters.verifier, "function": "f", "pin": "0" * 64}
    said = settings_of(resume_command(make_plan(kind="sft", filters=planned), "run"))
    assert Filters.model_validate(said["filters"]) == filters


def test_the_command_that_goes_on_stores_and_grades_the_same_top_k() -> None:
    stored = settings_of(resume_command(make_plan(kind="rollouts", rollout_topk=6), "run"))
    assert stored["topk"] == 6
    graded = settings_of(resume_command(make_plan(topk=4, topk_support="student"), "run"))
    assert (graded["topk"], graded["topk_support"]) == (4, "student")
    assert settings_of(resume_command(make_plan(topk=4), "run"))["topk_support"] == "teacher"


def test_the_template_of_the_lineage_is_not_given_again() -> None:
    template = {"mode": "chat", "system": "Be brief.", "arguments": {}}
    plan = make_plan(kind="rollouts", template=template, lineage={"role": "sft", "template": template})
    assert settings_of(resume_command(plan, "run"))["template"] is None
    plan = make_plan(kind="sft", template=template, lineage={"role": "sft", "template": template})
    assert settings_of(resume_command(plan, "run"))["template"] == template


def test_the_command_that_goes_on_scores_by_the_same_plan() -> None:
    plan = make_plan(
        topk=4,
        overrides=["teacher-mismatch"],
        parent="f" * 64,
        teacher=IDENTITY | {"revision": "5" * 40},
        scoring_engine={"version": "1", "dtype": "float16", "head_dtype": "model"},
    )
    said = settings_of(resume_command(plan, "s3://bucket/run"))
    assert (said["topk"], said["allow_teacher_mismatch"], said["teacher"]) == (4, True, f"org/model@{'5' * 40}")
    assert {"dtype": "float16", "head_dtype": "model"}.items() <= said["engine"].items()


def test_a_model_of_a_folder_has_no_revision_to_give(tmp_path: Path) -> None:
    plan = make_plan(kind="rollouts", policy=IDENTITY | {"name": str(tmp_path), "revision": "4" * 40})
    assert settings_of(resume_command(plan, "run"))["model"] == str(tmp_path)


def test_a_finished_dataset_that_lost_a_shard_is_damaged_as_ls_says(location: str) -> None:
    make_dataset(location)
    Store(location).remove(Store(location).list("data")[1].name)
    found, [listed] = status(location), find(location)
    assert (
        (found.state, found.problem)
        == (listed.state, listed.problem)
        == (
            "damaged",
            "1 of 3 shards are missing, first 1",
        )
    )
    shown = lopd("cache", "status", location).out
    assert "damaged" in shown and REBUILD in shown


@pytest.mark.parametrize("read", [1, 1024])
def test_a_committed_shard_whose_object_is_gone_is_said_with_what_to_do(
    read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.cache.status.COMMITS_READ", read)
    url = str(tmp_path)
    writer = make_dataset(url, shards=4, committed=[0, 1, 2])
    Store(url).remove(Store(url).list("data")[1].name)

    found, [listed] = status(url), find(url)
    assert (found.state, found.problem) == (listed.state, listed.problem)
    assert found.state == "damaged" and "1 committed shards are missing" in (found.problem or "")
    shown = lopd("cache", "status", url).out
    assert f"Have {commit_key(1)} removed by one who may" in shown and "To go on: lopd precompute score" in shown

    Store(url).remove(commit_key(1))  # as it was told to
    assert writer.pending() == [1, 3] and status(url).state == "unfinished"


def test_an_object_of_another_writing_does_not_hide_that_the_committed_one_is_gone(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), committed=[0])
    store = Store(str(tmp_path))
    store.remove(store.list("data")[0].name)
    orphan(store, 0)
    assert status(str(tmp_path)).state == "damaged"


def test_text_and_json_say_how_to_go_on(location: str) -> None:
    make_dataset(location, kind="rollouts", committed=[])
    shown = lopd("cache", "status", location)
    assert shown.code == 0
    assert "To go on: lopd precompute rollouts --model org/model --prompts PROMPTS" in shown.out
    assert "PROMPTS are the same 6 prompts" in shown.out and "the same `lopd cache copy` command again" in shown.out

    value = lopd("cache", "status", location, "--json").json
    assert value["resume"].endswith(f"--cache {location}")
    assert (value["activity"], value["shards_committed"], value["shards"]) == ("running", 0, 3)


def test_counts_of_many_commits_are_a_projection_unless_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.cache.status.COMMITS_READ", 4)
    make_dataset(str(tmp_path), shards=10, finish=False)
    assert status(str(tmp_path)).estimated and status(str(tmp_path)).rows == 30
    full = status(str(tmp_path), full=True)
    assert (full.rows, full.estimated) == (30, False)
    assert "rows               ≈30" in lopd("cache", "status", str(tmp_path)).out


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda url: None, "there is no dataset here"),
        (lambda url: make_dataset(url) and flip(Store(url), MANIFEST), "MANIFEST.json"),
        (lambda url: make_dataset(url) and flip(Store(url), PLAN), "plan.json"),
        (lambda url: make_dataset(url, committed=[0]) and flip(Store(url), commit_key(0)), "commits/000000.json"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, prepare, words: str) -> None:
    location = str(tmp_path)
    prepare(location)
    ran = lopd("cache", "status", location)
    assert (ran.code, ran.out) == (65, "")
    assert words in ran.err and ran.err.startswith("error: ")


@pytest.mark.slow
def test_who_may_only_read_sees_the_status_and_writes_nothing(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3, committed=[0])
    before = Store(s3).list()
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    assert status(s3).shards_committed == 1
    assert Store(s3).list() == before
