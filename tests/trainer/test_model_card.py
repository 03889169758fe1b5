"""The model card is what strangers read: it must parse, tell the lineage, and tell nothing of the machine it was made
on."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from common.lineage import DatasetRef, ModelIdentity, Provenance
from trainer.model_card import Story, model_card


def identity(name: str, digit: str, revision: str | None = None) -> ModelIdentity:
    hashes = dict.fromkeys(("weights_sha256", "tensors_sha256", "config_sha256", "tokenizer_sha256"), digit * 64)
    return ModelIdentity(name=name, revision=revision, **hashes)


BASE = identity("Qwen/Qwen3-4B-Base", "a", revision="c" * 40)
TEACHER = identity("Qwen/Qwen3-8B", "b")
SFT = Provenance(
    role="sft",
    base_model=BASE,
    teacher=TEACHER,
    sft_data=DatasetRef(manifest_sha256="1" * 64, url="hf://datasets/ann/answers"),
    template={"mode": "chat", "system": "Be brief.", "arguments": {"enable_thinking": False}},
)
OPD = Provenance(
    role="opd",
    base_model=BASE,
    teacher=TEACHER,
    sft_data=SFT.sft_data,
    scored_data=DatasetRef(manifest_sha256="2" * 64, url="s3://lab/scored"),
    parent=SFT,
    template=SFT.template,
)
STORY = Story(
    provenance=OPD,
    start=identity("s3://lab/sft/export", "d"),
    scored_by=TEACHER,
    settings={"lr": 2e-06, "objective": "importance"},
    steps=150,
    dtype="bfloat16",
    stop_ids=[7, 9],
)


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(model_card(STORY)).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-4B-Base"
    assert data["datasets"] == ["ann/answers"]  # the other one is not on the Hub
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"lightning-opd", "distillation", "opd"} <= set(data["tags"])


def test_the_lineage_is_told_from_the_base_model_to_the_last_dataset():
    text = model_card(STORY)
    said = ["`Qwen/Qwen3-4B-Base` at revision", "`s3://lab/sft/export`", "SFT teacher", "scored by", "1" * 64, "2" * 64]
    assert all(words in text for words in said)
    assert text.index("supervised fine-tuning |") < text.index("on-policy distillation, round 1 |")
    assert "| `lr` | `2e-06` |" in text and "| steps | 150 |" in text and "token ids 7, 9" in text


def test_a_second_round_is_told_as_one():
    second = OPD.model_copy(update={"parent": OPD, "scored_data": DatasetRef(manifest_sha256="3" * 64, url="s3://x/y")})
    text = model_card(replace(STORY, provenance=second))
    assert "round 2)" in text
    assert text.index("round 1 |") < text.index("round 2 |")
    assert "3" * 64 in text


def test_nothing_of_the_machine_is_told():
    here = {"name": "/home/ann/secret-project/base"}
    local = OPD.model_copy(
        update={
            "base_model": BASE.model_copy(update=here),
            "teacher": TEACHER.model_copy(update=here),
            "scored_data": DatasetRef(manifest_sha256="2" * 64, url="/home/ann/secret-project/scored"),
        }
    )
    story = replace(STORY, provenance=local, start=local.base_model, scored_by=local.teacher)
    text = model_card(story)
    assert "secret-project" not in text and "base_model:" not in text
    assert "a" * 64 in text and "2" * 64 in text  # they are known by their content


def test_an_override_is_said_before_all_else():
    text = model_card(replace(STORY, provenance=OPD.model_copy(update={"overrides": ("teacher-mismatch",)})))
    assert "> **Overridden checks: `teacher-mismatch`.**" in text.partition("## Lineage")[0]
    assert "Overridden" not in model_card(STORY)


@pytest.mark.parametrize("template", [SFT.template, {"mode": "raw", "system": None, "arguments": {}}, None])
def test_its_programs_are_python_and_prompt_as_it_was_trained(template):
    text = model_card(replace(STORY, provenance=OPD.model_copy(update={"template": template})))
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        compile(program, "card", "exec")
    if template is SFT.template:
        assert all('"Be brief."' in program and "enable_thinking" in program for program in programs)
    if template is not None and template["mode"] == "raw":
        assert not any("chat" in program for program in programs)


def test_a_name_cannot_break_out_of_its_cell():
    odd = identity("s3://lab/`x` | y", "e")
    row = next(line for line in model_card(replace(STORY, start=odd)).splitlines() if line.startswith("| begun from"))
    assert row.count(" | ") == 1 and "`s3://lab/'x' \\| y`" in row
