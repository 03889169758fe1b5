"""On a GPU: tokens a second, MFU, peak memory and the head's share at the shapes of Qwen3, from random weights.

Nothing is downloaded: the configs are written out here, the weights are random, the tokenizer is the small model's. The
same code runs on the CPU at any shape, which is how it is tested where there is no GPU.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from benchmarks.trainer.heads import Shape, measure_one
from benchmarks.trainer.versus import Bench, Row, Size, compare
from trainer.watch.flops import cost_of, peak_flops

QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8,
    "num_hidden_layers": 28, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "Qwen3-1.7B": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
}
"""As their config.json on the Hub says."""
SIZES = (Size(length=4096, steps=12), Size(length=16384, steps=8))


def on_shapes(bench: Bench, shapes: Mapping[str, dict[str, Any]], sizes: tuple[Size, ...]) -> Iterator[Row]:
    """Rows of both sides and both steps for every shape; ours with the head's share, all with MFU where it is known."""
    for name, shape in shapes.items():
        scratch = bench.scratch / "shapes"
        own = replace(bench, scratch=scratch, model=random_model(scratch / name, shape, tokenizer=bench.model))
        for size in sizes:
            head = measure_one("ours, fused", _head_of(own, shape, size))
            for kind in ("sft", "opd"):
                for row in compare(own, kind, size, {"ours": ours(own.device)}):
                    yield {**row, **_use(own, row), **_share(row, head), "table": "shapes", "shape": name}


def ours(device: str) -> dict[str, Any]:
    """Our settings: compiled layers, and on a GPU the attention that takes packed rows at once."""
    if device != "cuda":
        return {"compile": True}
    flash = importlib.util.find_spec("flash_attn_interface") is not None
    return {"compile": True, "attention": "flash_attention_3" if flash else "varlen"}


def random_model(folder: Path, shape: Mapping[str, Any], *, tokenizer: Path) -> Path:
    """A model of this shape with random weights in bfloat16, and the tokenizer of another one."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def _head_of(bench: Bench, shape: Mapping[str, Any], size: Size) -> Shape:
    return Shape(
        tokens=size.length,
        width=shape["hidden_size"],
        vocab=shape["vocab_size"],
        compute=bench.compute,
        device=bench.device,
        threads=bench.threads,
        clock=bench.clock,
    )


def _use(bench: Bench, row: Row) -> Row:
    """Operations a second, as `trainer.watch.flops` counts them, and their share of what the device can do."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config.from_pretrained(bench.model))
    rate = cost_of(model).of(torch.tensor([row["length"]]), row["length"]) * row["tokens_per_s"] / row["length"]
    peak = peak_flops(torch.device(bench.device), bench.compute)
    return {"tflops": rate / 1e12, "mfu": rate / peak if peak else None}


def _share(row: Row, head: Row) -> Row:
    """Of our step, what the head takes, forward and backward, measured by itself at the same shape."""
    return {"head_share": head["seconds"] / row["step_s"]} if row["side"] == "ours" else {}
