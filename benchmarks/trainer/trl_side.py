"""TRL's side of the comparison: `python -m benchmarks.trainer.trl_side JOB.json`, in an environment that has TRL.

Both trainers get what their own documentation recommends: bfloat16 autocast over float32 weights, activation
checkpointing and the chunked loss, which are their defaults, packing for SFT, and AdamW by torch. The distillation
trainer generates completions and asks a teacher. It is handed the stored rollouts instead of generating, and a teacher
of one narrow layer over the same vocabulary, whose forward pass is told apart: ours has neither.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl  # pyright: ignore[reportMissingImports] - of the peers' environment
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_flash_attn_2_available
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from benchmarks.trainer.probes import CLOCKS, resident_bytes, watched

TEACHER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
           "num_key_value_heads": 1, "head_dim": 64}  # fmt: skip
"""What is changed of the student's config to make the teacher."""


class StoredRollouts(DistillationTrainer):
    """The distillation trainer with the completions of the dataset in place of its own."""

    rollouts: dict[tuple[int, ...], list[int]]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        return [self.rollouts[tuple(ids)] for ids in prompt_ids]

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict]:
        return prompts, None, {}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job` says; what was measured."""
    with open(job["data"]) as lines:
        rows = [json.loads(line) for line in lines]
    shared = {
        "output_dir": job["output"],
        "use_cpu": job["device"] == "cpu",
        "bf16": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": job["steps"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"attn_implementation": _attention(job["device"])},
    }
    imported = resident_bytes()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    with watched(CLOCKS[job["clock"]]) as watch:
        if job["kind"] == "opd":
            trainer = _distillation(job, rows, shared, tokenizer)
            watch.teacher = trainer.teacher_model.base_model
        else:
            trainer = _sft(job, rows, shared, tokenizer)
        trainer.train()
    return {"imported_bytes": imported, "steps": watch.steps, "trl": trl.__version__}


def _attention(device: str) -> str:
    """What TRL asks for with packing, where it is installed; torch's own attention else."""
    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


def _sft(job: dict[str, Any], rows: list[dict], shared: dict[str, Any], tokenizer: Any) -> SFTTrainer:
    data = [
        {"input_ids": row["input_ids"], "labels": [-100] * row["prompt"] + row["input_ids"][row["prompt"] :]}
        for row in rows
    ]
    config = SFTConfig(**shared, max_length=job["length"], packing=True)
    return SFTTrainer(job["model"], args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def _distillation(job: dict[str, Any], rows: list[dict], shared: dict[str, Any], tokenizer: Any) -> StoredRollouts:
    config = DistillationConfig(**shared, max_completion_length=job["length"])
    small = AutoConfig.from_pretrained(job["model"], **TEACHER)
    prompts = [row["input_ids"][: row["prompt"]] for row in rows]
    trainer = StoredRollouts(
        job["model"],
        AutoModelForCausalLM.from_config(small, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": ids} for ids in prompts]),
        processing_class=tokenizer,
    )
    trainer.rollouts = {tuple(ids): row["input_ids"][row["prompt"] :] for ids, row in zip(prompts, rows, strict=True)}
    return trainer


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["found"]).write_text(json.dumps(run(job)))
