import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.schema import ROW_GROUP_TOKENS, arrow_schema, check_table, decode, encode, to_rows, to_table, topk_of
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
def test_rows_come_back_bit_for_bit(made: tuple) -> None:
    rows, topk, scored = made
    table = decode(encode(to_table(rows, topk)))

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
        assert same_rows(to_rows(decode(encode(part))), expected)


def test_no_rows_are_a_table_too() -> None:
    table = decode(encode(to_table([], topk=2)))
    check(table)
    assert to_rows(table) == []


@given(st.integers(0), st.integers(1, 255), st.sampled_from([0, 3]))
@settings(max_examples=300, deadline=None)
def test_a_flipped_byte_of_a_data_page_is_never_read_as_other_values(position: int, mask: int, topk: int) -> None:
    table = make_table(rows=20, topk=topk)
    altered = bytearray(encode(table))
    start, stop = data_pages(bytes(altered))
    altered[start + position % (stop - start)] ^= mask

    try:
        read = decode(bytes(altered))
    except (pa.ArrowException, OSError):
        return
    assert same_rows(to_rows(read), to_rows(table))


def data_pages(data: bytes) -> tuple[int, int]:
    """Where the pages of all columns begin and end; behind them stands the footer."""
    metadata = pq.read_metadata(io.BytesIO(data))
    chunks = [
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(len(metadata.schema))
    ]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    return min(starts), max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True))


def test_per_token_columns_are_byte_stream_split_and_zstd() -> None:
    metadata = pq.read_metadata(io.BytesIO(encode(make_table(topk=2))))
    columns = {
        column.path_in_schema: column
        for column in (metadata.row_group(0).column(index) for index in range(metadata.num_columns))
    }
    lists = [name for name in columns if name.endswith("element")]

    assert len(lists) == 6
    for name in lists:
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings
        assert not columns[name].has_dictionary_page
    assert {column.compression for column in columns.values()} == {"ZSTD"}


def test_a_million_tokens_take_few_bytes_and_several_row_groups() -> None:
    random = np.random.default_rng(0)
    rows = [
        make_row(
            index,
            completion_ids=random.zipf(1.3, 10_000).clip(0, 150_000).astype(np.int32),
            rollout_logprobs=-random.exponential(0.3, 10_000).astype(np.float32),
            teacher_logprobs=-random.exponential(0.3, 10_000).astype(np.float32),
        )
        for index in range(120)
    ]
    data = encode(to_table(rows))
    file = pq.ParquetFile(io.BytesIO(data))

    assert len(data) / 1.2e6 <= 8.5
    assert file.num_row_groups == 3
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["prompt_ids", "completion_ids"])
        assert (
            sum(len(pa.concat_arrays(table[name].chunks).flatten()) for name in table.column_names) <= ROW_GROUP_TOKENS
        )


def test_a_row_longer_than_a_row_group_is_kept_whole() -> None:
    tokens = ROW_GROUP_TOKENS + 1
    rows = [make_row(index, tokens=count) for index, count in enumerate((3, tokens, 3))]
    file = pq.ParquetFile(io.BytesIO(encode(to_table(rows))))

    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [1, 1, 1]
    assert same_rows(to_rows(file.read()), rows)


PER_TOKEN = ("rollout_logprobs", "teacher_logprobs")
BAD_LOGPROBS = (float("nan"), 0.5, float("-inf"), float("inf"), 2e-4)
SHORT = np.full(3, -1, np.float32)


@pytest.mark.parametrize("column", PER_TOKEN)
@pytest.mark.parametrize("value", BAD_LOGPROBS)
def test_a_value_that_is_no_logprob_is_refused_with_its_row(column: str, value: float) -> None:
    changes: dict[str, Any] = {column: np.array([-1, -1, -1, value], np.float32)}
    with pytest.raises(DataError, match=rf"{column} holds .*, which is no log-prob \(shard 7, row p1-0\)"):
        check(make_table(**changes))


def test_rounding_a_little_above_zero_is_a_logprob() -> None:
    check(make_table(rollout_logprobs=np.array([-1, 0, 9e-5, -1], np.float32)))


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_a_bad_topk_logprob_is_refused_with_its_row(value: float) -> None:
    topk_logprobs = np.full((4, 2), -1, np.float32)
    topk_logprobs[0, 1] = value
    with pytest.raises(DataError, match=r"teacher_topk_logprobs holds .* \(shard 7, row p1-0\)"):
        check(make_table(topk=2, topk_logprobs=topk_logprobs))


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize("value", [-1, VOCAB])
def test_an_id_outside_the_vocabulary_is_refused_with_its_row(column: str, value: int) -> None:
    changes: dict[str, Any] = {column: np.array([0, 1, 2, value], np.int32)}
    with pytest.raises(DataError, match=rf"token id {value} in {column} is outside .*row p1-0"):
        check(make_table(**changes))


def test_a_topk_id_outside_the_vocabulary_is_refused_with_its_row() -> None:
    topk_ids = np.zeros((4, 2), np.int32)
    topk_ids[3, 1] = VOCAB
    with pytest.raises(DataError, match=r"teacher_topk_ids is outside .*row p1-0"):
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
        ({"uid": "p0-0"}, "a uid stands twice"),
    ],
)
def test_a_row_that_breaks_the_contract_is_refused_with_its_name(changes: dict[str, Any], message: str) -> None:
    table = make_table(**changes)
    row = changes.get("uid", "p1-0")
    with pytest.raises(DataError, match=rf"{message} \(shard 7, row {row}\)"):
        check(table)


@pytest.mark.parametrize("changes", [{"topk_ids": np.zeros((3, 2), np.int32)}, {"topk_logprobs": -np.ones((3, 2))}])
def test_a_topk_column_of_another_length_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="differ in length .*row p1-0"):
        check(make_table(topk=2, **changes))


@pytest.mark.parametrize("column", ["completion_ids", "rollout_logprobs", "teacher_logprobs"])
def test_a_null_among_the_tokens_is_refused_with_its_row(column: str) -> None:
    table = make_table()
    values = table[column].to_pylist()
    values[2][0] = None
    with pytest.raises(DataError, match=rf"{column} holds a null \(shard 7, row p2-0\)"):
        check(with_values(table, column, values))


@pytest.mark.parametrize("column", ["teacher_topk_ids", "teacher_topk_logprobs"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_null_among_the_topk_is_refused_with_its_row(column: str, whole: bool) -> None:
    table = make_table(topk=2)
    values = table[column].to_pylist()
    values[2][1] = None if whole else [values[2][1][0], None]
    with pytest.raises(DataError, match=rf"{column} holds a null \(shard 7, row p2-0\)"):
        check(with_values(table, column, values))


def test_the_row_named_is_right_in_a_slice() -> None:
    table = make_table(rows=6, rollout_logprobs=np.array([-1, -1, -1, 0.5], np.float32))
    check(table.slice(2))
    with pytest.raises(DataError, match="row p1-0"):
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
