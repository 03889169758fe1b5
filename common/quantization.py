"""How a checkpoint's weights were quantised, as its config.json says; each method says it in a way of its own."""

from collections.abc import Mapping
from typing import Any

from common.config import Frozen

KEYS = ("quantization_config", "compression_config")
OF_NAME = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4, "nvfp4": 4, "mxfp8": 8}
"""Bits of methods whose name says them."""


class Quantization(Frozen):
    """The method by its own name, and the bits of a weight where the checkpoint tells them."""

    method: str
    bits: int | None

    def __str__(self) -> str:
        return f"{self.method}, {self.bits} bits" if self.bits else f"{self.method}, bits unknown"


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says of quantisation; None for weights that are as they were trained."""
    nested = config.get("text_config")
    places = [config, nested] if isinstance(nested, Mapping) else [config]
    said = next((place[key] for place in places for key in KEYS if isinstance(place.get(key), Mapping)), None)
    if said is None:
        return None
    method = str(said.get("quant_method") or said.get("quant_algo") or "unknown").lower()
    return Quantization(method=method, bits=_bits(said, method))


def _bits(said: Mapping[str, Any], method: str) -> int | None:
    """`bits` (GPTQ, AWQ), `load_in_4bit` (bitsandbytes), `num_bits` within groups (compressed-tensors), or the name."""
    for key in ("bits", "w_bit", "num_bits"):
        if isinstance(said.get(key), int):
            return said[key]
    for key, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if said.get(key) is True:
            return bits
    groups = said.get("config_groups")
    weights = [each.get("weights") for each in groups.values() if isinstance(each, Mapping)] if groups else []
    in_groups = [of["num_bits"] for of in weights if isinstance(of, Mapping) and isinstance(of.get("num_bits"), int)]
    if in_groups:
        return max(in_groups)
    return OF_NAME.get(method) or OF_NAME.get(str(said.get("quant_algo")).lower())
