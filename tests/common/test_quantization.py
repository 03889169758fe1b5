"""What checkpoints say of how they were quantised."""

from typing import Any

import pytest

from common.quantization import quantization_of


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8, 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits"),
        ({"quant_method": "mxfp4"}, "mxfp4, 4 bits"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, 4 bits"),
        ({"quant_method": "torchao"}, "torchao, bits unknown"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            "compressed-tensors, 8 bits",
        ),
    ],
)
def test_method_and_bits_are_told(said: dict[str, Any], shown: str) -> None:
    assert str(quantization_of({"quantization_config": said})) == shown
    assert str(quantization_of({"text_config": {"quantization_config": said}})) == shown


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": None}])
def test_plain_weights_are_not_quantised(config: dict[str, Any]) -> None:
    assert quantization_of(config) is None
