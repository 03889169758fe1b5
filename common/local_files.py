"""Local files that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

PARTIAL = ".part"
"""Ending of a file that is being written; one that stays is the leaving of a killed writer."""


@contextmanager
def appears_whole(path: Path, create: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to, linked or renamed at the end: `path` appears whole, or stays as it was."""
    _make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}{PARTIAL}")
    try:
        yield partial
        if create:
            os.link(partial, path)
        else:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, source: BinaryIO, create: bool = False) -> None:
    """Write all of `source` to `path`, through to the disk. Raises `FileExistsError` when `create` finds it there."""
    with appears_whole(path, create) as partial, open(partial, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 24)
        file.flush()
        os.fsync(file.fileno())


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file, through to the disk."""
    with open(source, "rb") as file:
        write_whole(target, file)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file is in the way, which must not be taken for an object of ours that exists
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
