"""Small real things for the tests of the trainer: tiny models with their tokenizer, and datasets they sampled."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from common.dataset_writer import create_dataset
from common.lineage import Provenance, identify, write_provenance
from common.records import created_now
from common.schema import SCHEMA_VERSION, Rollout, to_table

VOCAB, EOS, TOPK = 64, 1, 4
ROOT = Path(__file__).parents[2]


def make_model(folder: Path, *, tied: bool = True, seed: int = 0, layers: int = 2) -> Path:
    """A random Llama and its tokenizer, saved in `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=EOS,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    ),
    "qwen3-window": (
        Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "head_dim": 16},
    ),
    "mistral-window": (MistralConfig, {"sliding_window": 5, "head_dim": 16}),
}
"""Architectures with what makes each of them special."""


def make_kind(folder: Path, kind: str, *, seed: int = 0, **changes: Any) -> Path:
    """A random model of one of `KINDS` and its tokenizer, saved in `folder`; `changes` go into its config."""
    torch.manual_seed(seed)
    config_class, special = KINDS[kind]
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"eos_token_id": EOS, "bos_token_id": 0}
    config = config_class(**{**sizes, **heads, **ids, "initializer_range": 0.3, **special, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path, words: int = VOCAB) -> None:
    vocabulary = {f"w{index}": index for index in range(words)} | {"<unk>": words}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)


def make_student(folder: Path, teacher: Path, *, noise: float = 0.03, stamp: Path | None = None) -> Path:
    """The teacher plus noise, with a provenance that says it was fine-tuned on `stamp`, by default that teacher."""
    model = open_model(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    known = stamp or teacher
    write_provenance(folder, Provenance(role="sft", teacher=identify(known, str(known))))
    return folder


def open_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, prompts: int, *, samples: int = 2, longest: int = 24, seed: int = 0
) -> list[Rollout]:
    """Completions of random prompts with the log-probs they were sampled with; lengths differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(prompts):
        length = int(torch.randint(2, 9, (), generator=generator))
        ids = torch.randint(2, VOCAB, (length,), generator=generator)
        for index in range(samples):
            tokens = int(torch.randint(longest // 3, longest, (), generator=generator))
            rows.append(_complete(model, f"p{prompt}", index, ids, tokens, generator))
    return rows


def _complete(
    model: LlamaForCausalLM, prompt: str, index: int, ids: torch.Tensor, tokens: int, generator: torch.Generator
) -> Rollout:
    sequence, logprobs = ids, []
    for _ in range(tokens):
        row = model(sequence[None], use_cache=False).logits[0, -1].log_softmax(-1)
        token = torch.multinomial(row.exp(), 1, generator=generator)
        logprobs.append(row[token].item())
        sequence = torch.cat([sequence, token])
    return Rollout(
        uid=f"{prompt}-{index}",
        prompt_id=prompt,
        sample_idx=index,
        prompt_ids=ids.numpy().astype(np.int32),
        completion_ids=sequence[len(ids) :].numpy().astype(np.int32),
        rollout_logprobs=np.minimum(np.array(logprobs, np.float32), 0.0),
        finish_reason="length",
    )


@torch.no_grad()
def logprob_table(model: LlamaForCausalLM, row: Rollout) -> torch.Tensor:
    """All log-probs before each completion token, (tokens, vocab), from one unpacked forward pass."""
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
    return model(ids[None], use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)


def graded(model: LlamaForCausalLM, rows: Sequence[Rollout], topk: int = TOPK) -> list[Rollout]:
    """The rows with the teacher's log-probs and its top-k."""
    result = []
    for row in rows:
        table = logprob_table(model, row)
        chosen = table.gather(-1, torch.from_numpy(row.completion_ids).long()[:, None])[:, 0]
        best = table.topk(topk)
        columns = {
            "teacher_logprobs": chosen.numpy(),
            "topk_ids": best.indices.numpy().astype(np.int32),
            "topk_logprobs": best.values.numpy(),
        }
        result.append(Rollout(**{**vars(row), **columns}))
    return result


def make_dataset(
    folder: Path | str,
    rows: Sequence[Rollout],
    *,
    kind: str,
    policy: Path,
    teacher: Path | None = None,
    shards: int = 3,
    **changes: Any,
) -> str:
    """A finished dataset with these rows, in `shards` shards; `changes` replace keys of its plan."""
    topk = changes.get("topk", TOPK if kind == "scored" else 0)
    writer = create_dataset(str(folder), {**plan_of(kind, policy, teacher, shards, topk), **changes})
    for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        writer.commit(shard, to_table([rows[index] for index in part], topk))
    writer.finalize()
    return str(folder)


def plan_of(kind: str, policy: Path, teacher: Path | None, shards: int, topk: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "created": created_now("ann"),
        "shards": shards,
        "prompts_per_shard": 4,
        "vocab_size": VOCAB,
        "topk": topk,
        "policy": identify(policy, str(policy)).model_dump(),
        "lineage": None,
        "teacher": identify(teacher, str(teacher)).model_dump() if teacher else None,
        "sampling": {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 24,
            "stop_ids": [EOS],
            "samples": 2,
        },
        "template": {"mode": "chat", "system": None, "arguments": {}},
        "chat_template": None,
        "prompts": {"url": "test", "sha256": "0" * 64, "count": 1},
        "parent": "0" * 64 if kind == "scored" else None,
        "overrides": [],
    }


def trainer_command(*words: str, ranks: int = 1) -> list[str]:
    """The command line of the trainer."""
    return [sys.executable, "-m", "trainer", "--ranks", str(ranks), *words]


def run_trainer(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the trainer to its end, as a user does."""
    return subprocess.run(trainer_command(*words, ranks=ranks), env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def read_metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
