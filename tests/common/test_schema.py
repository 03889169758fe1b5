from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.schema import Rollout, Widths, arrow_schema, check_table, to_rows, to_table, topk_of, widths_in, widths_of
from tests.common.rows import VOCAB, make_row, make_table, row_lists, same_rows


def check(table: pa.Table, *, scored: bool = True) -> None:
    check_table(table, vocab_size=VOCAB, scored=scored, where="shard 7")


def replaced(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """`table` with another column in the place and under the field of `name`."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(name), column)


def with_values(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    return replaced(table, name, pa.array(values, table.schema.field(name).type))


@given(row_lists())
@settings(max_examples=60, deadline=None)
def test_a_table_shows_its_rows(made: tuple) -> None:
    rows, topk, scored = made
    table = to_table(rows, topk)

    check(table, scored=scored)
    assert topk_of(table.schema) == topk
    assert same_rows(to_rows(table), rows)


@given(row_lists(), st.data())
@settings(max_examples=40, deadline=None)
def test_slices_and_chunks_hold_the_rows_they_show(made: tuple, data: st.DataObject) -> None:
    rows, topk, scored = made
    cut = data.draw(st.integers(0, len(rows)))
    table = to_table(rows, topk)
    chunked = pa.concat_tables([table.slice(cut), table.slice(0, cut)])

    for part, expected in ((table.slice(cut), rows[cut:]), (chunked, rows[cut:] + rows[:cut])):
        check(part, scored=scored)
        assert same_rows(to_rows(part), expected)


def with_own_topk(width: int = 3, topk: int = 0, **changes: Any) -> list[Rollout]:
    """Rows with the student's most likely ids; `changes` go into the second."""
    random = np.random.default_rng(0)
    rows = [
        make_row(
            index,
            tokens=4,
            topk=topk,
            scored=topk > 0,
            rollout_topk_ids=random.integers(0, VOCAB, (4, width)).astype(np.int32),
        )
        for index in range(3)
    ]
    return [rows[0], replace(rows[1], **changes), rows[2]]


@pytest.mark.parametrize("topk", [0, 2])
def test_the_students_top_k_is_a_column_of_its_own(topk: int) -> None:
    rows = with_own_topk(topk=topk)
    table = to_table(rows, topk, 3)
    check(table, scored=topk > 0)
    assert widths_of(table.schema) == Widths(topk, 3)
    assert same_rows(to_rows(table), rows)
    assert same_rows(to_rows(to_table([], topk, 3)), [])


def test_without_the_students_top_k_the_columns_are_what_they_were() -> None:
    assert "rollout_topk_ids" not in arrow_schema(2).names
    assert widths_of(make_table(topk=2).schema) == Widths(2, 0)
    assert to_rows(make_table())[0].rollout_topk_ids is None
    assert widths_in({"topk": 2}) == Widths(2, 0)
    assert widths_in({"topk": 0, "rollout_topk": 5}) == Widths(0, 5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "rollout_topk_ids is missing .*row p1/0"),
        (np.full((4, 3), VOCAB, np.int32), rf"token id {VOCAB} in rollout_topk_ids is outside .*row p1/0"),
        (np.full((4, 3), -1, np.int32), r"token id -1 in rollout_topk_ids is outside .*row p1/0"),
        (np.zeros((3, 3), np.int32), "rollout_topk_ids and completion_ids differ in length .*row p1/0"),
        (np.zeros((4, 2), np.int32), r"rollout_topk_ids does not fit its column: .*\(4, 2\).*row p1/0"),
    ],
)
def test_a_bad_top_k_of_the_student_is_refused_with_its_row(value: np.ndarray | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(to_table(with_own_topk(rollout_topk_ids=value), 0, 3), scored=False)


def test_no_rows_are_a_table_too() -> None:
    table = to_table([], topk=2)
    check(table)
    assert to_rows(table) == []


NOT_EXACT = [
    ("completion_ids", np.array([0, 2**31]), "2147483648 is beyond int32"),
    ("completion_ids", np.array([0, -(2**31) - 1]), "-2147483649 is beyond int32"),
    ("prompt_ids", np.array([2**32 - 1], np.uint32), "4294967295 is beyond int32"),
    ("prompt_ids", np.array([2**64 - 1], np.uint64), "18446744073709551615 is beyond int32"),
    ("prompt_ids", [2**70], "object"),
    ("prompt_ids", np.array([1.5]), "float64"),
    ("prompt_ids", np.array([[1, 2]]), r"shape \(1, 2\)"),
    ("prompt_ids", ["a"], "<U1"),
    ("rollout_logprobs", np.array([-1e39]), r"-1e\+39 is beyond float32"),
    ("teacher_logprobs", np.array(["-1"]), "<U2"),
    ("teacher_logprobs", [[-1.0], [-1.0, -2.0]], "inhomogeneous"),
    ("topk_ids", np.zeros((4, 3), np.int32), r"shape \(4, 3\), not \(tokens, 2\)"),
    ("topk_ids", np.full((4, 2), 2**40), "1099511627776 is beyond int32"),
    ("topk_logprobs", np.zeros(8, np.float32), r"shape \(8,\), not \(tokens, 2\)"),
    ("topk_logprobs", np.full((4, 2), -1e300), r"-1e\+300 is beyond float32"),
    ("sample_idx", 2**31, "2147483648"),
    ("sample_idx", "first", "first"),
    ("prompt", "\ud800", "surrogates not allowed"),
    ("meta", {"answer": 1}, "dict"),
    ("completion", b"\xff", "not a utf8 string"),
]


@pytest.mark.parametrize(("column", "value", "message"), NOT_EXACT)
def test_a_value_that_its_column_cannot_hold_is_refused_with_its_row(column: str, value: Any, message: str) -> None:
    changes: dict[str, Any] = {column: value}
    with pytest.raises(DataError, match=rf"{column} does not fit its column: .*{message}.* \(row p1/0\)"):
        make_table(topk=2, **changes)


def test_wider_types_are_narrowed_when_nothing_is_lost() -> None:
    row = make_row(
        tokens=2,
        prompt_ids=np.array([2**31 - 1, 0]),
        completion_ids=np.array([3, 4], np.uint16),
        rollout_logprobs=np.array([-0.1, -1e-300]),
        teacher_logprobs=[-1, 0],
    )
    (read,) = to_rows(to_table([row]))

    assert read.prompt_ids.tolist() == [2**31 - 1, 0]
    assert read.completion_ids.tolist() == [3, 4]
    assert read.rollout_logprobs.tolist() == [float(np.float32(-0.1)), 0]
    assert read.teacher_logprobs is not None and read.teacher_logprobs.tolist() == [-1, 0]


PER_TOKEN = ("rollout_logprobs", "teacher_logprobs")
BAD_LOGPROBS = (float("nan"), 0.5, float("-inf"), float("inf"), 2e-4)
SHORT = np.full(3, -1, np.float32)


@pytest.mark.parametrize("column", PER_TOKEN)
@pytest.mark.parametrize("value", BAD_LOGPROBS)
def test_a_value_that_is_no_logprob_is_refused_with_its_row(column: str, value: float) -> None:
    changes: dict[str, Any] = {column: np.array([-1, -1, -1, value], np.float32)}
    with pytest.raises(DataError, match=rf"{column} holds .*, which is no log-prob \(shard 7, row p1/0\)"):
        check(make_table(**changes))


def test_rounding_a_little_above_zero_is_a_logprob() -> None:
    check(make_table(rollout_logprobs=np.array([-1, 0, 9e-5, -1], np.float32)))


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_a_bad_topk_logprob_is_refused_with_its_row(value: float) -> None:
    topk_logprobs = np.full((4, 2), -1, np.float32)
    topk_logprobs[0, 1] = value
    with pytest.raises(DataError, match=r"teacher_topk_logprobs holds .* \(shard 7, row p1/0\)"):
        check(make_table(topk=2, topk_logprobs=topk_logprobs))


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize("value", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_refused_with_its_row(column: str, value: int) -> None:
    changes: dict[str, Any] = {column: np.array([0, 1, 2, value], np.int32)}
    with pytest.raises(DataError, match=rf"token id {value} in {column} is outside .*row p1/0"):
        check(make_table(**changes))


def test_a_topk_id_outside_the_vocabulary_is_refused_with_its_row() -> None:
    topk_ids = np.zeros((4, 2), np.int32)
    topk_ids[3, 1] = VOCAB
    with pytest.raises(DataError, match=r"teacher_topk_ids is outside .*row p1/0"):
        check(make_table(topk=2, topk_ids=topk_ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "a completion is empty"),
        ({"prompt_ids": np.empty(0, np.int32)}, "a prompt is empty"),
        ({"rollout_logprobs": SHORT}, "rollout_logprobs and completion_ids differ in length"),
        ({"teacher_logprobs": SHORT}, "teacher_logprobs and completion_ids differ in length"),
        ({"teacher_logprobs": None}, "teacher_logprobs is missing"),
        ({"rollout_logprobs": None}, "rollout_logprobs is missing"),
        ({"completion_ids": None}, "completion_ids is missing"),
        ({"prompt": None}, "prompt is missing"),
        ({"sample_idx": None}, "sample_idx is missing"),
        ({"finish_reason": None}, "finish_reason is missing"),
        ({"uid": "p0/0"}, "a uid stands twice"),
    ],
)
def test_a_row_that_breaks_the_contract_is_refused_with_its_name(changes: dict[str, Any], message: str) -> None:
    table = make_table(**changes)
    row = changes.get("uid", "p1/0")
    with pytest.raises(DataError, match=rf"{message} \(shard 7, row {row}\)"):
        check(table)


@pytest.mark.parametrize("changes", [{"topk_ids": np.zeros((3, 2), np.int32)}, {"topk_logprobs": -np.ones((3, 2))}])
def test_a_topk_column_of_another_length_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="differ in length .*row p1/0"):
        check(make_table(topk=2, **changes))


@pytest.mark.parametrize("column", ["completion_ids", "rollout_logprobs", "teacher_logprobs"])
def test_a_null_among_the_tokens_is_refused_with_its_row(column: str) -> None:
    table = make_table()
    values = table[column].to_pylist()
    values[2][0] = None
    with pytest.raises(DataError, match=rf"{column} holds a null \(shard 7, row p2/0\)"):
        check(with_values(table, column, values))


@pytest.mark.parametrize("column", ["teacher_topk_ids", "teacher_topk_logprobs"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_null_among_the_topk_is_refused_with_its_row(column: str, whole: bool) -> None:
    table = make_table(topk=2)
    values = table[column].to_pylist()
    values[2][1] = None if whole else [values[2][1][0], None]
    with pytest.raises(DataError, match=rf"{column} holds a null \(shard 7, row p2/0\)"):
        check(with_values(table, column, values))


def test_the_row_named_is_right_in_a_slice() -> None:
    table = make_table(rows=6, rollout_logprobs=np.array([-1, -1, -1, 0.5], np.float32))
    check(table.slice(2))
    with pytest.raises(DataError, match="row p1/0"):
        check(table.slice(1))


@pytest.mark.parametrize("column", ["uid", "completion_ids", "teacher_logprobs", "meta"])
def test_a_missing_column_is_named(column: str) -> None:
    with pytest.raises(DataError, match=f"column {column} is missing"):
        check(make_table().drop_columns([column]))


def test_a_topk_column_without_its_partner_is_refused() -> None:
    with pytest.raises(DataError, match="column teacher_topk_logprobs is missing"):
        check(make_table(topk=2).drop_columns(["teacher_topk_logprobs"]))
    with pytest.raises(DataError, match="column teacher_topk_logprobs does not belong here"):
        check(make_table(topk=2).drop_columns(["teacher_topk_ids"]))


def test_another_type_or_order_or_a_further_column_is_refused() -> None:
    table = make_table()
    wide = table["rollout_logprobs"].cast(pa.list_(pa.float64()))
    index = table.schema.get_field_index("rollout_logprobs")

    with pytest.raises(
        DataError, match=r"column rollout_logprobs is list<.*double> not null|column rollout_logprobs is"
    ):
        check(table.set_column(index, "rollout_logprobs", wide))
    with pytest.raises(DataError, match="not in their order"):
        check(table.select(list(reversed(table.column_names))))
    with pytest.raises(DataError, match="column extra does not belong here"):
        check(table.append_column("extra", pa.array([1] * len(table))))
    with pytest.raises(DataError, match="column uid stands twice"):
        check(table.append_column(table.schema.field("uid"), table["uid"]))


@pytest.mark.parametrize("kind", [pa.int32(), pa.list_(pa.int32()), pa.list_(pa.int32(), 2)])
def test_a_topk_column_of_another_shape_is_refused(kind: pa.DataType) -> None:
    table = make_table().append_column("teacher_topk_ids", pa.nulls(4, kind))
    with pytest.raises(DataError, match="column teacher_topk_(ids does not belong here|logprobs is missing)"):
        check(table)


def test_teacher_logprobs_in_plain_rollouts_are_refused() -> None:
    check(make_table(scored=False), scored=False)
    with pytest.raises(DataError, match="teacher log-probs in a dataset that is not scored"):
        check(make_table(scored=True), scored=False)


def test_the_schema_names_every_column_of_the_contract() -> None:
    assert arrow_schema(2).names == [
        "uid",
        "prompt_id",
        "sample_idx",
        "prompt_ids",
        "completion_ids",
        "rollout_logprobs",
        "teacher_logprobs",
        "teacher_topk_ids",
        "teacher_topk_logprobs",
        "finish_reason",
        "prompt",
        "completion",
        "meta",
    ]
