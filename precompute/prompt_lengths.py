"""How many tokens the longest prompt has: measured once for a tokenizer, a template and a set of prompts.

It is kept below `LOPD_CACHE_DIR`, so that a job that is run again to resume starts its engines at once.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from common.canonical import canonical, sha256
from common.chat import Template, render_many
from common.config import Frozen
from common.errors import DataError
from common.lineage import tokenizer_sha256
from common.local_cache import cache_dir
from common.local_files import write_whole
from common.models import ModelConfig
from common.progress import followed
from common.prompts import Prompt, PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERED_AT_ONCE = 512
"""Prompts that a tokenizer gets at once: it has a thread for each core."""


class Measured(Frozen):
    """Of all prompts of a set: tokens of the longest, and the highest token id."""

    longest: int
    highest: int


def longest_prompt(
    tokenizer: "PreTrainedTokenizerBase", template: Template, room: int, prompts: PromptSet, model: ModelConfig
) -> int:
    """Tokens of the longest prompt; each must leave `room` tokens of the context to sample.

    Raises:
        DataError: one does not, has no tokens, or holds ids that the model has not.
    """
    file = _place(tokenizer, template, prompts)
    known = _recalled(file)
    if known is None or known.highest >= model.vocab_size or known.longest + room >= model.max_positions:
        known = _measured(tokenizer, template, room, prompts, model)
        with suppress(OSError):  # it is then measured again the next time
            write_whole(file, BytesIO(known.model_dump_json().encode()))
    return known.longest


def _place(tokenizer: "PreTrainedTokenizerBase", template: Template, prompts: PromptSet) -> Path:
    from transformers import __version__

    of = {
        "prompts": prompts.sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat_template": tokenizer.chat_template,
        "template": template.model_dump(mode="json"),
        "transformers": __version__,
    }
    return cache_dir() / "prompts" / f"{sha256(canonical(of))}.json"


def _recalled(file: Path) -> Measured | None:
    try:
        return Measured.model_validate(json.loads(file.read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None


def _measured(
    tokenizer: "PreTrainedTokenizerBase", template: Template, room: int, prompts: PromptSet, model: ModelConfig
) -> Measured:
    longest = highest = 0
    for prompt, ids in followed(
        _rendered(tokenizer, prompts.prompts, template), "measuring prompts", len(prompts.prompts), "prompts"
    ):
        if not ids or max(ids) >= model.vocab_size:
            what = f"holds token id {max(ids)}, the model has only {model.vocab_size} rows" if ids else "has no tokens"
            raise DataError(f"the prompt {what}", where=f"prompt {prompt.id}")
        if len(ids) + room >= model.max_positions:
            raise DataError(
                f"a prompt of {len(ids)} tokens with {room} to sample exceeds the model's context of "
                f"{model.max_positions}",
                where=f"prompt {prompt.id}",
                fix="Shorten it, or lower sampling.max_tokens",
            )
        longest, highest = max(longest, len(ids)), max(highest, *ids)
    return Measured(longest=longest, highest=highest)


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], template: Template
) -> Iterator[tuple[Prompt, list[int]]]:
    for first in range(0, len(prompts), RENDERED_AT_ONCE):
        some = prompts[first : first + RENDERED_AT_ONCE]
        yield from zip(some, render_many(tokenizer, some, template), strict=True)
