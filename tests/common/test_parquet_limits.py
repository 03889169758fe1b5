"""Shards that are not what their commit announces, or are laid out as we never write them."""

import copy
import io
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq
import pytest

from common.errors import DataError
from common.parquet import announced, decode, encode, iter_row_groups
from common.parquet_limits import Announced
from common.schema import to_rows, to_table
from tests.common import forge
from tests.common.forge import forged
from tests.common.rows import make_row, make_table, same_rows

TEACHER_LOGPROBS = 6
"""A column by its place."""
BILLION = 10**9
ROWS = 4
HONEST = announced(make_table(ROWS))


def footer_field(change: Callable[[forge.Struct], Any]) -> bytes:
    return forged(lambda forgery: change(forgery.footer))


def meta_field(key: int, value: Any, chunk: int = TEACHER_LOGPROBS) -> bytes:
    def change(forgery: forge.Forgery) -> None:
        forgery.meta(chunk)[key].value = value

    return forged(change)


def page_field(key: int, value: Any, chunk: int = TEACHER_LOGPROBS) -> bytes:
    def change(forgery: forge.Forgery) -> None:
        forgery.chunks[chunk][0].header[key].value = value
        forgery.settle()

    return forged(change)


def footer_length(length: int) -> bytes:
    data = encode(make_table(ROWS))
    return data[:-8] + struct.pack("<I", length) + data[-4:]


def groups_that_share_their_pages(forgery: forge.Forgery) -> None:
    kind, groups = forgery.footer[forge.ROW_GROUPS].value
    forgery.footer[forge.ROW_GROUPS].value = (kind, groups * 1000)
    forgery.footer[forge.NUM_ROWS].value *= 1000


def without_checksum(forgery: forge.Forgery) -> None:
    del forgery.chunks[TEACHER_LOGPROBS][0].header[forge.PAGE_CRC]
    forgery.settle()


def many_pages(forgery: forge.Forgery) -> None:
    (page,) = forgery.chunks[TEACHER_LOGPROBS]
    empty = copy.deepcopy(page)
    empty.header[forge.PAGE_DATA].value[forge.DATA_VALUES].value = 0
    empty.store(b"")
    forgery.chunks[TEACHER_LOGPROBS] += [empty] * 16
    forgery.settle()


def encrypted_in_a_plain_footer(footer: forge.Struct) -> None:
    footer[forge.ENCRYPTION] = forge.Field(forge.STRUCT, {1: forge.Field(forge.STRUCT, {})})


def more_rows(footer: forge.Struct) -> None:
    footer[forge.NUM_ROWS].value = BILLION


def more_rows_in_the_group(footer: forge.Struct) -> None:
    footer[forge.ROW_GROUPS].value[1][0][forge.GROUP_ROWS].value = BILLION


def a_column_less(footer: forge.Struct) -> None:
    footer[forge.ROW_GROUPS].value[1][0][forge.GROUP_COLUMNS].value[1].pop()


LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a footer beyond the file": (lambda: footer_length(2**16), "a footer that is longer than the file"),
    "a footer of four gigabytes": (lambda: footer_length(2**32 - 1), "its footer has 4294967295 bytes"),
    "a footer of nothing": (lambda: footer_length(0), "a footer that does not end where it must"),
    "a footer cut short": (lambda: footer_length(100), "readable Parquet"),
    "an encrypted file": (lambda: encode(make_table(ROWS))[:-4] + b"PARE", "no Parquet file, or an encrypted one"),
    "encrypted columns": (lambda: footer_field(encrypted_in_a_plain_footer), "the shard is encrypted"),
    "more rows": (lambda: footer_field(more_rows), "the footer says 1000000000 rows, the commit 4"),
    "more rows in a group": (lambda: footer_field(more_rows_in_the_group), "rows of the row groups do not add up"),
    "a column less": (lambda: footer_field(a_column_less), "does not speak of 11 columns"),
    "a value more": (lambda: meta_field(forge.META_VALUES, 19), "19 values of teacher_logprobs, the commit 4 or 18"),
    "a billion values": (lambda: meta_field(forge.META_VALUES, BILLION), "1000000000 values of teacher_logprobs"),
    "many bytes": (lambda: meta_field(forge.META_UNCOMPRESSED, BILLION), "a row group of 4 rows decodes to 1000000"),
    "some bytes more": (
        lambda: meta_field(forge.META_UNCOMPRESSED, 2000),
        "18 values of teacher_.* in 2000 bytes",
    ),
    "one byte more": (lambda: meta_field(forge.META_UNCOMPRESSED, 114), "pages of teacher_logprobs are not those"),
    "negative bytes": (lambda: meta_field(forge.META_UNCOMPRESSED, -1), "an impossible number"),
    "another codec": (
        lambda: meta_field(forge.META_CODEC, 1),
        "teacher_logprobs is encrypted, .* or another codec",
    ),
    "an unknown codec": (lambda: meta_field(forge.META_CODEC, 127), "teacher_logprobs is encrypted, has a dictionary"),
    "a dictionary": (lambda: meta_field(forge.META_ENCODINGS, (forge.INT32, [3, 8])), "another encoding than we write"),
    "another place": (lambda: meta_field(forge.META_DATA_PAGE, 4), "teacher_logprobs does not lie where it must"),
    "a page of another kind": (lambda: page_field(forge.PAGE_TYPE, 2), "a page that is no plain data page"),
    "a page beyond its column": (
        lambda: page_field(forge.PAGE_COMPRESSED, 10**6),
        "a page that goes beyond its column",
    ),
    "shared pages": (lambda: forged(groups_that_share_their_pages), "its footer has 65.* bytes"),
    "many pages": (lambda: forged(many_pages), "teacher_logprobs has more than 16 pages"),
    "no checksum": (lambda: forged(without_checksum), "a page without checksum"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_footer_that_lies_is_refused(lie: str) -> None:
    make, message = LIES[lie]
    data = make()
    with pytest.raises(DataError, match=rf"{message}.*\(shard 7\)\. .* do not trust this dataset"):
        decode(data, HONEST, "shard 7")
    with pytest.raises(DataError, match=message):
        next(iter_row_groups(data, HONEST, "shard 7"))


def test_pages_that_row_groups_share_are_refused_when_their_rows_are_announced_too() -> None:
    said = Announced(*(1000 * count for count in (HONEST.rows, HONEST.prompt_tokens, HONEST.tokens)), topk=0)
    with pytest.raises(DataError, match="uid does not lie where it must"):
        decode(forged(groups_that_share_their_pages), said, "shard 7")


@pytest.mark.parametrize("number", ["rows", "prompt_tokens", "tokens", "topk"])
@pytest.mark.parametrize("step", [-1, 1])
def test_a_shard_that_is_not_what_its_commit_announces_is_refused(number: str, step: int) -> None:
    table = make_table(ROWS, topk=2)
    said = announced(table)
    with pytest.raises(DataError, match=r"the footer (says|does not speak of) .*\(shard 7\)|of teacher_topk"):
        decode(encode(table), replace(said, **{number: getattr(said, number) + step}), "shard 7")


@pytest.mark.parametrize("topk", [-1, 2**31, 2**70])
def test_an_impossible_topk_is_refused(topk: int) -> None:
    with pytest.raises(DataError, match="shard 7"):
        decode(encode(make_table(ROWS, topk=2)), replace(HONEST, topk=topk), "shard 7")


LAYOUTS: dict[str, dict[str, Any]] = {
    "pyarrow's defaults": {},
    "a dictionary": {"compression": "zstd", "write_page_checksum": True},
    "snappy": {"use_dictionary": False, "write_page_checksum": True},
    "no checksums": {"compression": "zstd", "use_dictionary": False},
    "data pages of version 2": {
        "compression": "zstd",
        "use_dictionary": False,
        "write_page_checksum": True,
        "data_page_version": "2.0",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_rows_in_another_layout_are_refused(layout: str) -> None:
    sink = io.BytesIO()
    pq.write_table(make_table(ROWS), sink, **LAYOUTS[layout])
    with pytest.raises(DataError, match=r"shard 7"):
        decode(sink.getvalue(), HONEST, "shard 7")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1\0\0\0\0PAR1", b"PAR1" + bytes(100) + b"PAR1", b"x"])
def test_what_is_no_parquet_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="the shard is not readable Parquet"):
        decode(data, HONEST, "shard 7")


def test_long_text_passes_and_is_split_by_its_bytes() -> None:
    rows = [make_row(index, meta=str(index) * (29 << 20)) for index in range(3)]
    table = to_table(rows)
    data = encode(table)

    groups = [to_rows(group) for group in iter_row_groups(data, announced(table), "shard 7")]
    assert [len(group) for group in groups] == [2, 1]
    assert same_rows([row for group in groups for row in group], rows)


def test_a_row_beyond_what_readers_accept_is_refused_by_the_writer() -> None:
    with pytest.raises(DataError, match=r"bytes of text for 1 rows .*Take fewer prompts a shard"):
        encode(to_table([make_row(meta="x" * (80 << 20))]), "shard 7")
