"""Tiny real models for the command tests: two-layer Llamas that vLLM loads in a second, with a byte-level tokenizer."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.lineage import Provenance, identify, write_provenance

CONTEXT, VOCAB = 128, 320
MERGES = (("d", "o"), ("o", "g"), ("t", "h"), ("th", "e"), ("i", "n"))
OTHER_MERGES = (("o", "g"), ("d", "o"), ("t", "h"), ("th", "e"), ("i", "n"))
"""The same tokens, but `dog` becomes `d`, `og` instead of `do`, `g`."""
STOP_ID = 261
"""256 bytes and 5 merged tokens come before it."""
END_OF_TURN = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    folder: Path, *, merges: tuple[tuple[str, str], ...] = MERGES, extra: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; the vocabulary does not depend on the order of the merges."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted({left + right for left, right in MERGES}), *extra]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TURN, special=True, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def make_teacher(
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = VOCAB,
    context: int = CONTEXT,
    stop: bool = True,
    merges: tuple[tuple[str, str], ...] = MERGES,
    extra: tuple[str, ...] = (),
) -> Path:
    """A random network whose distributions are far from uniform, so that log-probs say something."""
    make_tokenizer(folder, merges=merges, extra=extra)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32, the smallest that vLLM's CPU attention takes
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=STOP_ID if stop else None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_student(folder: Path, teacher: Path, *, noise: float = 0.02, attested: bool = True, seed: int = 1) -> Path:
    """The teacher plus a little noise, so that their log-probs correlate; its lineage names that teacher."""
    make_tokenizer(folder)
    model = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    model.save_pretrained(folder)
    if attested:
        write_provenance(folder, Provenance(role="attested", teacher=identify(teacher, str(teacher))))
    return folder


def write_prompts(file: Path, count: int) -> Path:
    """`count` short prompts, each with an id and an answer that must travel along."""
    rows = [{"id": f"p{index:03d}", "prompt": f"Count to {index}.", "answer": str(index)} for index in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
