"""The study's networks: Llamas of some ten or hundred thousand parameters, with a token for every character."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.study.setting.task import ALPHABET, END, LONGEST_ANSWER, LONGEST_PROMPT

CONTEXT = 48
"""Longest prompt and answer together; a model that loses its way is cut off here."""
MAX_TOKENS = CONTEXT - LONGEST_PROMPT - 1
IDS = {character: index for index, character in enumerate(ALPHABET)}


@dataclass(frozen=True)
class Size:
    """Shape of a Llama. However narrow it is, its heads have 32 dimensions, the fewest that vLLM takes on a CPU."""

    width: int
    layers: int
    heads: int

    def build(self, seed: int) -> LlamaForCausalLM:
        """A network with random weights."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(ALPHABET),
            hidden_size=self.width,
            intermediate_size=5 * self.width // 2,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=IDS[END],
            initializer_range=0.05,
        )
        return LlamaForCausalLM(config)


TEACHER, STUDENT = Size(width=96, layers=3, heads=3), Size(width=32, layers=2, heads=1)
"""323,000 and 25,000 parameters."""

assert LONGEST_PROMPT + LONGEST_ANSWER < CONTEXT


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write model and tokenizer as vLLM and transformers open them."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(IDS, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def encode(text: str) -> list[int]:
    """One id a character."""
    return [IDS[character] for character in text]


def decode(ids: list[int]) -> str:
    """The characters of these ids."""
    return "".join(ALPHABET[index] for index in ids)
