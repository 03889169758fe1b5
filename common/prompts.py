"""Prompts from JSONL, Parquet or a Hub dataset, on any URL.

A prompt is plain text or a list of messages; every other column travels along as `meta` (the answer, the source), so
that a verifier finds it beside the rollout.
"""

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from common.config import did_you_mean
from common.errors import DataError
from common.progress import waiting
from common.prompt_sources import records_of
from common.prompt_spool import Spool, forget, spool, spooled
from common.storage import Store

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


class Prompts(Sequence[Prompt]):
    """Prompts on this machine's disk, in the order of their source; a slice is a list of them."""

    def __init__(self, rows: Spool) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Prompt]:
        return map(_decoded, self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        places = range(len(self))[index]
        if isinstance(places, int):
            return _decoded(self._rows.read(places, places + 1)[0])
        if places.step == 1:
            return [_decoded(row) for row in self._rows.read(places.start, max(places.start, places.stop))]
        return [self[place] for place in places]


@dataclass(frozen=True)
class PromptSet:
    """All prompts of a source, in its order, and the hash that pins them in a plan."""

    prompts: Prompts
    sha256: str
    source: str


def load_prompts(source: str, column: str | None = None, limit: int | None = None) -> PromptSet:
    """Read prompts. They go to the disk, below `LOPD_CACHE_DIR`, so that memory does not grow with them.

    Args:
        source: a `.jsonl` or `.parquet` file, a folder of them or several by `*` (`.../data/train-*.parquet`), on any
            URL; a Hub dataset is `hf://datasets/ORG/NAME`. All files must be of one split.
        column: where the prompt stands; `TEXT_COLUMNS` are tried unless given.
        limit: take only the first so many.

    Raises:
        DataError: missing, empty, malformed (with the line), without such a column, or of several splits.
        StorageError: no room on the disk, or the source cannot be read.
        RetryLater: the source is away.
    """
    hashes = array("q")  # of ids: tells that one may be repeated, in 8 bytes a prompt

    def rows() -> Iterator[bytes]:
        for where, record in itertools.islice(records_of(source), limit):
            prompt = _prompt(record, column, where)
            hashes.append(hash(prompt.id))
            yield _encoded(prompt)

    with waiting("reading the prompts"):
        kept = spool(rows())
        if not hashes:
            forget(kept)
            raise DataError("there are no prompts", where=source, fix="Give a file with at least one row")
        repeated = _repeated(hashes)
        if repeated:
            forget(kept)
            kept = spool(_with_distinct_ids(kept, repeated, source))
    return PromptSet(Prompts(kept), kept.sha256, Store(source).url)


def open_prompts(sha256: str, source: str, column: str | None = None, limit: int | None = None) -> PromptSet:
    """The prompts with this hash, as another process on this machine has loaded them; else from their source.

    Raises:
        DataError: the source holds other prompts now.
        LopdError: as `load_prompts`.
    """
    kept = spooled(sha256)
    if kept is not None:
        return PromptSet(Prompts(kept), sha256, Store(source).url)
    prompts = load_prompts(source, column, limit)
    if prompts.sha256 != sha256:
        raise DataError(
            "the prompts are no longer those of the plan",
            where=prompts.source,
            fix="Restore them, or make another dataset",
        )
    return prompts


def _encoded(prompt: Prompt) -> bytes:
    """One line of what is hashed; no two prompts have the same."""
    return json.dumps([prompt.id, prompt.text, prompt.messages, prompt.meta], sort_keys=True).encode()


def _decoded(row: bytes) -> Prompt:
    identity, text, messages, meta = json.loads(row)
    if messages is not None:  # whose keys are in the order in which a template sees them
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Prompt(identity, text, messages, meta)


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


def _repeated(hashes: "array[int]") -> set[int]:
    """Values that stand there more than once."""
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    return {*ordered[1:][ordered[1:] == ordered[:-1]].tolist()}


def _with_distinct_ids(rows: Spool, repeated: Set[int], source: str) -> Iterator[bytes]:
    """A repeated prompt without an id of its own is sampled anew each time; a repeated explicit id is a mistake.

    Args:
        repeated: hashes, those of all repeated ids among them.
    """
    count = Counter(prompt.id for prompt in map(_decoded, rows) if hash(prompt.id) in repeated)
    seen: Counter[str] = Counter()
    for row in rows:
        prompt = _decoded(row)
        if count[prompt.id] < 2:
            yield row
            continue
        if any(json.loads(prompt.meta).get(key) is not None for key in ID_COLUMNS):
            raise DataError(
                f"prompt id {prompt.id!r} stands {count[prompt.id]} times", where=source, fix="Make ids unique"
            )
        seen[prompt.id] += 1
        yield _encoded(replace(prompt, id=f"{prompt.id}-{seen[prompt.id]}"))
