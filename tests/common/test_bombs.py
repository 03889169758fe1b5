"""Shards of some kilobytes that hold gigabytes: refused by their announcement, before they take memory."""

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.columns import leaf_type
from common.parquet import announced
from common.parquet_limits import Announced
from common.schema import to_table
from tests.common import forge
from tests.common.forge import forged
from tests.common.rows import make_row, make_table
from tests.common.sandbox import Sandbox

MEMORY = 3 << 29
"""What a reader may take beyond what it began with: 1.5 GiB."""
FEW = 100 << 20
"""What refusing a bomb may take."""
BILLION = 10**9
COMPLETION_IDS, ROLLOUT_LOGPROBS, TEACHER_LOGPROBS, META = 4, 5, 6, 10
"""Columns by their place, without top-k."""
TOP_COLUMNS = (7, 8)
"""Columns by their place, with it."""
TOKENS = TOPK = 1024
ROWS = 4
HONEST = announced(make_table(ROWS))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(MEMORY)
    yield box
    box.close()


def no_values(forgery: forge.Forgery, *chunks: int) -> None:
    """The last row of these columns gets a billion entries without a value, in a page of some bytes."""
    for index in chunks:
        (page,) = forgery.chunks[index]
        page.header[forge.PAGE_DATA].value[forge.DATA_VALUES].value = BILLION
        empty = 1 if index == TEACHER_LOGPROBS else 0  # the level of an empty list where it may be null, or may not
        page.store(forge.levels((0, ROWS), (1, BILLION - ROWS)) + forge.levels((empty, BILLION)))
    forgery.settle()


def one_column_without_values() -> tuple[bytes, Announced]:
    return forged(lambda forgery: no_values(forgery, TEACHER_LOGPROBS)), HONEST


def no_values_where_they_are_announced() -> tuple[bytes, Announced]:
    columns = (COMPLETION_IDS, ROLLOUT_LOGPROBS, TEACHER_LOGPROBS)
    return forged(lambda forgery: no_values(forgery, *columns)), replace(HONEST, tokens=BILLION)


def null_lists_of_a_fixed_size() -> tuple[bytes, Announced]:
    """As many null lists as values were announced; each takes no byte in the file and `TOPK` values in memory."""
    return null_lists().data(), announced(wide_table())


def null_lists_that_the_arrow_schema_denies() -> tuple[bytes, Announced]:
    forgery = null_lists()
    forgery.footer[forge.KEY_VALUES] = honest_lists().footer[forge.KEY_VALUES]
    return forgery.data(), announced(wide_table())


def null_lists_that_the_whole_schema_denies() -> tuple[bytes, Announced]:
    """In the levels of the schema that we write a null list is an empty one."""
    forgery, honest = null_lists(), honest_lists()
    for key in (forge.SCHEMA, forge.KEY_VALUES):
        forgery.footer[key] = honest.footer[key]
    for index in TOP_COLUMNS:
        (page,) = forgery.chunks[index]
        page.store(page.plain() + bytes(4 * TOKENS * TOPK))
        del forgery.meta(index)[forge.META_SIZES]
    forgery.settle()
    return forgery.data(), announced(wide_table())


def null_lists() -> forge.Forgery:
    """One row whose lists of teacher tokens are all null, by a schema that allows it, in our layout otherwise."""
    table = wide_table()
    for index in TOP_COLUMNS:
        field = table.schema.field(index)
        lists = pa.nulls(TOKENS * TOPK, pa.list_(leaf_type(field.type), TOPK))
        column = pa.ListArray.from_arrays(pa.array([0, len(lists)], pa.int32()), lists)
        table = table.set_column(index, field.name, column)
    return forge.take_apart(laid_out(table, use_dictionary=False))


def honest_lists() -> forge.Forgery:
    return forge.take_apart(laid_out(wide_table(), use_dictionary=False))


def wide_table() -> pa.Table:
    """One row of `TOKENS` tokens with the top `TOPK` of the teacher."""
    return to_table([make_row(tokens=TOKENS, topk=TOPK)], TOPK)


def laid_out(table: pa.Table, use_dictionary: Any) -> bytes:
    """The table in the layout of `common.parquet.encode`, without its checks."""
    split = [f"{field.name}.list.element" for field in table.schema if pa.types.is_list(field.type)]
    layout: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": use_dictionary,
        "column_encoding": {name + (".list.element" if "topk" in name else ""): "BYTE_STREAM_SPLIT" for name in split},
        "write_page_checksum": True,
        "write_statistics": False,
        "data_page_size": 1 << 30,
    }
    sink = io.BytesIO()
    pq.write_table(table, sink, **layout)
    return sink.getvalue()


def zeros(forgery: forge.Forgery) -> None:
    """The last `meta` is 1.9 GB of zeros in some kilobytes of zstd."""
    size, (page,) = 1_900_000_000, forgery.chunks[META]
    sink, block = pa.BufferOutputStream(), bytes(1 << 20)
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(bytes(4 * (ROWS - 1)) + struct.pack("<I", size))
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
    page.body = sink.getvalue().to_pybytes()
    page.header[forge.PAGE_UNCOMPRESSED].value = 4 * ROWS + size
    page.sign()


def a_text_of_zeros() -> tuple[bytes, Announced]:
    def change(forgery: forge.Forgery) -> None:
        zeros(forgery)
        forgery.settle()

    return forged(change), HONEST


def a_text_of_zeros_of_which_the_footer_is_silent() -> tuple[bytes, Announced]:
    def change(forgery: forge.Forgery) -> None:
        said = forgery.meta(META)[forge.META_UNCOMPRESSED].value
        zeros(forgery)
        forgery.settle()
        forgery.meta(META)[forge.META_UNCOMPRESSED].value = said

    return forged(change), HONEST


def one_text_in_a_dictionary() -> tuple[bytes, Announced]:
    rows = 20_000
    one = make_table(1)
    table = pa.concat_tables([one] * rows).combine_chunks()
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * (1 << 20)]))
    index = table.schema.get_field_index("prompt")
    return laid_out(table.set_column(index, "prompt", text), use_dictionary=["prompt"]), announced(table)


BOMBS = {
    one_column_without_values: "1000000000 values of teacher_logprobs, the commit 4 or 18",
    no_values_where_they_are_announced: "a row group of 4 rows decodes to 12000",
    null_lists_of_a_fixed_size: r"teacher_topk_ids is list<element: fixed_size_list<element: int32>\[1024\]>, not",
    null_lists_that_the_arrow_schema_denies: r"teacher_topk_ids is .*<element: int32>\[1024\]>, not .* not null",
    null_lists_that_the_whole_schema_denies: "Expected all lists to be of size=1024 but index 1 had size=0",
    a_text_of_zeros: "1900000.* bytes of text for 4 rows and 36 tokens",
    a_text_of_zeros_of_which_the_footer_is_silent: "the pages of meta are not those of which the footer speaks",
    one_text_in_a_dictionary: "prompt is encrypted, has a dictionary, or another codec",
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("by_groups", [False, True])
def test_a_bomb_is_refused_before_it_takes_memory(
    sandbox: Sandbox, bomb: Callable[[], tuple[bytes, Announced]], by_groups: bool
) -> None:
    data, said = bomb()
    outcome = sandbox.read(data, said, by_groups)

    assert len(data) < 1 << 20
    assert re.search(BOMBS[bomb], outcome.refusal), outcome
    assert outcome.taken < FEW


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [bomb for bomb in BOMBS if bomb is not null_lists_that_the_whole_schema_denies])
def test_pyarrow_alone_runs_out_of_memory_on_a_bomb(
    sandbox: Sandbox, bomb: Callable[[], tuple[bytes, Announced]]
) -> None:
    """Else the test above would refuse what harms nobody. One bomb is left out, which our schema alone defuses."""
    assert "MemoryError" in sandbox.read(bomb()[0], None).failure
