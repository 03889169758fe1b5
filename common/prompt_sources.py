"""Records of prompt files: JSONL and Parquet, on any URL, read one after another with where each of them stands."""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError
from common.prompt_spool import scratch_file
from common.storage import NotFound, Store
from common.urls import split_key

SUFFIXES = (".jsonl", ".parquet")
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "eval", "evaluation": "eval", "heldout": "eval",
}  # fmt: skip
"""Words of a file's name that say to which split of a dataset it belongs."""
ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are in memory as Python objects."""


def records_of(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record of a source, as `load_prompts` takes them, and the file and line or row where it stands.

    Raises:
        DataError: nothing is there, a file is malformed, or the files are of several splits.
    """
    for store, name in _files(source):
        url = f"{store.url}/{name}"
        with scratch_file() as file:
            try:
                store.fetch(name, file, in_one_request=True)
            except NotFound:
                raise DataError("the prompt file does not exist", where=source, fix="Check PROMPTS") from None
            yield from _parquet_records(url, file) if name.endswith(".parquet") else _jsonl_records(url, file)


def _files(source: str) -> list[tuple[Store, str]]:
    folder, name = split_key(source) if source.endswith(SUFFIXES) else (source, "")
    store = Store(folder)
    if name and "*" not in name:
        return [(store, name)]
    names = [entry.name for entry in store.list() if entry.name.endswith(SUFFIXES)]
    if name:
        names = [each for each in names if "/" not in each and fnmatchcase(each, name)]
    if not names:
        raise DataError(
            "no .jsonl or .parquet file is here", where=source, fix="Give a file, a folder or hf://datasets/..."
        )
    _require_one_split(names, source)
    return [(store, name) for name in names]


def _require_one_split(names: list[str], source: str) -> None:
    """Refuse files of several folders or splits: a test set among the prompts spoils every later evaluation."""
    places = {(name.rpartition("/")[0], _split_of(name)) for name in names}
    if len(places) > 1:
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise DataError(
            f"several splits or configurations lie here: {shown}",
            where=source,
            fix="Name one: its folder, its file, or its files as .../train-*.parquet",
        )


def _split_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.rpartition("/")[2].lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _jsonl_records(url: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(file), 1):
        where = f"{url}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"bad JSON: {error}", where=where, fix="Mend or remove the line") from None
        if not isinstance(record, dict):
            raise DataError(f"a row must be a JSON object, not {type(record).__name__}", where=where)
        yield where, record


def _lines(file: Path) -> Iterator[bytes]:
    """Lines that end with any of \\n, \\r\\n and \\r."""
    with open(file, "rb") as lines:
        for some in lines:
            yield from some.splitlines()


def _parquet_records(url: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{url}, row {number}", record
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not readable Parquet: {error}", where=url) from None
