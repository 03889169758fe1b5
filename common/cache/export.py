"""`lopd cache export`: a dataset as one file in the layout of another trainer."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from common.cache.export_formats import to_slime, to_trl, to_verl
from common.cache.stream import row_groups
from common.dataset import Dataset, open_dataset
from common.errors import UsageError
from common.storage import Store
from common.storage_errors import explain
from common.urls import clean_url, is_url, split_key

Format = Literal["jsonl", "trl", "verl", "slime"]
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".jsonl.gz"),
    "trl": (".parquet",),
    "verl": (".parquet",),
    "slime": (".parquet",),
}
"""How the output's name must end: readers go by it."""
ROWS_AT_ONCE = 64
"""Rows that are Python objects at the same time while JSON is written."""
GZIP_LEVEL = 6


@dataclass(frozen=True)
class Exported:
    """The file that was made."""

    format: str
    output: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    manifest_sha256: str
    """Of the dataset it was made of."""
    overrides: tuple[str, ...]


def export(url: str, format: Format, output: str, *, overwrite: bool) -> Exported:
    """Write the finished dataset at `url` to the file or URL `output`, which appears whole or not at all.

    Rows are read verified, one row group at a time, and gathered in a temporary file of this machine first.

    Raises:
        UsageError: the name does not fit the format, something lies there, or the format needs scores that are not
            there.
    """
    target = clean_url(output)
    if not target.endswith(SUFFIXES[format]):
        raise UsageError(
            f"the format {format} is written to a file that ends in {' or '.join(SUFFIXES[format])}", where=target
        )
    folder, key = split_key(target)
    if is_url(target) and not is_url(folder):
        raise UsageError("this names a bucket and no file", where=target, fix="Give a name within it")
    store = Store(folder)
    if not overwrite and store.exists(key):
        raise UsageError("something lies there", where=target, fix="Give another --output, or --overwrite")
    dataset = open_dataset(url)
    _require_scores(dataset, format)
    with TemporaryDirectory(prefix="lopd-export-") as temporary, _explained(temporary):
        file = Path(temporary) / key
        tables = row_groups(dataset, "export")
        if format == "jsonl":
            _write_jsonl(file, tables)
        else:
            convert = {"trl": to_trl, "slime": to_slime, "verl": lambda table: to_verl(table, _source(dataset))}[format]
            _write_parquet(file, map(convert, tables), _stamp(dataset))
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        store.send(file, key)
        size = file.stat().st_size
    return Exported(
        format=format,
        output=target,
        rows=dataset.num_rows,
        tokens=dataset.num_tokens,
        bytes=size,
        sha256=digest,
        manifest_sha256=dataset.manifest_sha256,
        overrides=tuple(dataset.plan["overrides"]),
    )


def _require_scores(dataset: Dataset, format: Format) -> None:
    """Refuse what the format's reader would take for something else."""
    if dataset.kind == "scored" or format == "jsonl" or (format == "trl" and dataset.kind == "sft"):
        return
    fix = "Score it by `lopd precompute score`, or give --format jsonl"
    raise UsageError(
        f"the format {format} needs teacher log-probs, and a dataset of kind {dataset.kind!r} has none",
        where=dataset.url,
        fix="Give --format trl or jsonl" if dataset.kind == "sft" else fix,
    )


def _source(dataset: Dataset) -> str:
    return f"lightning-opd/{dataset.manifest['dataset_id']}"


def _stamp(dataset: Dataset) -> dict[str, str]:
    """What the file says of its origin in its Parquet metadata."""
    return {
        "lopd.url": dataset.url,
        "lopd.manifest_sha256": dataset.manifest_sha256,
        "lopd.overrides": json.dumps(list(dataset.plan["overrides"])),
    }


def _write_parquet(file: Path, tables: Iterator[pa.Table], stamp: dict[str, str]) -> None:
    """A row group for each table; plain Parquet that older readers open too."""
    first = next(tables)
    schema = first.schema.with_metadata(stamp)
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(first.cast(schema))
        for table in tables:
            writer.write_table(table.cast(schema))


def _write_jsonl(file: Path, tables: Iterable[pa.Table]) -> None:
    """All columns, one row a line."""
    with open(file, "wb") as raw, _maybe_gzip(raw, file) as stream:
        for table in tables:
            for start in range(0, len(table), ROWS_AT_ONCE):
                for row in table.slice(start, ROWS_AT_ONCE).to_pylist():
                    stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


@contextmanager
def _maybe_gzip(raw: BinaryIO, file: Path) -> Iterator[Any]:
    """`raw`, compressed if the name says so; without a time stamp, so that equal rows make equal files."""
    if file.suffix != ".gz":
        yield raw
        return
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=GZIP_LEVEL, mtime=0) as stream:
        yield stream


@contextmanager
def _explained(folder: str) -> Iterator[None]:
    """A full disk is an error of ours."""
    try:
        yield
    except OSError as error:
        raise explain(error, "write", folder) or error from error
