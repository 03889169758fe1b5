"""Shards that nobody wrote, under a commit whose hash fits: each is read as rows that keep the contract, or refused.

They are read in a process of limited memory, whose death would be a result as well.
"""

import copy
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.parquet import announced, encode
from common.parquet_limits import Announced
from common.schema import Rollout, to_rows, to_table
from tests.common import forge
from tests.common.rows import VOCAB, make_row, make_table, row_lists, same_rows
from tests.common.sandbox import Outcome, Sandbox

pytestmark = pytest.mark.slow
MEMORY = 1 << 30
TABLES = (make_table(), make_table(topk=2), make_table(rows=30))
NUMBERS = [0, 1, 2, 3, 9, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**33 + 1, 2**62, 2**63 - 1]
INTEGERS = st.sampled_from([*NUMBERS, *(-number for number in NUMBERS)])


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox(MEMORY)
    yield box
    box.close()


def read(sandbox: Sandbox, data: bytes, said: Announced, by_groups: bool = False) -> Outcome:
    """What a reader makes of `data`: rows or a refusal, and nothing else."""
    outcome = sandbox.read(data, said, by_groups)
    assert not outcome.failure, outcome.failure
    assert outcome.taken < MEMORY // 4
    return outcome


def assert_same_or_refused(outcome: Outcome, table: pa.Table) -> None:
    assert outcome.refusal or same_rows(outcome.rows or [], to_rows(table))


@given(st.sampled_from(TABLES), st.randoms(use_true_random=False), st.integers(1, 5), st.booleans())
@settings(max_examples=400, deadline=None)
def test_bytes_changed_put_in_or_taken_out(
    sandbox: Sandbox, table: pa.Table, chance: random.Random, edits: int, by_groups: bool
) -> None:
    data = bytearray(encode(table))
    for _ in range(edits):
        at, some = chance.randrange(len(data)), chance.randbytes(chance.randrange(1, 9))
        match chance.choice(["flip", "over", "in", "out", "cut", "twice"]):
            case "flip":
                data[at] ^= 1 << chance.randrange(8)
            case "over":
                data[at : at + len(some)] = some
            case "in":
                data[at:at] = some
            case "out":
                del data[at : at + len(some)]
            case "cut" if chance.random() < 0.2:
                del data[at:]
            case "twice":
                data[at:at] = data[at : at + 64]
        data = data or bytearray(b"x")
    assert_same_or_refused(read(sandbox, bytes(data), announced(table), by_groups), table)


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=100, deadline=None)
def test_noise_that_calls_itself_parquet(sandbox: Sandbox, noise: bytes, fitting: bool) -> None:
    length = len(noise) if fitting else len(noise) // 2
    data = b"PAR1" + noise + length.to_bytes(4, "little") + b"PAR1"
    assert read(sandbox, data, announced(TABLES[0])).refusal


@given(st.sampled_from(TABLES), st.data(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_metadata_that_lies(sandbox: Sandbox, table: pa.Table, data: st.DataObject, by_groups: bool) -> None:
    forgery = forge.take_apart(encode(table))
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(list(forgery.numbers())))
        if key not in (holder if isinstance(holder, dict) else range(len(holder))):
            continue  # a change before this one took it away
        if data.draw(st.integers(0, 9)) == 0:
            del holder[key]
        elif isinstance(holder[key], forge.Field):
            holder[key].value = data.draw(another(holder[key].kind, holder[key].value))
        else:
            holder[key] = data.draw(another(forge.INT32 if isinstance(holder[key], int) else 0, holder[key]))
    assert_same_or_refused(read(sandbox, forgery.data(), announced(table), by_groups), table)


def another(kind: int, value: Any) -> st.SearchStrategy[Any]:
    """Other values of the same Thrift type."""
    if kind in forge.INTEGERS:
        return st.one_of(INTEGERS, st.sampled_from([value - 1, value + 1, 2 * value]))
    if kind == forge.TRUE:
        return st.just(not value)
    if kind == forge.BYTE:
        return st.integers(0, 255)
    if isinstance(value, bytes):
        return st.sampled_from([b"", b"\xff\xfe", value[:-1], value + b"x", bytes(len(value)), b"A" * 70_000])
    if kind == forge.LIST:
        inner, items = value
        return st.sampled_from([[], items[:-1], items + items[:1], items[::-1], items * 3]).map(
            lambda chosen: (inner, copy.deepcopy(chosen))
        )
    return st.sampled_from([{}, value]) if isinstance(value, dict) else st.just(value)


@given(st.sampled_from(TABLES), st.randoms(use_true_random=False), st.integers(1, 4), st.booleans())
@settings(max_examples=350, deadline=None)
def test_pages_with_other_content_and_a_checksum_that_fits(
    sandbox: Sandbox, table: pa.Table, chance: random.Random, edits: int, by_groups: bool
) -> None:
    forgery = forge.take_apart(encode(table))
    page = chance.choice([page for pages in forgery.chunks for page in pages])
    body = bytearray(page.plain())
    for _ in range(edits):
        at = chance.randrange(len(body) + 1)
        match chance.choice(["flip", "over", "in", "out", "cut"]):
            case "flip" if at < len(body):
                body[at] ^= 1 << chance.randrange(8)
            case "over":
                body[at : at + 1] = bytes([chance.choice([0, 1, 127, 128, 255])])
            case "in":
                body[at:at] = bytes([chance.choice([0, 1, 255])]) * chance.randrange(1, 9)
            case "out":
                del body[at : at + chance.randrange(1, 9)]
            case "cut":
                del body[at:]
    page.store(bytes(body))
    forgery.settle()
    outcome = read(sandbox, forgery.data(), announced(table), by_groups)
    assert outcome.refusal or len(outcome.rows or []) == len(table)


LEAVES = (pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.binary(), pa.bool_(), pa.null())
TYPES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: inner.map(pa.list_) | inner.map(lambda kind: pa.struct([("a", kind)])) | inner.map(pa.large_list),
    max_leaves=3,
)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_other_tables(sandbox: Sandbox, data: st.DataObject) -> None:
    """Ours with a column lost, added, or of another type."""
    table = data.draw(st.sampled_from(TABLES))
    index = data.draw(st.integers(0, table.num_columns - 1))
    name, kind = table.column_names[index], data.draw(TYPES)
    other = pa.nulls(len(table), kind)
    match data.draw(st.sampled_from(["lose", "add", "change", "alone"])):
        case "lose":
            changed = table.drop_columns([name])
        case "add":
            changed = table.append_column(data.draw(st.sampled_from([name, "other"])), other)
        case "change":
            changed = table.set_column(index, name, other)
        case _:
            changed = pa.table({name: other})
    sink = io.BytesIO()
    pq.write_table(changed, sink, **data.draw(st.sampled_from(LAYOUTS)))
    assert read(sandbox, sink.getvalue(), announced(table)).refusal


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True},
    {"compression": "none", "data_page_version": "2.0"},
    {"compression": "gzip", "write_statistics": False, "store_schema": False},
]


@given(row_lists())
@settings(max_examples=100, deadline=None)
def test_rows_that_keep_the_contract_come_back_bit_for_bit(sandbox: Sandbox, made: tuple) -> None:
    rows, topk, _ = made
    table = to_table(rows, topk)
    assert same_rows(read(sandbox, encode(table), announced(table), by_groups=len(rows) % 2 == 0).rows or [], rows)


def long(tokens: int, **changes: Any) -> Rollout:
    return make_row(tokens, tokens=tokens, **changes)


EXTREMES: dict[str, Callable[[], list[Rollout]]] = {
    "one token": lambda: [make_row(tokens=1)],
    "no text": lambda: [make_row(prompt="", completion="", meta="", prompt_id="", finish_reason="")],
    "one token beside many": lambda: [long(1), long(100_000), long(2)],
    "many rows": lambda: [make_row(index, tokens=1) for index in range(5000)],
    "certain tokens": lambda: [make_row(rollout_logprobs=np.zeros(5, np.float32))],
    "minus zero": lambda: [make_row(rollout_logprobs=np.full(5, -0.0, np.float32))],
    "tokens next to impossible": lambda: [make_row(teacher_logprobs=np.full(5, -1e4, np.float32))],
    "the lowest float": lambda: [make_row(teacher_logprobs=np.full(5, np.finfo(np.float32).min))],
    "a subnormal": lambda: [make_row(teacher_logprobs=np.full(5, -1e-45, np.float32))],
    "the last id": lambda: [make_row(completion_ids=np.full(5, VOCAB - 1, np.int32))],
    "a text of megabytes": lambda: [make_row(meta="🙂" * 2_000_000)],
    "a nul in a text": lambda: [make_row(completion="a\0b\ufffd\U0010ffff")],
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("by_groups", [False, True])
def test_extreme_rows_come_back_bit_for_bit(sandbox: Sandbox, extreme: str, by_groups: bool) -> None:
    rows = EXTREMES[extreme]()
    table = to_table(rows)
    assert same_rows(read(sandbox, encode(table), announced(table), by_groups).rows or [], rows)
