"""Token ids as pieces of text, and where the tokenizer for them is found without any download."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from common.chat import load_tokenizer
from common.errors import LopdError
from common.lineage import ModelIdentity, tokenizer_sha256
from common.models import hub_repo
from common.urls import is_url

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 4
"""Tokens that one character can be split into: UTF-8 has at most four bytes."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text and the tokens [start, stop) that spell it."""

    text: str
    start: int
    stop: int


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[Piece]:
    """The text of every token; tokens that are parts of one character are joined.

    Each piece is the difference between two decodings with the same beginning, because a token decoded alone may
    lose its leading blank.
    """
    found: list[Piece] = []
    context, start = 0, 0
    for stop in range(1, len(ids) + 1):
        whole = _decode(tokenizer, ids[context:stop])
        unfinished = whole.endswith("\ufffd") and stop - start < LONGEST and stop < len(ids)
        if unfinished:
            continue
        before = _decode(tokenizer, ids[context:start])
        found.append(Piece(whole[len(before) :], start, stop))
        context, start = start, stop
    return found


def local_tokenizer(model: ModelIdentity) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a model whose files are on this machine; None where they are not. Downloads nothing.

    A folder of the model's name may hold another model, so what is found counts only if its hash is the recorded one.
    """
    try:
        folder = _folder(model)
        if folder is None:
            return None
        found = load_tokenizer(folder)
    except (LopdError, OSError):  # OSError: a name that no file can have
        return None
    return found if tokenizer_sha256(found) == model.tokenizer_sha256 else None


def _folder(model: ModelIdentity) -> Path | None:
    if is_url(model.name):
        return None
    if Path(model.name).is_dir():
        return Path(model.name)
    repo = hub_repo(model.name)
    if repo is None:
        return None
    try:
        return Path(snapshot_download(repo, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
