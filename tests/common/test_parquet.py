import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.parquet import announced, decode, encode
from common.parquet_limits import ROW_GROUP_TOKENS
from common.schema import to_rows, to_table
from tests.common.rows import make_row, make_table, row_lists, same_rows


def stored(table: pa.Table) -> pa.Table:
    return decode(encode(table), announced(table), "shard 7")


@given(row_lists())
@settings(max_examples=60, deadline=None)
def test_rows_come_back_bit_for_bit(made: tuple) -> None:
    rows, topk, _ = made
    assert same_rows(to_rows(stored(to_table(rows, topk))), rows)


@given(row_lists(), st.data())
@settings(max_examples=40, deadline=None)
def test_slices_and_chunks_are_stored_as_the_rows_they_show(made: tuple, data: st.DataObject) -> None:
    rows, topk, _ = made
    cut = data.draw(st.integers(0, len(rows)))
    table = to_table(rows, topk)
    chunked = pa.concat_tables([table.slice(cut), table.slice(0, cut)])

    assert same_rows(to_rows(stored(table.slice(cut))), rows[cut:])
    assert same_rows(to_rows(stored(chunked)), rows[cut:] + rows[:cut])


@given(st.integers(0), st.integers(1, 255), st.sampled_from([0, 3]))
@settings(max_examples=300, deadline=None)
def test_a_flipped_byte_is_never_read_as_other_values(position: int, mask: int, topk: int) -> None:
    table = make_table(rows=20, topk=topk)
    altered = bytearray(encode(table))
    altered[position % len(altered)] ^= mask

    try:
        read = decode(bytes(altered), announced(table), "shard 7")
    except DataError:
        return
    assert same_rows(to_rows(read), to_rows(table))


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
