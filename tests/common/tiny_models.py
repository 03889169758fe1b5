"""Model folders small enough to make in every test: random weights, a byte-level BPE tokenizer, a chat template."""

import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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


class RawTensor(NamedTuple):
    """A tensor as it lies in a safetensors file; numpy has no bfloat16."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def make_weights(folder: Path, seed: int) -> None:
    """Other weights for other seeds, always of the same size."""
    write_safetensors(folder / "model.safetensors", make_tensors(seed))


def make_tensors(seed: int = 0) -> dict[str, RawTensor]:
    """A float32 matrix and three bfloat16 ones, two of these of one shape."""
    random = np.random.default_rng(seed)

    def floats(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype("<f4")

    def bfloat16(*shape: int) -> RawTensor:
        upper_halves = floats(*shape).view("<u2")[..., 1::2]
        return RawTensor("BF16", shape, upper_halves.tobytes())

    return {
        "model.embed_tokens.weight": RawTensor("F32", (4, 4), floats(4, 4).tobytes()),
        "model.k.weight": bfloat16(2, 6),
        "model.q.weight": bfloat16(6, 4),
        "model.v.weight": bfloat16(2, 6),
    }


def write_safetensors(file: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors one after another in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    write_raw_safetensors(file, json.dumps(header).encode(), b"".join(tensor.data for tensor in tensors.values()))


def write_raw_safetensors(file: Path, header: bytes, data: bytes) -> None:
    """Any header before any data."""
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def repack(model: Path, folder: Path, files: int, tensors: Mapping[str, RawTensor]) -> Path:
    """A copy of a model folder whose `tensors` lie in so many files, with the index that says where."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    names, places = list(tensors), {}
    each = math.ceil(len(names) / files)
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        mine = names[number * each : (number + 1) * each]
        write_safetensors(folder / file, {name: tensors[name] for name in mine}, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _tokenizer(merges: Sequence[tuple[str, str]], words: Sequence[str]) -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), *words]
    bpe = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", additional_special_tokens=list(SPECIAL[1:])
    )
