"""The longest prompt: measured once for what decides it, and again when it does not fit or its note is damaged."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from common.chat import Template, load_tokenizer
from common.errors import DataError
from common.models import ModelConfig
from common.prompts import PromptSet, load_prompts
from precompute.prompt_lengths import longest_prompt
from tests.precompute import tiny

MODEL = ModelConfig(vocab_size=tiny.VOCAB, max_positions=tiny.CONTEXT, eos_token_ids=())
RAW = Template(mode="raw")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    return load_tokenizer(folder)


def prompts_of(file: Path, *texts: str) -> PromptSet:
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return load_prompts(str(file))


@pytest.fixture
def prompts(tmp_path: Path) -> PromptSet:
    return prompts_of(tmp_path / "p.jsonl", *["xy"] * 600, "x" * 40, *["z"] * 600)


def note(cache: Path) -> Path:
    (file,) = (cache / "prompts").glob("*.json")
    return file


def test_every_prompt_counts_wherever_it_stands(tokenizer: PreTrainedTokenizerBase, prompts: PromptSet) -> None:
    assert longest_prompt(tokenizer, RAW, 8, prompts, MODEL) == 40
    assert longest_prompt(tokenizer, Template(), 8, prompts, MODEL) > 40


def test_it_is_measured_once(tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, tmp_path: Path) -> None:
    longest_prompt(tokenizer, RAW, 8, prompts, MODEL)
    others = prompts_of(tmp_path / "q.jsonl", "xyz")
    same = PromptSet(others.prompts, prompts.sha256, prompts.source)  # whose prompts are told apart from the measured
    assert longest_prompt(tokenizer, RAW, 8, same, MODEL) == 40
    assert longest_prompt(tokenizer, RAW, 8, others, MODEL) == 3
    assert longest_prompt(tokenizer, Template(mode="raw", system="x"), 8, same, MODEL) == 3


def test_what_does_not_fit_is_named_however_often_it_was_measured(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet
) -> None:
    longest_prompt(tokenizer, RAW, 8, prompts, MODEL)
    culprit = prompts.prompts[600].id
    for _ in range(2):
        with pytest.raises(DataError, match=f"a prompt of 40 tokens with 88 to sample.*prompt {culprit}"):
            longest_prompt(tokenizer, RAW, 88, prompts, MODEL)
        with pytest.raises(DataError, match="the model has only 3 rows"):
            longest_prompt(tokenizer, RAW, 8, prompts, MODEL.model_copy(update={"vocab_size": 3}))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"longest": "x", "highest": 1}', "\x00\x80"])
def test_a_damaged_note_is_measured_again(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, own_cache: Path, damage: str
) -> None:
    longest_prompt(tokenizer, RAW, 8, prompts, MODEL)
    whole = note(own_cache).read_bytes()
    note(own_cache).write_text(damage, "latin-1")
    assert longest_prompt(tokenizer, RAW, 8, prompts, MODEL) == 40
    assert note(own_cache).read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_the_note_alone(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOPD_CACHE_DIR", str(tmp_path / "file"))
    assert longest_prompt(tokenizer, RAW, 8, prompts, MODEL) == 40
