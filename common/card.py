"""The dataset card: README.md of a dataset, in the Hub's format, written from its plan and manifest alone.

Equal plans and manifests give equal bytes, so any worker may write it. Names come from whoever made the dataset and are
shown as code, so that none of them is taken for Markdown.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.canonical import seal, sha256
from common.filtered import dropped_text, filters_text
from common.rejected import Rejected, rejected_lines

TITLES = {"sft": "Answers of a teacher", "rollouts": "Rollouts", "scored": "Rollouts with teacher log-probs"}
SIZES = (
    "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B",
    "100B<n<1T", "n>1T",
)  # fmt: skip
"""The Hub's words for the number of rows: up to three digits, and one digit more for each that follows."""
URL = "s3://BUCKET/DATASET"
"""Stands in a card for where the dataset lies, which its plan and manifest do not know."""


def dataset_card(plan: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Markdown below front matter that names exactly the committed files, so that orphans are not loaded."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(plan, manifest))
    return f"""---
{_front_matter(manifest)}
---
# {TITLES[manifest["kind"]]} (Lightning OPD)

{_warning(manifest["overrides"])}| | |
|---|---|
{rows}

One row is one rollout. Every list column but `prompt_ids` has one entry for each token of `completion_ids`, which holds
the exact ids that were sampled; log-probs are in nats, `rollout_logprobs` under the distribution that sampled,
`teacher_logprobs` at temperature 1.

{_HOW_TO}"""


def _front_matter(manifest: Mapping[str, Any]) -> str:
    """YAML of our own words and of names of shards alone: what the plan says stays out of it."""
    kind, files = manifest["kind"], "\n".join(f"      - {shard['file']}" for shard in manifest["shards"])
    return f"""pretty_name: {TITLES[kind]} (Lightning OPD)
size_categories:
  - {_size(manifest["rows"])}
task_categories:
  - text-generation
tags:
  - lightning-opd
  - distillation
  - {kind}
configs:
  - config_name: default
    data_files:
{files}"""


def _size(rows: int) -> str:
    return SIZES[min(max(len(str(rows)) - 3, 0), len(SIZES) - 1)]


def _facts(plan: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the card's table: what it is, who made it, of what, and how it came out."""
    created, prompts, lineage = plan["created"], plan["prompts"], plan["lineage"]
    facts = [
        ("dataset", f"{code(manifest['dataset_id'])}, manifest sha256 {code(sha256(seal(manifest)))}"),
        ("made by", f"{code(created['owner'])} with {code(created['by'])}, begun {code(created['at'])}"),
        ("rows", f"{manifest['rows']:,} in {len(manifest['shards']):,} shards"),
        ("tokens", f"{manifest['tokens']:,} sampled, {manifest['prompt_tokens']:,} of prompts"),
        ("prompts", f"{prompts['count']:,}, sha256 {code(prompts['sha256'])}"),
        ("sampled by", _model(plan["policy"])),
    ]
    if lineage and lineage["teacher"]:
        claim = " (attested, not verified)" if lineage["role"] == "attested" else ""
        facts.append(("which was tuned on answers of", _model(lineage["teacher"]) + claim))
    if plan["teacher"]:
        facts.append(("scored by", _model(plan["teacher"])))
        facts.append((f"{plan.get('topk_support', 'teacher')}'s top tokens kept", f"{plan['topk']} at every position"))
    if plan["parent"]:
        facts.append(("scores the rollouts of", f"manifest sha256 {code(plan['parent'])}"))
    facts.append(("sampling", code(json.dumps(plan["sampling"], sort_keys=True))))
    if plan.get("filters"):
        facts.append(("filters", code(filters_text(plan["filters"]))))
    left_out = [Rejected.model_validate(row) for shard in manifest["shards"] for row in shard.get("rejected", ())]
    rejected = ", ".join(map(code, rejected_lines(left_out)))
    return facts + _outcome(manifest) + ([("rejected rows", rejected)] if rejected else [])


def _outcome(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the statistics of the commits add up to; a statistic that a shard lacks is left out."""
    rows, tokens = manifest["rows"], manifest["tokens"]
    cut, rollout, teacher = (
        _total(manifest["shards"], name) for name in ("truncated", "rollout_logprob_sum", "teacher_logprob_sum")
    )
    facts = []
    if lost := dropped_text(shard["stats"] for shard in manifest["shards"]):
        facts.append(("dropped by filters", lost))
    if cut is not None and rows:
        facts.append(("cut off at the token limit", f"{cut / rows:.1%} of the rows"))
    if rollout is not None and tokens:
        facts.append(("mean rollout log-prob", f"{rollout / tokens:.4f} nats per token"))
        if teacher is not None:
            facts.append(("mean teacher minus rollout log-prob", f"{(teacher - rollout) / tokens:+.4f} nats per token"))
    return facts


def _total(shards: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [shard["stats"].get(name) for shard in shards]
    return None if None in found else sum(found)


def _model(identity: Mapping[str, Any]) -> str:
    revision = f" at revision {code(identity['revision'])}" if identity["revision"] else ""
    return f"{code(identity['name'])}{revision}, weights sha256 {code(identity['weights_sha256'])}"


def code(text: str) -> str:
    """Inline code within a cell of a table, whatever the text holds."""
    shown = " ".join(text.replace("`", "'").split()).replace("|", "\\|")
    return f"`{shown}`"


def _warning(overrides: Sequence[str]) -> str:
    if not overrides:
        return ""
    names = ", ".join(code(name) for name in overrides)
    return f"> **Overridden checks: {names}.** Whoever made this allowed what is refused by default.\n\n"


_HOW_TO = f"""## Read

From a bucket (with `AWS_PROFILE`, or the other variables of AWS) or a copy on disk, checked in every hash and row:

```python
from common.dataset import open_dataset

dataset = open_dataset("{URL}")
table = dataset.read_shard(0)
```

By others, unchecked. `MANIFEST.json` names the files that belong to the dataset; `data/*.parquet` may catch the
leavings of a worker that was killed.

```python
import json

import duckdb
import fsspec
from datasets import load_dataset

url = "{URL}"
with fsspec.open(url + "/MANIFEST.json") as manifest:
    files = [url + "/" + shard["file"] for shard in json.load(manifest)["shards"]]
rows = load_dataset("parquet", data_files=files, split="train")
duckdb.register_filesystem(fsspec.filesystem("s3"))
print(duckdb.read_parquet(files).aggregate("finish_reason, count(*)"))
```

A folder of the whole, or a dataset on the Hub, opens by its name: `load_dataset("ORG/NAME", split="train")`.

## Verify

```bash
lopd cache verify {URL}
```
"""
