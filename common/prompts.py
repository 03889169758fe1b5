"""Prompts from JSONL, Parquet or a Hub dataset, on any URL.

A prompt is plain text or a list of messages; every other column travels along as `meta` (the answer, the source), so
that a verifier finds it beside the rollout.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.config import did_you_mean
from common.errors import DataError
from common.storage import NotFound, Store
from common.urls import split_key

TEXT_COLUMNS = ("prompt", "messages", "question", "problem", "text")
"""Where a prompt is looked for, in this order, when no column is named."""
ID_COLUMNS = ("prompt_id", "id", "uid", "task_id")
SUFFIXES = (".jsonl", ".parquet")
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "eval", "evaluation": "eval", "heldout": "eval",
}  # fmt: skip
"""Words of a file's name that say to which split of a dataset it belongs."""


@dataclass(frozen=True)
class Prompt:
    """One prompt; exactly one of `text` and `messages` is set."""

    id: str
    text: str = ""
    messages: list[dict[str, str]] | None = None
    meta: str = "{}"

    def as_text(self) -> str:
        """For people: the text, or the messages one after another."""
        return self.text if self.messages is None else "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


@dataclass(frozen=True)
class PromptSet:
    """All prompts of a source, in its order, and the hash that pins them in a plan."""

    prompts: tuple[Prompt, ...]
    sha256: str
    source: str


def load_prompts(source: str, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Read prompts.

    Args:
        source: a `.jsonl` or `.parquet` file, a folder of them or several by `*` (`.../data/train-*.parquet`), on any
            URL; a Hub dataset is `hf://datasets/ORG/NAME`. All files must be of one split.
        column: where the prompt stands; `TEXT_COLUMNS` are tried unless given.
        limit: take only the first so many.

    Raises:
        DataError: missing, empty, malformed (with the line), without such a column, or of several splits.
    """
    prompts = []
    for where, record in _records(source):
        prompts.append(_prompt(record, column, where))
        if limit is not None and len(prompts) == limit:
            break
    if not prompts:
        raise DataError("there are no prompts", where=source, fix="Give a file with at least one row")
    prompts = _with_distinct_ids(prompts, source)
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.text, prompt.messages, prompt.meta], sort_keys=True).encode())
    return PromptSet(tuple(prompts), digest.hexdigest(), Store(source).url)


def _records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for url, data in _files(source):
        if url.endswith(".parquet"):
            yield from _parquet_records(url, data)
        else:
            yield from _jsonl_records(url, data)


def _files(source: str) -> Iterator[tuple[str, bytes]]:
    folder, name = split_key(source) if source.endswith(SUFFIXES) else (source, "")
    store = Store(folder)
    if name and "*" not in name:
        try:
            yield source, store.get(name)
        except NotFound:
            raise DataError("the prompt file does not exist", where=source, fix="Check PROMPTS") from None
        return
    names = [entry.name for entry in store.list() if entry.name.endswith(SUFFIXES)]
    if name:
        names = [each for each in names if "/" not in each and fnmatchcase(each, name)]
    if not names:
        raise DataError(
            "no .jsonl or .parquet file is here", where=source, fix="Give a file, a folder or hf://datasets/..."
        )
    _require_one_split(names, source)
    for name in names:
        yield f"{store.url}/{name}", store.get(name)


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


def _jsonl_records(url: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), 1):
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


def _parquet_records(url: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not readable Parquet: {error}", where=url) from None
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"{url}, row {number}", record


def _prompt(record: dict[str, Any], column: str | None, where: str) -> Prompt:
    name = column or next((name for name in TEXT_COLUMNS if name in record), None)
    if name is None or name not in record:
        wanted = f"column {column!r}" if column else f"any of the columns {', '.join(TEXT_COLUMNS)}"
        raise DataError(f"the row has not {wanted}", where=where, fix=did_you_mean(column or "prompt", list(record)))
    content = record[name]
    meta = {key: value for key, value in record.items() if key != name}
    given = next((str(record[key]) for key in ID_COLUMNS if record.get(key) is not None), None)
    identity = given or hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
    prompt = Prompt(id=identity, meta=json.dumps(meta, sort_keys=True, ensure_ascii=False, default=str))
    if isinstance(content, str):
        if not content.strip():
            raise DataError("the prompt is empty", where=where, fix="Remove the row")
        return replace(prompt, text=content)
    return replace(prompt, messages=_checked_messages(content, where))


def _checked_messages(content: Any, where: str) -> list[dict[str, str]]:
    good = isinstance(content, list) and content and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in content
    )  # fmt: skip
    if not good:
        raise DataError("a prompt must be text or a list of {role, content}", where=where)
    return [{"role": message["role"], "content": message["content"]} for message in content]


def _with_distinct_ids(prompts: list[Prompt], source: str) -> list[Prompt]:
    """A repeated prompt without an id of its own is sampled anew each time; a repeated explicit id is a mistake."""
    count = Counter(prompt.id for prompt in prompts)
    seen: Counter[str] = Counter()
    distinct = []
    for prompt in prompts:
        seen[prompt.id] += 1
        if count[prompt.id] == 1:
            distinct.append(prompt)
        elif any(json.loads(prompt.meta).get(key) is not None for key in ID_COLUMNS):
            raise DataError(
                f"prompt id {prompt.id!r} stands {count[prompt.id]} times", where=source, fix="Make ids unique"
            )
        else:
            distinct.append(replace(prompt, id=f"{prompt.id}-{seen[prompt.id]}"))
    return distinct
