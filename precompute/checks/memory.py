"""What an engine takes of a GPU's memory, or of the host's on a CPU; told from headers, not from weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.canonical import parse_object
from common.safetensors_header import TensorEntry, read_header
from precompute.config import Engine

PLAIN = {"F64", "F32", "F16", "BF16"}
"""Dtypes of weights that are not quantised; they are loaded in the dtype that computes."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BESIDE = 1 << 30
"""On each GPU, for CUDA itself, activations and graphs; vLLM measures them and takes what they leave for its cache."""
PROCESS = 3 << 29
"""Of the host, for Python, torch and vLLM in one process."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, as far as its memory depends on it."""

    config: Mapping[str, Any]
    """config.json, or the part of it that speaks of the language model."""
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def of(cls, folder: Path) -> "Checkpoint":
        """Read config.json and the headers of all safetensors files. Raises `DataError` as they do."""
        file = folder / "config.json"
        config = parse_object(file.read_bytes(), str(file))
        nested = config.get("text_config")
        tensors: dict[str, TensorEntry] = {}
        for weights in sorted(folder.glob("*.safetensors")):
            with weights.open("rb") as stream:
                tensors |= read_header(stream, weights.stat().st_size, str(weights))[1]
        return cls({**config, **nested} if isinstance(nested, dict) else config, tensors)

    @property
    def heads(self) -> tuple[int, int] | None:
        """Heads of attention, and those of keys and values; None where config.json does not say."""
        heads = self.config.get("num_attention_heads")
        keys = self.config.get("num_key_value_heads") or heads
        return (heads, keys) if isinstance(heads, int) and isinstance(keys, int) else None

    @cached_property
    def head_is_quantised(self) -> bool:
        """Whether the output head holds anything but plain floats."""
        return any("lm_head." in name and entry.dtype not in PLAIN for name, entry in self.tensors.items())

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights once loaded; quantised ones and what goes with them stay as they are."""
        size = self._element(dtype)
        as_stored = any(entry.dtype not in PLAIN for entry in self.tensors.values())
        return sum(
            entry.size if as_stored else entry.size * size // _stored(entry.dtype) for entry in self.tensors.values()
        )

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Bytes of the cache of keys and values of one sequence; 0 where config.json does not say what it holds."""
        layers, heads = self.config.get("num_hidden_layers"), self.heads
        if not isinstance(layers, int) or heads is None:
            return 0
        if isinstance(rank := self.config.get("kv_lora_rank"), int):  # multi-head latent attention keeps one vector
            width = rank + int(self.config.get("qk_rope_head_dim") or 0)
        else:
            head = self.config.get("head_dim") or int(self.config.get("hidden_size", 0)) // heads[0]
            width = 2 * heads[1] * int(head)
        return tokens * layers * width * self._element(dtype)

    def _element(self, dtype: str) -> int:
        """Bytes of a number; `auto` is the checkpoint's dtype, of two bytes also where that is float32."""
        return BYTES.get(dtype, 2)


@dataclass(frozen=True)
class Need:
    """Bytes that one replica takes of each of its GPUs, or of the host on a CPU."""

    weights: int
    cache: int
    beside: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.beside


def need_of_gpu(checkpoint: Checkpoint, engine: Engine, tokens: int, span: int) -> Need:
    """The least that a GPU of a replica over `span` GPUs must hold: its part of the weights and one row's cache.

    Heads of keys and values are copied, not shared out, where there are more GPUs than heads.
    """
    shared = min(span, checkpoint.heads[1]) if checkpoint.heads and "kv_lora_rank" not in checkpoint.config else 1
    cache = checkpoint.kv_bytes(tokens, engine.dtype) // shared
    return Need(checkpoint.weight_bytes(engine.dtype) // span, cache, BESIDE)


def need_of_host(checkpoint: Checkpoint, engine: Engine) -> Need:
    """What a replica on the CPU takes of the host."""
    return Need(checkpoint.weight_bytes(engine.dtype), int(engine.cpu_kv_gib * 2**30), PROCESS)


def _stored(dtype: str) -> int:
    return {"F64": 8, "F32": 4}.get(dtype, 2)
