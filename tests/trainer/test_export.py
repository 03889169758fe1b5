import json
import math

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.lineage import identify, read_provenance, safetensors_metadata
from tests.trainer import build
from trainer.batch import pack
from trainer.config import OpdConfig, SftConfig
from trainer.export import export, is_exported
from trainer.inputs import open_inputs
from trainer.loop import train
from trainer.model import load_sharded
from trainer.step import score


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_scores_as_the_model_it_was_made_from(example, alone, tmp_path, tied):
    source = build.make_model(tmp_path / "source", tied=tied, seed=3)
    sft = SftConfig(model=str(source), data=example.sft, output=str(tmp_path / "out"), token_budget=90)
    inputs = open_inputs(sft, alone)
    model = load_sharded(source, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01
    assert not is_exported(sft.output)
    export(model, source, sft.output, alone, dtype="float32", provenance=inputs.provenance, stop_ids=[1, 7])
    assert is_exported(sft.output)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export", dtype=torch.float32).eval()
    batch = pack(example.rows[:1])
    with torch.no_grad():
        ours = score(model, batch, temperature=1.0, chunk=64).chosen
        logits = reopened(batch.input_ids, use_cache=False).logits[0, batch.predictors]
    theirs = logits.log_softmax(-1).gather(-1, batch.ids[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_export_is_complete(example, alone, tmp_path):
    source = build.make_model(tmp_path / "source", seed=3)
    config = SftConfig(
        model=str(source),
        data=example.sft,
        output=str(tmp_path / "out"),
        token_budget=90,
        rows_per_step=12,
        max_steps=1,
    )
    train(config, alone, quiet)
    folder = tmp_path / "out" / "export"
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert metadata["format"] == "pt"
    assert "lm_head.weight" not in names  # tied: it is the embedding
    provenance = read_provenance(folder)
    assert provenance is not None and provenance.role == "sft"
    assert provenance.teacher == identify(example.teacher, str(example.teacher))
    assert provenance.base_model == identify(source, str(source))
    stamped = json.loads(metadata["lopd_provenance"])
    assert stamped["teacher"] == identify(example.teacher, str(example.teacher)).model_dump()
    assert json.loads(safetensors_metadata(provenance)["lopd_provenance"])["sft_data"] == stamped["sft_data"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == build.EOS
    assert identify(folder, "x").tokenizer_sha256 == identify(source, "x").tokenizer_sha256
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert not list(folder.parent.glob(".export-*"))


def test_sft_lowers_the_loss_and_opd_hands_the_lineage_down(example, alone, tmp_path):
    source = build.make_student(tmp_path / "source", example.teacher, noise=0.1)
    settings = {"compute": "float32", "token_budget": 90, "rows_per_step": 24, "export_dtype": "float32"}
    sft = SftConfig(model=str(source), data=example.sft, output=str(tmp_path / "sft"), max_steps=8, lr=3e-3, **settings)
    train(sft, alone, quiet)
    losses = [record["loss"] for record in build.read_metrics(tmp_path / "sft")]
    assert losses[-1] < losses[0] - 0.1
    student = tmp_path / "sft" / "export"
    rows = build.graded(build.open_model(example.teacher), build.sample(build.open_model(student), prompts=12, seed=9))
    data = build.make_dataset(tmp_path / "data", rows, kind="scored", policy=student, teacher=example.teacher)
    opd = OpdConfig(
        model=str(student), data=data, output=str(tmp_path / "opd"), objective="topk", max_steps=8, lr=3e-3, **settings
    )
    train(opd, alone, quiet)
    records = build.read_metrics(tmp_path / "opd")
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(math.isfinite(value) for record in records for value in record.values())
    provenance = read_provenance(tmp_path / "opd" / "export")
    assert provenance is not None and provenance.parent is not None
    assert provenance.role == "opd" and provenance.parent.role == "sft"
    assert provenance.teacher == provenance.parent.teacher and provenance.sft_data == provenance.parent.sft_data
