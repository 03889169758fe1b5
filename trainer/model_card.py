"""The model card, README.md of an export, in the Hub's format: what it is, how it was trained, its lineage, how to
use it.

Equal runs give equal bytes. A card is made to be published, so a model or dataset that lies in a folder of this machine
is shown by its hash alone; names come from whoever made them and are shown as code, so that none is taken for Markdown.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.card import code
from common.lineage import DatasetRef, ModelIdentity, Provenance
from common.models import HUB_ID
from common.urls import is_url

HUB_DATASETS = "hf://datasets/"
PAPER = "[Lightning OPD](https://arxiv.org/abs/2604.13010)"
MODEL = "ORG/MODEL"
"""Stands in a card for where the model lies, which it does not know."""
STAGES = {
    "sft": "supervised fine-tuning",
    "opd": "on-policy distillation",
    "attested": "trained elsewhere, as attested",
}


@dataclass(frozen=True)
class Story:
    """What a card tells."""

    provenance: Provenance
    start: ModelIdentity
    """The model the run began from."""
    scored_by: ModelIdentity | None
    """The model whose log-probs the run was trained on; None for SFT."""
    settings: Mapping[str, Any]
    steps: int
    dtype: str
    stop_ids: Sequence[int]


def model_card(story: Story) -> str:
    """Markdown below front matter."""
    provenance = story.provenance
    return f"""---
{_front_matter(story)}
---
# {_title(story)}

{_warning(provenance.overrides)}{_method(story)}

## Lineage

{_table(("", ""), _lineage(story))}

## Training

{_table(("setting", "value"), _training(story))}

{_use(story)}"""


def public_name(name: str) -> str | None:
    """A Hub id or a URL as it is; None for a folder of some machine, which tells a reader nothing."""
    return name if is_url(name) or HUB_ID.fullmatch(name) else None


def _front_matter(story: Story) -> str:
    """YAML; a JSON string is one in YAML too. Only what lies on the Hub is named, for the Hub follows these names."""
    base = story.provenance.base_model or story.start
    refs = [ref for ref in (story.provenance.sft_data, story.provenance.scored_data) if ref]
    datasets = sorted({ref.url.removeprefix(HUB_DATASETS) for ref in refs if ref.url.startswith(HUB_DATASETS)})
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if hub := HUB_ID.fullmatch(base.name):
        lines += [f"base_model: {json.dumps(hub['repo'])}", "base_model_relation: finetune"]
    if datasets:
        lines += ["datasets:", *[f"  - {json.dumps(name)}" for name in datasets]]
    return "\n".join([*lines, "tags:", "  - lightning-opd", "  - distillation", f"  - {story.provenance.role}"])


def _title(story: Story) -> str:
    base = HUB_ID.fullmatch((story.provenance.base_model or story.start).name)
    what = "fine-tuned on its teacher's answers" if story.provenance.role == "sft" else "distilled on its own rollouts"
    return f"{base['repo'].partition('/')[2] if base else 'A model'}, {what}"


def _warning(overrides: Sequence[str]) -> str:
    if not overrides:
        return ""
    names = ", ".join(code(name) for name in overrides)
    return f"> **Overridden checks: {names}.** Whoever made this allowed what is refused by default.\n\n"


def _method(story: Story) -> str:
    provenance, teacher = story.provenance, story.scored_by or story.provenance.teacher
    by = _named(teacher) if teacher else "its teacher"
    if provenance.role == "sft":
        return (
            f"Fine-tuned on answers of {by}: the first stage of {PAPER}. Its own rollouts, scored by the same teacher, "
            "are what the second stage distils from."
        )
    objective = story.settings.get("objective", "")
    return (
        f"Distilled from {by} on stored rollouts of its own, every sampled token graded by the teacher's log-prob "
        f"({PAPER}; objective {code(str(objective))}; round {provenance.round}). No teacher ran during training."
    )


def _lineage(story: Story) -> Iterator[tuple[str, str]]:
    """Rows from the base model to this one, each generation with what it was trained on."""
    base = story.provenance.base_model
    if base:
        yield "base model", _model(base)
    if not base or base.tensors_sha256 != story.start.tensors_sha256:
        yield "begun from", _model(story.start)
    if story.provenance.teacher:
        yield "SFT teacher", _model(story.provenance.teacher)
    if story.scored_by:
        yield "scored by", _model(story.scored_by)
    for generation in reversed(list(_generations(story.provenance))):
        stage = STAGES.get(generation.role, code(generation.role))
        stage = f"{stage}, round {generation.round}" if generation.role == "opd" else stage
        data = generation.scored_data if generation.role == "opd" else generation.sft_data
        yield stage, f"dataset {_dataset(data)}" if data else "dataset not recorded"


def _generations(provenance: Provenance | None) -> Iterator[Provenance]:
    """The model, its parent, and so on."""
    while provenance is not None:
        yield provenance
        provenance = provenance.parent


def _training(story: Story) -> Iterator[tuple[str, str]]:
    yield "steps", f"{story.steps:,}"
    for name, value in sorted(story.settings.items()):
        yield code(name), code(json.dumps(value))
    yield "exported as", code(story.dtype)


def _prompting(template: Mapping[str, Any]) -> tuple[str, str, str]:
    """How a model tuned with this template is prompted: in words, by transformers, by vLLM."""
    if template["mode"] != "chat":
        question = '"Why is the sky blue?"'
        words = "with plain text, without a chat template"
        return words, f'ids = tokenizer({question}, return_tensors="pt")', f"llm.generate({question}, sampling)"
    system = [{"role": "system", "content": template["system"]}] if template.get("system") else []
    messages = json.dumps([*system, {"role": "user", "content": "Why is the sky blue?"}], ensure_ascii=False)
    given = template.get("arguments") or {}
    arguments = "".join(f", {key}={value!r}" for key, value in sorted(given.items()))
    options = f", chat_template_kwargs={given!r}" if given else ""
    render = (
        f"ids = tokenizer.apply_chat_template(\n    {messages},\n"
        f'    add_generation_prompt=True, return_dict=True, return_tensors="pt"{arguments}\n)'
    )
    return "with its chat template", render, f"llm.chat({messages}, sampling{options})"


def _use(story: Story) -> str:
    template = story.provenance.template or {"mode": "chat", "system": None, "arguments": {}}
    how, render, engine = _prompting(template)
    stops = ", ".join(str(token) for token in story.stop_ids)
    return f"""## Use

Prompt it as it was trained: {how}. {f"Generation stops at the token ids {stops}." if stops else ""}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{MODEL}")
model = AutoModelForCausalLM.from_pretrained("{MODEL}", dtype="auto")
{render}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=256)[0, ids["input_ids"].shape[1] :]))
```

```python
from vllm import LLM, SamplingParams

llm = LLM("{MODEL}")
sampling = SamplingParams(temperature=1.0, max_tokens=256)
print({engine}[0].outputs[0].text)
```

`provenance.json` holds this lineage for programs; `lopd precompute run --model {MODEL}` samples and scores the rollouts
of another round with the teacher it names.
"""


def _model(identity: ModelIdentity) -> str:
    revision = f" at revision {code(identity.revision)}" if identity.revision else ""
    return f"{_named(identity)}{revision}, tensors sha256 {code(identity.tensors_sha256)}"


def _named(identity: ModelIdentity) -> str:
    name = public_name(identity.name)
    return code(name) if name else f"a model known by its tensors ({code(identity.tensors_sha256[:16])})"


def _dataset(data: DatasetRef) -> str:
    place = f"{code(data.url)}, " if public_name(data.url) else ""
    return f"{place}manifest sha256 {code(data.manifest_sha256)}"


def _table(head: tuple[str, str], rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows]])
