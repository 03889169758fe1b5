"""Fingerprints of the weights in a model folder.

There are two, because one model may lie in one file or in forty. `weights_sha256` is of the files, and free where the
Hub's cache has named them by their hash; `tensors_sha256` is of what they hold, and outlives every repacking.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from common.canonical import parse_object
from common.errors import DataError
from common.safetensors_header import shown
from common.weight_files import FileHashes, TensorHash, hash_files, unreadable

INDEX = "model.safetensors.index.json"
HUB_BLOB = re.compile(r".*/models--[^/]+/blobs/(?P<sha256>[0-9a-f]{64})")
"""Where the Hub's cache keeps a large file: under the hash of its content."""
REPAIR = "Fetch the model again"


class Fingerprint(NamedTuple):
    """The hashes of a folder's weights."""

    weights_sha256: str
    tensors_sha256: str


def fingerprint(folder: Path) -> Fingerprint:
    """Both hashes, from one pass over the files that were written since they were last read.

    Raises:
        DataError: no safetensors weights; a file that is malformed, missing, or not what its name in the Hub's cache
            says; a tensor that lies in two files, or not where the index has it.
        StorageError, RetryLater: a file cannot be read, or changed meanwhile.
    """
    files = _weight_files(folder)
    read = dict(zip(files, hash_files(files, _label(folder)), strict=True))
    for file, hashes in read.items():
        _require_name(file, hashes)
    tensors = _tensors(folder, read)
    listed = [[name, tensor.dtype, tensor.shape, tensor.sha256] for name, tensor in sorted(tensors.items())]
    return Fingerprint(_hash([hashes.sha256 for hashes in read.values()]), _hash(listed))


def weights_sha256(folder: Path) -> str:
    """Hash over the hashes of all safetensors files, in the order of their names; raises as `fingerprint` does.

    Files of the Hub's cache are not read: their names are their hashes.
    """
    files = _weight_files(folder)
    named = {file: sha256 for file in files if (sha256 := _hub_name(file)) is not None}
    others = [file for file in files if file not in named]
    read = dict(zip(others, hash_files(others, _label(folder)), strict=True))
    return _hash([named[file] if file in named else read[file].sha256 for file in files])


def tensors_sha256(folder: Path) -> str:
    """Hash over name, dtype, shape and bytes of every tensor, sorted by name; raises as `fingerprint` does."""
    return fingerprint(folder).tensors_sha256


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(
            "the model has no safetensors weights", where=str(folder), fix="Convert it; pickled weights are not opened"
        )
    named = {*(file.name for file in files), *_index(folder).values()}
    missing = sorted(named - {file.name for file in files if _is_there(file)})
    if missing:
        what = f"{len(missing)} files of its weights are missing, the first is {shown(missing[0])}"
        raise DataError(f"the model is incomplete: {what}", where=str(folder), fix=REPAIR)
    return files


def _is_there(file: Path) -> bool:
    """Whether there is a file, and no link into a cache since cleared."""
    try:
        return file.is_file()
    except OSError as error:
        raise unreadable(error, file) from None


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> name of its file, as the list beside a sharded model has it; empty where there is no such list."""
    path = folder / INDEX
    try:
        places = parse_object(path.read_bytes(), str(path), REPAIR).get("weight_map")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable(error, path) from None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise DataError("the index has no weight_map of tensors and files", where=str(path), fix=REPAIR)
    return places


def _tensors(folder: Path, read: Mapping[Path, FileHashes]) -> dict[str, TensorHash]:
    """All tensors by name, each in one file and, where there is an index, in the one it names."""
    places: dict[str, str] = {}
    tensors: dict[str, TensorHash] = {}
    for file, hashes in read.items():
        if twice := sorted(hashes.tensors.keys() & tensors.keys()):
            raise DataError(
                f"tensor {shown(twice[0])} lies in two files, {places[twice[0]]} and {file.name}",
                where=str(folder),
                fix="Keep one copy of the weights in the folder",
            )
        tensors |= hashes.tensors
        places |= dict.fromkeys(hashes.tensors, file.name)
    for name, place in _index(folder).items():
        if places.get(name) != place:
            raise DataError(
                f"tensor {shown(name)} is not in {shown(place)}, where the model's index has it",
                where=str(folder),
                fix=REPAIR,
            )
    return tensors


def _hub_name(file: Path) -> str | None:
    """The hash by which the Hub's cache calls the file; None for a file that lies elsewhere."""
    blob = HUB_BLOB.fullmatch(os.path.realpath(file))
    return blob["sha256"] if blob else None


def _require_name(file: Path, hashes: FileHashes) -> None:
    if _hub_name(file) not in (None, hashes.sha256):
        raise DataError(
            "the file in the Hub's cache is damaged: its content is not what its name says",
            where=hashes.file.path,
            fix="Delete it, then fetch the model again",
        )


def _label(folder: Path) -> str:
    return f"fingerprint of {folder.name}"


def _hash(value: list[str] | list[list[object]]) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
