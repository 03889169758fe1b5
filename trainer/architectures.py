"""What is supported: the architectures whose log-probs we compute exactly, and the attention kernels by name."""

from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from common.errors import DataError, UsageError

RESHAPED_LOGITS = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
)  # fmt: skip
"""Config keys of architectures that change the logits after the head, which our chunked head would miss."""
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layer that tell packed rows apart by their restarting positions alone."""
RECURRENT = {"recurrent_gemma", "rwkv", "xlstm"}
"""Model types with recurrent layers whose config does not list its layers."""
FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
}
"""Attention backends that need a package: whether it is there, and its name."""


def require_attention(attention: str, device: str, compute: str) -> None:
    """Refuse a backend that cannot run, before transformers reaches for another one.

    Args:
        device: where the model is to run, `cpu` or `cuda`.
        compute: type of its forward pass, by the setting's name.

    Raises:
        UsageError: the package is not installed, there is no CUDA device for it, or it cannot take the type.
    """
    if attention in FLASH:
        is_there, package = FLASH[attention]
        if device == "cpu" or not is_there():
            raise UsageError(
                f"attention={attention} needs the package {package} and a CUDA device, and one of them is not there",
                fix=f"Set attention=sdpa on CPUs, attention=varlen on CUDA devices, or install {package}",
            )
    elif attention != "varlen":
        return
    if device == "cpu":
        raise UsageError(f"attention={attention} needs a CUDA device", fix="Set attention=sdpa, which runs on CPUs too")
    if compute == "float32":
        raise UsageError(
            f"attention={attention} does not take compute=float32",
            fix="Set attention=sdpa, or compute=bfloat16",
        )


def require_backward(attention: str, device: str) -> None:
    """Refuse a backend that cannot train on `device`, though it could score there. Raises UsageError."""
    if attention == "flex_attention" and device == "cpu":
        raise UsageError(
            "attention=flex_attention has no backward pass on CPUs",
            fix="Set attention=sdpa, or train on a CUDA device",
        )


def require_linear_head(config: Any, folder: Path) -> None:
    text = config.get_text_config()
    reshaped = [key for key in RESHAPED_LOGITS if getattr(text, key, None) not in (None, 1.0)]
    if reshaped:
        raise DataError(
            f"models with {reshaped[0]} are not supported: their logits are more than a linear head", where=str(folder)
        )


def require_packable(config: Any, folder: Path) -> None:
    """A recurrent state runs on from one packed row into the next, whatever the positions say."""
    text = config.get_text_config()
    kinds = {text.model_type} & RECURRENT or {*(getattr(text, "layer_types", None) or ())} - PACKABLE_LAYERS
    if kinds:
        raise DataError(
            f"models with {min(kinds)} layers are not supported: packed rows would see one another",
            where=str(folder),
            fix="Take a model whose layers are all full or sliding attention",
        )
