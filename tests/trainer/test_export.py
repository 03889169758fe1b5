import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.chat import load_tokenizer
from common.errors import DataError, StorageError
from common.lineage import Provenance, identify, read_provenance, safetensors_metadata, write_provenance
from common.models import resolve
from common.storage import Store
from tests.trainer import build
from trainer.batch import pack
from trainer.checkpoint import Checkpoints
from trainer.config import OpdConfig, SftConfig
from trainer.export import Spec, export, is_exported
from trainer.header import Header
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
    spec = Spec(Header(1, 0, 1, "m", "s", {}), "float32", inputs.provenance, inputs.start, stop_ids=[1, 7])
    assert not is_exported(sft.output, spec)
    export(model, source, sft.output, alone, spec)
    assert is_exported(sft.output, spec)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export", dtype=torch.float32).eval()
    batch = pack(example.rows[:1])
    with torch.no_grad():
        ours = score(model, batch, temperature=1.0, chunk=64).chosen
        logits = reopened(batch.input_ids, use_cache=False).logits[0, batch.predictors]
    theirs = logits.log_softmax(-1).gather(-1, batch.ids[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def step_of(folder: Path) -> int:
    return json.loads((folder / "export" / "export.json").read_text())["step"]


def dtype_of(folder: Path) -> torch.dtype:
    with safe_open(folder / "export" / "model.safetensors", "pt") as file:
        return file.get_tensor("model.norm.weight").dtype


def test_an_export_of_fewer_steps_or_another_type_is_made_again(example, alone, tmp_path, monkeypatch):
    settings: dict[str, Any] = {
        "model": str(example.teacher),
        "data": example.sft,
        "output": str(tmp_path),
        "token_budget": 90,
    }
    settings |= {"rows_per_step": 12, "schedule": "constant", "warmup": 0.0}
    train(SftConfig(**settings, max_steps=1), alone, quiet)

    def fails(*arguments):
        raise StorageError("no space left")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr("trainer.loop.export", fails)
        train(SftConfig(**settings, max_steps=2), alone, quiet)
    assert step_of(tmp_path) == 1
    train(SftConfig(**settings, max_steps=2), alone, quiet)
    assert (step_of(tmp_path), dtype_of(tmp_path)) == (2, torch.bfloat16)
    train(SftConfig(**settings, max_steps=2, export_dtype="float32"), alone, quiet)
    assert (step_of(tmp_path), dtype_of(tmp_path)) == (2, torch.float32)


@pytest.mark.slow
def test_half_an_export_over_an_older_one_is_no_model(example, alone, s3, monkeypatch):
    start = identify(example.student, str(example.student))
    spec = Spec(Header(1, 0, 1, "m", "s", {}), "float32", Provenance(role="sft"), start, stop_ids=[1])
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    export(model, example.student, s3, alone, spec)
    store = Store(f"{s3}/export")
    store.put("model-00001-of-00002.safetensors", b"of an older, larger export")

    def torn(folder: Path, url: str) -> None:
        Store(url).send(folder / "model.safetensors", "model.safetensors")
        raise StorageError("no space left")

    newer = replace(spec, header=replace(spec.header, step=2))
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr("trainer.export.publish", torn)
        export(model, example.student, s3, alone, newer)
    with pytest.raises(DataError, match="no config.json"):
        resolve(f"{s3}/export")
    export(model, example.student, s3, alone, newer)
    assert is_exported(s3, newer) and not is_exported(s3, spec)
    assert not store.exists("model-00001-of-00002.safetensors")
    assert read_provenance(resolve(f"{s3}/export")) is not None


def test_a_large_export_is_several_files_with_an_index(example, alone, tmp_path, monkeypatch):
    source = build.make_model(tmp_path / "source", tied=False, seed=3)
    start = identify(source, str(source))
    spec = Spec(Header(1, 0, 1, "m", "s", {}), "float32", Provenance(role="sft"), start, stop_ids=[1])
    model = load_sharded(source, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    monkeypatch.setattr("trainer.export.LARGEST_FILE", "30KB")
    export(model, source, str(tmp_path), alone, spec)
    folder = tmp_path / "export"
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 40_000 for file in files)
    assert set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()) == {
        file.name for file in files
    }
    for file in files:
        with safe_open(file, "pt") as opened:
            assert "lopd_provenance" in opened.metadata()
    assert identify(folder, "x").tensors_sha256 == start.tensors_sha256  # nothing was trained, nothing changed


def test_what_a_killed_export_left_goes_with_the_next(example, alone, tmp_path):
    left = tmp_path / ".export-killed" / "export"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    start = identify(example.student, str(example.student))
    spec = Spec(Header(1, 0, 1, "m", "s", {}), "float32", Provenance(role="sft"), start, stop_ids=[1])
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    export(model, example.student, str(tmp_path), alone, spec)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def base_and_data(example, folder: Path, **changes) -> SftConfig:
    """A base model without a chat template, and answers that its teacher gave through one."""
    base = build.make_model(folder / "base", seed=3)
    (base / "chat_template.jinja").unlink()
    answers = build.sample(build.open_model(example.teacher), prompts=6, seed=5)
    data = build.make_dataset(folder / "data", answers, kind="sft", policy=example.teacher, **changes)
    settings: dict[str, Any] = {"token_budget": 90, "rows_per_step": 12, "max_steps": 1}
    return SftConfig(model=str(base), data=data, output=str(folder / "out"), **settings)


def test_a_student_is_prompted_as_it_was_trained(example, alone, tmp_path):
    text = load_tokenizer(example.teacher).chat_template
    template = {"mode": "chat", "system": "Be brief.", "arguments": {}}
    config = base_and_data(example, tmp_path, chat_template=text, template=template)
    assert load_tokenizer(tmp_path / "base").chat_template is None
    train(config, alone, quiet)
    folder = tmp_path / "out" / "export"
    assert load_tokenizer(folder).chat_template == text
    provenance = read_provenance(folder)
    assert provenance is not None and provenance.template == template
    assert identify(folder, "x").chat_template_sha256 == identify(example.teacher, "x").chat_template_sha256
    rows = build.graded(build.open_model(example.teacher), build.sample(build.open_model(folder), prompts=4))
    data = build.make_dataset(tmp_path / "scored", rows, kind="scored", policy=folder, teacher=example.teacher)
    opd = OpdConfig(model=str(folder), data=data, output=str(tmp_path / "opd"), token_budget=90)
    assert open_inputs(opd, alone).provenance.template == template
    assert open_inputs(opd, alone).chat_template is None


def test_a_student_whose_template_nobody_wrote_down_has_that_of_its_rollouts(example, alone):
    known = read_provenance(example.student)
    assert known is not None and known.template is None
    opd = OpdConfig(model=str(example.student), data=example.scored, output="unused", token_budget=90)
    assert open_inputs(opd, alone).provenance.template == {"mode": "chat", "system": None, "arguments": {}}


def test_another_template_of_its_own_gives_way_to_the_teachers(example, alone, tmp_path):
    text = load_tokenizer(example.teacher).chat_template
    config = base_and_data(example, tmp_path, chat_template=text)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    train(config, alone, quiet)
    assert load_tokenizer(tmp_path / "out" / "export").chat_template == text


def test_a_template_that_nobody_kept_is_warned_of(example, alone, tmp_path):
    said: list[str] = []
    train(base_and_data(example, tmp_path), alone, said.append)
    assert any("WARNING" in line and "the dataset does not carry" in line for line in said)


def test_raw_prompts_change_no_template(example, alone, tmp_path):
    raw = {"mode": "raw", "system": None, "arguments": {}}
    inputs = open_inputs(base_and_data(example, tmp_path, chat_template="x", template=raw), alone)
    assert (inputs.chat_template, inputs.warnings) == (None, ())


def test_overrides_are_handed_on_and_stamped_everywhere(example, alone, tmp_path):
    base = build.make_model(tmp_path / "base", seed=3)
    write_provenance(base, Provenance(role="opd", overrides=("teacher-mismatch",)))
    answers = build.sample(build.open_model(example.teacher), prompts=6, seed=5)
    data = build.make_dataset(tmp_path / "data", answers, kind="sft", policy=example.teacher, overrides=["another"])
    output = tmp_path / "out"
    settings: dict[str, Any] = {"token_budget": 90, "rows_per_step": 12, "max_steps": 1}
    train(SftConfig(model=str(base), data=data, output=str(output), **settings), alone, quiet)
    both = ["another", "teacher-mismatch"]
    provenance = read_provenance(output / "export")
    assert provenance is not None and list(provenance.overrides) == both
    assert list(Checkpoints(str(output), alone, 2, quiet).header(1).overrides) == both
    assert [line["overrides"] for line in build.read_metrics(output)] == [both]


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
    card = (folder / "README.md").read_text()
    assert provenance.sft_data is not None and provenance.sft_data.manifest_sha256 in card
    assert str(tmp_path) not in card and str(example.teacher) not in card
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
    numbers = [value for record in records for value in record.values() if isinstance(value, float)]
    assert numbers and all(math.isfinite(value) for value in numbers)
    provenance = read_provenance(tmp_path / "opd" / "export")
    assert provenance is not None and provenance.parent is not None
    assert provenance.role == "opd" and provenance.parent.role == "sft"
    assert provenance.teacher == provenance.parent.teacher and provenance.sft_data == provenance.parent.sft_data
