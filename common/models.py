"""A model is a Hub id, a folder or a URL. Here it becomes a local folder, and a folder becomes a URL.

The GPU box and the training cluster share nothing but the store, so models travel through it as datasets do.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of the HTTP library it uses, whichever that is
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pydantic import ValidationError

from common.canonical import first_problem, parse_object
from common.config import Frozen
from common.errors import DataError, LopdError, RetryLater, UsageError
from common.lineage import PROVENANCE, read_provenance
from common.local_cache import cache_dir
from common.quantization import Quantization, quantization_of
from common.storage import Entry, NotFound, Store
from common.storage_errors import explain
from common.urls import clean_url, is_url

CONFIG = "config.json"
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+?)(@(?P<revision>[\w.-]+))?")
MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""Code is fetched as it is, and run by nobody who was not told to."""


class ModelConfig(Frozen):
    """What of `config.json` the data path needs."""

    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    model_type: str = ""
    quantization: Quantization | None = None
    code: tuple[str, ...] = ()
    """What its `auto_map` names: classes in Python files that the model brings along."""


def resolve(ref: str) -> Path:
    """A local folder with the model's files.

    Args:
        ref: a folder, a URL (fetched once into the local cache, again when it changes there), or a Hub id
            `ORG/NAME[@REVISION]`.

    Raises:
        UsageError: nothing of that name.
        DataError: no `config.json`, or weights that are not those its provenance speaks of.
        StorageError, RetryLater: it is there, but cannot be had or kept now.
    """
    if not ref.strip():
        raise UsageError("no model is named", fix="Give MODEL=<Hub id, folder or URL>")
    if ref.startswith("file://"):
        ref = clean_url(ref)
    folder = _fetch(ref) if is_url(ref) else Path(ref).expanduser()
    if not folder.exists() and (hub := HUB_ID.fullmatch(ref)):
        folder = _from_hub(hub["repo"], hub["revision"])
    if not folder.is_dir():
        raise UsageError("there is no such model", where=ref, fix="Give a Hub id, a folder or a URL")
    if not (folder / CONFIG).exists():
        raise DataError("the model has no config.json", where=ref, fix="Name the folder that holds it")
    return folder


def resolve_config(ref: str) -> Path:
    """A local folder with the model's `config.json`; of a model that is not here, nothing else is fetched for it.

    Raises:
        As `resolve` does.
    """
    ref = clean_url(ref) if ref.startswith("file://") else ref
    if is_url(ref):
        return _fetch_config(ref)
    hub = HUB_ID.fullmatch(ref)
    if hub is None or Path(ref).expanduser().exists():
        return resolve(ref)
    return _from_hub(hub["repo"], hub["revision"], [CONFIG])


def reference(model: str) -> str:
    """How a model is named in artifacts: a Hub id as it is, a folder or URL without anything secret."""
    return clean_url(model) if is_url(model) or Path(model).expanduser().exists() else model


def hub_repo(model: str) -> str | None:
    """`ORG/NAME` of a Hub id, without its revision; None for a folder or a URL."""
    hub = HUB_ID.fullmatch(model)
    return hub["repo"] if hub and not Path(model).expanduser().exists() else None


def pinned(name: str, revision: str | None) -> str:
    """How to ask for the very model that an identity speaks of: a Hub id with its revision, else the name alone."""
    repo = hub_repo(name) if revision else None
    return f"{repo}@{revision}" if repo else name


def publish(folder: Path, url: str) -> None:
    """Copy a model folder to a URL: weights first, `config.json` last, so that a half-copied one is no model."""
    store = Store(url)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in sorted(files, key=lambda file: (file.name == CONFIG, file.suffix == ".json", file.name)):
        store.send(file, file.name)


def read_config(folder: Path) -> ModelConfig:
    """What `ModelConfig` holds, of a model folder."""
    generation_config = folder / "generation_config.json"
    config = _read_json(folder / CONFIG)
    generation = _read_json(generation_config) if generation_config.exists() else {}
    eos = {*_as_ids(config.get("eos_token_id")), *_as_ids(generation.get("eos_token_id"))}
    if "vocab_size" not in config or "max_position_embeddings" not in config:
        raise DataError("config.json lacks vocab_size or max_position_embeddings", where=str(folder / CONFIG))
    try:
        return ModelConfig(
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            eos_token_ids=tuple(sorted(eos)),
            model_type=config.get("model_type", ""),
            quantization=quantization_of(config),
            code=tuple(sorted({str(name) for name in (config.get("auto_map") or {}).values()})),
        )
    except ValidationError as error:
        raise DataError(f"malformed config: {first_problem(error)}", where=str(folder / CONFIG)) from None


def _fetch(url: str) -> Path:
    store = Store(url)
    entries = [entry for entry in store.list() if "/" not in entry.name]
    if CONFIG not in {entry.name for entry in entries}:
        raise DataError("the model has no config.json", where=store.url, fix="Name the URL of the folder that holds it")
    content = [entry for entry in entries if entry.name != PROVENANCE]
    folder = cache_dir() / "models" / _version(store, content)
    complete = (folder / CONFIG).exists()
    for entry in content:
        if not complete and entry.name != CONFIG:
            store.fetch(entry.name, folder / entry.name)
    if len(content) < len(entries):
        store.fetch(
            PROVENANCE, folder / PROVENANCE
        )  # every time: a claim may be attested after the weights were fetched
    else:
        (folder / PROVENANCE).unlink(missing_ok=True)
    if not complete:
        read_provenance(folder)
        store.fetch(CONFIG, folder / CONFIG)  # last, so that neither half a copy nor a refused one is taken for a model
    return folder


def _fetch_config(url: str) -> Path:
    store = Store(url)
    try:
        config = store.get(CONFIG)
    except NotFound:
        raise DataError("the model has no config.json", where=store.url, fix="Name the URL of its folder") from None
    folder = cache_dir() / "configs" / hashlib.sha256(config).hexdigest()[:32]
    Store(str(folder)).put(CONFIG, config)
    return folder


def _version(store: Store, entries: list[Entry]) -> str:
    """A name for what lies at the URL now, so that a model exported again is fetched again."""
    files = [(entry.name, entry.size, entry.version) for entry in entries]
    small = {}
    for name in (CONFIG, "model.safetensors.index.json"):
        try:
            small[name] = hashlib.sha256(store.get(name)).hexdigest()
        except NotFound:
            small[name] = ""
    return hashlib.sha256(json.dumps([store.url, files, small]).encode()).hexdigest()[:32]


def _from_hub(repo: str, revision: str | None, files: Sequence[str] = MODEL_FILES) -> Path:
    where = f"{repo}@{revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"there is no such model: neither a folder nor on the Hub ({type(error).__name__})",
            where=where,
            fix="Check the name, and HF_TOKEN if it is private",
        ) from None
    except (OSError, HTTPError) as error:
        raise _explain_hub(error, where) from None


def _explain_hub(error: Exception, where: str) -> LopdError:
    """Why the Hub did not give us a model: it is switched off, the network or the Hub is down, or our disk is full."""
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return UsageError(
            "there is no such model: neither a folder nor in the Hub's cache, and the Hub is switched off",
            where=where,
            fix="Check the name, or unset HF_HUB_OFFLINE",
        )
    outage = RetryLater(
        f"the Hub cannot be reached: {type(error.__cause__ or error).__name__}",
        where=where,
        fix="Check the network, then run the same command again",
    )
    if isinstance(error, (LocalEntryNotFoundError, HfHubHTTPError, HTTPError)):
        return outage
    return explain(error, "fetch", where) or outage


def _read_json(file: Path) -> dict[str, Any]:
    return parse_object(file.read_bytes(), str(file))


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
