"""Messages to token ids: the only renderer, shared by SFT data, rollouts and evaluation.

Two renderings of one conversation that differ in a blank are two different prompts to a network; so there is one
place where it is done, and all that steers it is part of the plan.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError
from pydantic import field_validator

from common.config import Frozen
from common.errors import DataError, UsageError
from common.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OURS = ("tokenize", "add_generation_prompt", "return_dict")
"""Arguments of `apply_chat_template` that `render` sets itself."""


class Template(Frozen):
    """How a prompt becomes token ids."""

    mode: Literal["chat", "raw"] = "chat"
    """`chat`: through the tokenizer's chat template. `raw`: plain text, encoded as it stands."""
    system: str | None = None
    """A system message put before every prompt that has none of its own."""
    arguments: dict[str, Any] = {}
    """Further arguments of the chat template, such as `enable_thinking`."""

    @field_validator("arguments")
    @classmethod
    def _leave_ours(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        taken = [name for name in OURS if name in arguments]
        if taken:
            raise ValueError(f"{taken[0]} is set by the software; leave it out")
        return arguments


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a model folder. Never runs code from there."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer  # here, because it takes seconds and imports torch where that is installed

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise DataError(f"cannot load the tokenizer: {str(error).splitlines()[0]}", where=str(folder)) from None


def render(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, template: Template) -> list[int]:
    """Token ids of `prompt`, ready for the engine to continue.

    Raises:
        UsageError: there is no chat template, or messages are to be rendered raw.
        DataError: the template refuses the messages.
    """
    return _rendered(tokenizer, [prompt], template)[0]


def render_many(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], template: Template) -> list[list[int]]:
    """Token ids of each prompt, as `render` gives them, by as many threads as the tokenizer takes. Raises as it does.

    Args:
        prompts: some hundred; all of their ids are in memory at once.
    """
    try:
        return _rendered(tokenizer, prompts, template)
    except DataError:  # of one of them: which?
        return [render(tokenizer, prompt, template) for prompt in prompts]


def _rendered(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], template: Template) -> list[list[int]]:
    if template.mode == "raw":
        talk = next((prompt for prompt in prompts if prompt.messages is not None), None)
        if talk is not None:
            raise UsageError("template mode 'raw' takes plain text", where=talk.id, fix="Use mode 'chat' for messages")
        encoded: Any = tokenizer([prompt.text for prompt in prompts])
        return [list(ids) for ids in encoded["input_ids"]]
    if not tokenizer.chat_template:
        raise UsageError("the model has no chat template", fix="Use template.mode = 'raw', or add one to its tokenizer")
    try:
        rendered: Any = tokenizer.apply_chat_template(
            [_messages(prompt, template) for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **template.arguments,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"the chat template refuses the messages: {error}", where=f"prompt {prompts[0].id}") from None
    return [list(ids) for ids in rendered["input_ids"]]


def _messages(prompt: Prompt, template: Template) -> list[dict[str, str]]:
    messages = prompt.messages if prompt.messages is not None else [{"role": "user", "content": prompt.text}]
    if template.system is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    return messages
