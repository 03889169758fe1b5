"""The dataset card: README.md of a dataset, in the Hub's format, written from its plan and manifest alone."""

import json
from collections.abc import Mapping
from typing import Any


def dataset_card(plan: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Markdown with `configs:` front matter that names exactly the committed files, so that orphans are not loaded."""
    files = "\n".join(f"      - {shard['file']}" for shard in manifest["shards"])
    return f"""---
configs:
  - config_name: default
    data_files:
{files}
tags:
  - lightning-opd
  - {manifest["kind"]}
---
# {_title(manifest["kind"])}

{_warning(plan)}| | |
|---|---|
| dataset id | `{manifest["dataset_id"]}` |
| sampled by | {_model(plan["policy"])} |
| scored by | {_model(plan["teacher"])} |
| rows, completion tokens | {manifest["rows"]:,}, {manifest["tokens"]:,} |
| sampling | `{json.dumps(plan["sampling"], sort_keys=True)}` |
| teacher top-k stored | {plan["topk"]} |
| prompts | {plan["prompts"]["count"]:,}, sha256 `{plan["prompts"]["sha256"][:16]}` |

Every list column has one entry per token of `completion_ids`; log-probs are in nats.

```python
from datasets import load_dataset
rows = load_dataset("<this folder>", split="train")
```

`MANIFEST.json` names the files that belong to the dataset; a pattern such as `data/*.parquet` may catch the leavings of
a worker that was killed.
"""


def _title(kind: str) -> str:
    titles = {"sft": "Answers of a teacher", "rollouts": "Rollouts", "scored": "Rollouts with teacher log-probs"}
    return f"{titles[kind]} (Lightning OPD)"


def _model(identity: Mapping[str, Any] | None) -> str:
    return f"{identity['name']}, weights `{identity['weights_sha256'][:16]}`" if identity else "no one"


def _warning(plan: Mapping[str, Any]) -> str:
    overrides = plan["overrides"]
    return f"> **Overridden checks: {', '.join(overrides)}.**\n\n" if overrides else ""
