"""What is kept of a shard's rows, what is counted, and what a plan says of it."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import DataError, UsageError
from common.filtered import DROPPED, dropped
from common.plans import content
from common.prompts import load_prompts
from common.schema import Rollout
from precompute.config import Filters, Generate
from precompute.filters.keeper import Keeper, planned_filters
from precompute.filters.verifiers import pin_of

STOP = 999
UNRULY = "tests.precompute.filters.verifier_of_mine:unruly"


def row(text: str | list[int], prompt: str = "p", sample: int = 0, truncated: bool = False) -> Rollout:
    """A row whose ids are the text's characters; `STOP` ends it unless it was cut off."""
    ids = [*(map(ord, text) if isinstance(text, str) else text), *([] if truncated else [STOP])]
    return Rollout(
        uid=f"{prompt}/{sample}",
        prompt_id=prompt,
        sample_idx=sample,
        prompt_ids=np.array([1], np.int32),
        completion_ids=np.array(ids, np.int32),
        rollout_logprobs=np.full(len(ids), -1.0, np.float32),
        finish_reason="length" if truncated else "stop",
        meta='{"answer": "Ü"}',
    )


def decode(ids: np.ndarray) -> str:
    return "".join(chr(number) for number in ids.tolist() if number != STOP)


def kept(rows: list[Rollout], told: list[str] | None = None, **filters: Any) -> tuple[list[Rollout], dict[str, float]]:
    """What a keeper leaves of them, and counts; `told` takes what it tells."""
    made = Filters.model_validate({"verifier_processes": 1} | filters)
    pin = {"verifier": {"pin": pin_of(made.verifier, None)}} if made.verifier is not None else {}
    with TemporaryDirectory() as folder:
        told = [] if told is None else told
        keeper = Keeper(made, pin, decode, Path(folder) / "verifier.log", told.append)
        try:
            return keeper.keep(rows, "shard 7")
        finally:
            keeper.close()


def test_without_filters_everything_is_kept_and_nothing_counted() -> None:
    rows = [row("a"), row("b", sample=1)]
    assert kept(rows) == (rows, {})


LONG = list(range(100))
CASES: list[tuple[dict[str, Any], str, Callable[[], Rollout], Callable[[], Rollout]]] = [
    ({"drop_truncated": True}, "dropped_truncated", lambda: row("a", truncated=True), lambda: row("a")),
    ({"min_tokens": 3}, "dropped_short", lambda: row("a"), lambda: row("ab")),
    ({"max_tokens": 3}, "dropped_long", lambda: row("abc"), lambda: row("ab")),
    ({"drop_loops": True}, "dropped_loop", lambda: row("x" + "abcd" * 20), lambda: row("abcd" * 20 + "x")),
    ({"drop_loops": True}, "dropped_loop", lambda: row("no" * 50, truncated=True), lambda: row(LONG, truncated=True)),
    ({"max_repetition": 0.5}, "dropped_repetition", lambda: row(LONG[:10] * 3), lambda: row(LONG + LONG[:50])),
    (
        {"max_repetition": 0.4, "repetition_ngram": 1},
        "dropped_repetition",
        lambda: row([1, 2, 1, 2]),
        lambda: row([1, 2, 3, 2]),
    ),
]


@pytest.mark.parametrize(("filters", "name", "bad", "good"), CASES)
def test_each_filter_drops_what_it_names_and_keeps_the_rest(
    filters: dict[str, Any], name: str, bad: Callable[[], Rollout], good: Callable[[], Rollout]
) -> None:
    one, other = bad(), good()
    assert kept([one, other], **filters) == ([other], {name: 1.0})


def test_a_row_counts_for_the_first_filter_that_drops_it() -> None:
    rows = [row("a" * 100, truncated=True), row("a" * 100), row("a")]
    left, stats = kept(rows, drop_truncated=True, max_tokens=50, drop_loops=True, max_repetition=0.1)
    assert left == rows[2:]
    assert stats == {"dropped_truncated": 1, "dropped_long": 1, "dropped_loop": 0, "dropped_repetition": 0}


def test_of_equal_completions_of_a_prompt_the_first_is_kept_and_so_many_of_each_prompt() -> None:
    texts = [("p", "a"), ("p", "a"), ("p", "b"), ("p", "c"), ("q", "a")]
    rows = [row(text, prompt, sample) for sample, (prompt, text) in enumerate(texts)]
    left, stats = kept(rows, drop_duplicates=True, per_prompt=2)
    assert [one.uid for one in left] == ["p/0", "p/2", "q/4"]
    assert stats == {"dropped_duplicate": 1, "dropped_extra": 1}


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=90), st.booleans(), st.sampled_from("pq")), max_size=12))
def test_every_row_is_kept_in_order_or_counted_once(given_rows: list[tuple[str, bool, str]]) -> None:
    rows = [row(text, prompt, number, cut) for number, (text, cut, prompt) in enumerate(given_rows)]
    left, stats = kept(
        rows, drop_truncated=True, min_tokens=3, max_tokens=80, drop_loops=True, max_repetition=0.9,
        drop_duplicates=True, per_prompt=3,
    )  # fmt: skip
    assert len(left) + sum(dropped([stats]).values()) == len(rows)
    assert [one.sample_idx for one in left] == sorted(one.sample_idx for one in left)
    assert set(stats) <= set(DROPPED)


TEXTS = ["right", "wrong", "raise", "right", "die"]


@pytest.mark.slow
def test_verdicts_stand_in_the_meta_and_failures_are_counted_and_told() -> None:
    rows, told = [row(text, sample=number) for number, text in enumerate(TEXTS)], list[str]()
    left, stats = kept(rows, told, verifier=UNRULY)
    assert [json.loads(one.meta) for one in left] == [
        {"answer": "Ü", "verified": verdict} for verdict in (True, False, None, True, None)
    ]
    assert [one.uid for one in left] == [one.uid for one in rows]
    assert stats == {"judged": 5, "judged_correct": 2, "verifier_failed": 2}
    assert told == ["shard 7: the verifier failed on 2 of 5 completions, the first is p/2: RuntimeError: no idea"]


@pytest.mark.slow
def test_only_what_is_found_correct_is_kept_and_no_more_of_a_prompt_than_wanted() -> None:
    rows = [row(text, sample=number) for number, text in enumerate([*TEXTS, "right"])]
    left, stats = kept(rows, verifier=UNRULY, keep="correct", per_prompt=2, max_tokens=20)
    assert [one.uid for one in left] == ["p/0", "p/3"]
    assert stats == {
        "dropped_long": 0,
        "dropped_wrong": 1,
        "dropped_unverified": 2,
        "dropped_extra": 1,
        "judged": 6,
        "judged_correct": 3,
        "verifier_failed": 2,
    }


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"keep": "correct"}, "needs a verifier"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is above max_tokens 4"),
        ({"verifier": "math_verify"}, "verifier must be math-verify, package.module:function or file.py:function"),
        ({"max_repetition": 1.0}, "less than 1"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(filters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Filters.model_validate(filters)


def planned(folder: Path, rows: list[dict[str, Any]], **filters: Any) -> dict[str, Any]:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    sampling = {"max_tokens": 100}
    config = {"model": "m", "prompts": str(file), "cache": "c", "filters": filters, "sampling": sampling}
    return planned_filters(Generate.model_validate(config), load_prompts(str(file)))


def test_a_plan_without_filters_says_nothing_of_them(tmp_path: Path) -> None:
    assert planned(tmp_path, [{"prompt": "2+2"}]) == {}


def test_a_plan_holds_every_filter_and_none_of_how_the_box_runs_it(tmp_path: Path) -> None:
    said = planned(tmp_path, [{"prompt": "2+2"}], drop_loops=True, verifier_processes=7)["filters"]
    assert said["drop_loops"] is True and said["keep"] == "all"
    assert set(said) == set(Filters.model_fields) - {"verifier_processes"}


@pytest.mark.slow
def test_a_plan_pins_the_verifier(tmp_path: Path) -> None:
    said = planned(tmp_path, [{"prompt": "2+2"}], verifier=UNRULY)["filters"]
    assert said["verifier"] == {"name": UNRULY, "function": "unruly", "pin": pin_of(UNRULY, None)}


@pytest.mark.slow
def test_a_verifier_is_told_by_its_source_and_not_by_where_a_box_has_it(tmp_path: Path) -> None:
    plans = []
    for folder, text in (("a", "return True"), ("b", "return True"), ("c", "return False")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "mine.py"
        file.write_text(f"def f(text, meta):\n    {text}\n")
        plans.append(content(planned(tmp_path, [{"prompt": "2+2"}], verifier=f"{file}:f")))
    assert plans[0] == plans[1] != plans[2]


def test_what_would_fail_on_every_row_is_refused_before_the_first(tmp_path: Path) -> None:
    good = {"prompt": "2+2", "id": "a", "answer": 4}
    with pytest.raises(DataError, match="the prompt brings no 'answer' along .*prompt b"):
        planned(tmp_path, [good, {"prompt": "3+3", "id": "b"}], verifier="math-verify")
    with pytest.raises(DataError, match="brings no 'reward.truth' along .*prompt a.*filters.verifier_answer"):
        planned(tmp_path, [good], verifier="math-verify", verifier_answer="reward.truth")
    with pytest.raises(DataError, match="its meta has a key 'verified'.*prompt a"):
        planned(tmp_path, [good | {"verified": True}], verifier=UNRULY)
    with pytest.raises(UsageError, match=r"min_tokens 101 is above sampling.max_tokens 100"):
        planned(tmp_path, [good], min_tokens=101)
