from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.chat import Template, load_tokenizer, render, render_many
from common.errors import DataError, UsageError
from common.prompts import Prompt
from tests.common.tiny_models import make_model

HI = Prompt(id="p1", text="Hi")
CHAT = Prompt(id="p2", messages=[{"role": "user", "content": "Hi"}])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(make_model(tmp_path_factory.mktemp("models") / "tiny"))


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    decoded = tokenizer.decode(ids)
    assert isinstance(decoded, str)
    return decoded


def test_text_is_rendered_as_a_user_message_ready_to_be_answered(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = render(tokenizer, HI, Template())
    assert text(tokenizer, ids) == "<|user|>Hi<|end|><|assistant|>"
    assert render(tokenizer, CHAT, Template()) == ids
    assert all(type(token) is int for token in ids)


def test_template_arguments_change_the_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = render(tokenizer, HI, Template(arguments={"enable_thinking": False}))
    assert text(tokenizer, ids) == "<|user|>Hi<|end|><|assistant|><think></think>"
    assert render(tokenizer, HI, Template(arguments={"enable_thinking": True})) == render(tokenizer, HI, Template())


def test_a_system_message_is_put_before_prompts_that_have_none(tokenizer: PreTrainedTokenizerBase) -> None:
    template = Template(system="Be brief.")
    own = Prompt(id="p3", messages=[{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}])

    for prompt in (HI, CHAT):
        ids = render(tokenizer, prompt, template)
        assert text(tokenizer, ids) == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert render(tokenizer, own, template) == render(tokenizer, own, Template())


def test_an_empty_system_message_is_a_system_message(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = render(tokenizer, HI, Template(system=""))
    assert text(tokenizer, ids) == "<|system|><|end|><|user|>Hi<|end|><|assistant|>"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_raw_text_is_encoded_as_it_stands(tokenizer: PreTrainedTokenizerBase, content: str) -> None:
    ids = render(tokenizer, Prompt(id="p", text=content), Template(mode="raw"))
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == content


def test_raw_mode_takes_no_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="'raw' takes plain text .p2.*'chat'"):
        render(tokenizer, CHAT, Template(mode="raw"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"mode": "chatty"}, "mode\n.*'chat' or 'raw'"),
        ({"arguments": {"tokenize": False}}, "tokenize is set by the software"),
        ({"arguments": {"enable_thinking": False, "add_generation_prompt": False}}, "add_generation_prompt is set by"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused_as_a_setting(template: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Template.model_validate(template)


def test_what_the_template_refuses_is_named_with_its_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    tool = Prompt(id="p7", messages=[{"role": "tool", "content": "x"}])
    with pytest.raises(DataError, match="refuses the messages: no such role: tool .prompt p7"):
        render(tokenizer, tool, Template())


def test_a_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_model(tmp_path / "base", template=None))
    with pytest.raises(UsageError, match="no chat template.*'raw'"):
        render(tokenizer, HI, Template())
    assert render(tokenizer, HI, Template(mode="raw")) == tokenizer.encode("Hi")


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(tmp_path: Path, content: str | None) -> None:
    folder = make_model(tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="cannot load the tokenizer") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_loading_a_tokenizer_runs_no_code_from_its_folder(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    with suppress(DataError):
        load_tokenizer(folder)
    assert not ran.exists()


CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(CONTENT, min_size=1, max_size=20), st.sampled_from(["chat", "raw"]))
def test_many_are_rendered_as_each_alone(tokenizer: PreTrainedTokenizerBase, texts: list[str], mode: Any) -> None:
    prompts = [
        Prompt(id=str(number), text=text)
        if number % 2 or mode == "raw"
        else Prompt(id=str(number), messages=[{"role": "user", "content": text}])
        for number, text in enumerate(texts)
    ]
    template = Template(mode=mode)
    assert render_many(tokenizer, prompts, template) == [render(tokenizer, prompt, template) for prompt in prompts]


def test_of_many_the_one_that_is_refused_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="'raw' takes plain text .p2"):
        render_many(tokenizer, [HI, CHAT], Template(mode="raw"))


def test_of_many_the_one_that_the_template_refuses_is_named() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0}, unk_token="x")))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    strange = Prompt(id="p3", messages=[{"role": "system", "content": "Be brief."}])
    with pytest.raises(DataError, match="refuses the messages: no system .prompt p3"):
        render_many(tokenizer, [HI, CHAT, strange, HI], Template())
