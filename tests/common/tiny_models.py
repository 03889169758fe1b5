"""Model folders small enough to make in every test: random weights, a byte-level BPE tokenizer, a chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role: ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
MERGES = (("t", "h"), ("o", "v"))
OTHER_MERGES = (("h", "e"), ("o", "v"))
"""With the same vocabulary, `the` becomes t-he instead of th-e."""


def make_model(
    folder: Path,
    *,
    seed: int = 0,
    merges: Sequence[tuple[str, str]] = MERGES,
    words: Sequence[str] = ("th", "he", "ov"),
    template: str | None = TEMPLATE,
    **config: Any,
) -> Path:
    """A model folder; equal arguments give equal content."""
    folder.mkdir(parents=True, exist_ok=True)
    make_weights(folder, seed)
    tokenizer = _tokenizer(merges, words)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    basis = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(basis | config))
    return folder


def make_weights(folder: Path, seed: int) -> None:
    """Other weights for other seeds, always of the same size."""
    weights = np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)
    save_file({"model.embed_tokens.weight": weights}, folder / "model.safetensors")


def _tokenizer(merges: Sequence[tuple[str, str]], words: Sequence[str]) -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *words]
    bpe = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", additional_special_tokens=list(SPECIAL[1:])
    )
