"""Prompts from JSONL, Parquet or a Hub dataset, on any URL.

A prompt is plain text or a list of messages; every other column travels along as `meta` (the answer, the source), so
that a verifier finds it beside the rollout.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.config import did_you_mean
from common.errors import DataError
from common.storage import NotFound, Store

TEXT_COLUMNS = ("prompt", "messages", "question", "problem", "text")
"""Where a prompt is looked for, in this order, when no column is named."""
ID_COLUMNS = ("prompt_id", "id", "uid", "task_id")


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
        source: a `.jsonl` or `.parquet` file, or a folder of them, on any URL; a Hub dataset is
            `hf://datasets/ORG/NAME`.
        column: where the prompt stands; `TEXT_COLUMNS` are tried unless given.
        limit: take only the first so many.

    Raises:
        DataError: missing, empty, malformed (with the line), or without such a column.
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
    if source.endswith((".jsonl", ".parquet")):
        folder, slash, name = source.rpartition("/")
        try:
            yield source, Store(folder or slash or ".").get(name)
        except NotFound:
            raise DataError("the prompt file does not exist", where=source, fix="Check PROMPTS") from None
        return
    store = Store(source)
    names = [entry.name for entry in store.list() if entry.name.endswith((".jsonl", ".parquet"))]
    if not names:
        raise DataError(
            "no .jsonl or .parquet file is here", where=source, fix="Give a file, a folder or hf://datasets/..."
        )
    for name in names:
        yield f"{store.url}/{name}", store.get(name)


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
