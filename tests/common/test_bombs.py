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

from common.parquet import announced
from common.parquet_limits import Announced
from tests.common import forge
from tests.common.forge import forged
from tests.common.rows import make_table
from tests.common.sandbox import Sandbox

MEMORY = 3 << 29
"""What a reader may take beyond what it began with: 1.5 GiB."""
FEW = 100 << 20
"""What refusing a bomb may take."""
BILLION = 10**9
COMPLETION_IDS, ROLLOUT_LOGPROBS, TEACHER_LOGPROBS, META = 4, 5, 6, 10
"""Columns by their place, without top-k."""
ROWS = 4
HONEST = announced(make_table(ROWS))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(MEMORY)
    yield box
    box.close()


def all_nulls(forgery: forge.Forgery, *chunks: int) -> None:
    """The last row of these columns gets a billion nulls, in a page of some bytes."""
    for index in chunks:
        (page,) = forgery.chunks[index]
        page.header[forge.PAGE_DATA].value[forge.DATA_VALUES].value = BILLION
        null = 2 if index == TEACHER_LOGPROBS else 1  # the level of a null in a list that may be null, or may not
        page.store(forge.levels((0, ROWS), (1, BILLION - ROWS)) + forge.levels((null, BILLION)))
    forgery.settle()


def one_column_of_nulls() -> tuple[bytes, Announced]:
    return forged(lambda forgery: all_nulls(forgery, TEACHER_LOGPROBS)), HONEST


def nulls_that_are_announced() -> tuple[bytes, Announced]:
    columns = (COMPLETION_IDS, ROLLOUT_LOGPROBS, TEACHER_LOGPROBS)
    return forged(lambda forgery: all_nulls(forgery, *columns)), replace(HONEST, tokens=BILLION)


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
    sink = io.BytesIO()
    layout: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": ["prompt"],
        "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in table.column_names[3:7]},
        "write_page_checksum": True,
        "store_schema": False,
    }
    pq.write_table(table.set_column(index, "prompt", text), sink, **layout)
    return sink.getvalue(), announced(table)


BOMBS = {
    one_column_of_nulls: "1000000000 values of teacher_logprobs, the commit 4 or 18",
    nulls_that_are_announced: "a row group of 4 rows decodes to 12000",
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
@pytest.mark.parametrize("bomb", BOMBS)
def test_pyarrow_alone_runs_out_of_memory_on_a_bomb(
    sandbox: Sandbox, bomb: Callable[[], tuple[bytes, Announced]]
) -> None:
    """Else the test above would refuse what harms nobody."""
    assert "MemoryError" in sandbox.read(bomb()[0], None).failure
