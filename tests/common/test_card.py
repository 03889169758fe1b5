"""The dataset card: what the Hub, `datasets` and a person read in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from common.card import URL, dataset_card
from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.lineage import ModelIdentity, Provenance
from tests.common.rows import IDENTITY, make_plan, make_row, make_shard

STATS = {"truncated": 1.0, "rollout_logprob_sum": -2.0, "teacher_logprob_sum": -5.0}
TEACHER = {**IDENTITY, "name": "org/teacher", "revision": "9" * 40}


def make_dataset(url: Path, stats: dict[str, float] | None = None, **changes: Any) -> str:
    """Finish a dataset of two shards at `url`; returns its card."""
    writer = create_dataset(str(url), make_plan(2, **changes))
    for shard in range(2):
        writer.commit(shard, make_shard(shard), STATS if stats is None else stats)
    writer.finalize()
    return (url / "README.md").read_text()


def table_of(card: str) -> dict[str, str]:
    """The card's table: name -> value."""
    cells = [re.split(r"(?<!\\)\|", line) for line in card.splitlines() if line.startswith("| ") and "| |" not in line]
    assert {len(row) for row in cells} == {4}
    return {row[1].strip(): row[2].strip() for row in cells}


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    data = DatasetCard(make_dataset(tmp_path)).data.to_dict()

    files = [shard.file for shard in open_dataset(str(tmp_path)).shards]
    assert data["configs"] == [{"config_name": "default", "data_files": files}]
    assert data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["text-generation"]
    assert data["tags"] == ["lightning-opd", "distillation", "scored"]


def test_datasets_loads_the_committed_rows_and_no_orphans(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    shards = [shard.file for shard in open_dataset(str(tmp_path)).shards]
    (tmp_path / "data" / "000000-0123456789abcdef.parquet").write_bytes((tmp_path / shards[0]).read_bytes())

    rows = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))

    assert rows["uid"] == [make_row(10 * shard + row).uid for shard in range(2) for row in range(3)]


def test_the_code_of_a_card_runs_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = make_dataset(tmp_path)
    dataset = open_dataset(str(tmp_path))

    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace(URL, str(tmp_path)), names)

    assert len(blocks) == 2
    assert names["table"].equals(dataset.read_shard(0))
    assert names["rows"].num_rows == dataset.num_rows
    assert re.search(rf"stop\W+{dataset.num_rows}\b", capsys.readouterr().out)


def test_the_table_says_who_made_what_of_which_models_and_how_it_came_out(tmp_path: Path) -> None:
    facts = table_of(make_dataset(tmp_path, teacher=TEACHER, parent="e" * 64))

    dataset = open_dataset(str(tmp_path))
    assert dataset.manifest_sha256 in facts["dataset"] and dataset.manifest["dataset_id"] in facts["dataset"]
    assert facts["made by"] == "`ann` with `lightning-opd 0.1.0`, begun `2026-01-02T03:04:05+00:00`"
    assert facts["sampled by"] == f"`org/model`, weights sha256 `{'a' * 64}`"
    assert facts["scored by"] == f"`org/teacher` at revision `{'9' * 40}`, weights sha256 `{'a' * 64}`"
    assert facts["scores the rollouts of"] == f"manifest sha256 `{'e' * 64}`"
    assert facts["prompts"] == f"6, sha256 `{'c' * 64}`"
    assert json.loads(facts["sampling"].strip("`")) == dataset.plan["sampling"]
    assert facts["cut off at the token limit"] == "33.3% of the rows"  # 2 of 6
    assert facts["mean rollout log-prob"] == f"{-4 / dataset.num_tokens:.4f} nats per token"
    assert facts["mean teacher minus rollout log-prob"] == f"{-6 / dataset.num_tokens:+.4f} nats per token"


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    facts = table_of(make_dataset(tmp_path, stats={}))

    assert not {name for name in facts if "mean" in name or "cut off" in name}


@pytest.mark.parametrize(("role", "marked"), [("attested", True), ("sft", False)])
def test_a_claimed_teacher_is_marked_as_claimed(tmp_path: Path, role: str, marked: bool) -> None:
    card = make_dataset(tmp_path, lineage=Provenance(role=role, teacher=ModelIdentity(**TEACHER)).model_dump())

    assert table_of(card)["which was tuned on answers of"].endswith("(attested, not verified)") is marked


def test_an_override_is_said_above_everything(tmp_path: Path) -> None:
    card = make_dataset(tmp_path, overrides=["teacher-mismatch"])

    assert card.index("> **Overridden checks: `teacher-mismatch`.**") < card.index("| dataset |")


def test_without_overrides_nothing_is_said_of_them(tmp_path: Path) -> None:
    assert "Overridden" not in make_dataset(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["a | b", "line\nbreak\n---\n# Title", "`code` <script>alert(1)</script>", "trailing \\", "\\|", "", "🙂 漢字"],
)
def test_a_strange_name_stays_in_its_cell(tmp_path: Path, name: str) -> None:
    card = make_dataset(tmp_path, policy={**IDENTITY, "name": name})

    shown = table_of(card)["sampled by"]
    assert re.fullmatch(rf"`[^`]*`, weights sha256 `{'a' * 64}`", shown)
    assert DatasetCard(card).data.to_dict()["pretty_name"] == "Rollouts with teacher log-probs (Lightning OPD)"


def test_equal_plans_and_manifests_give_equal_bytes(tmp_path: Path) -> None:
    card = make_dataset(tmp_path)
    dataset = open_dataset(str(tmp_path))

    assert dataset_card(dict(reversed(dataset.plan.items())), dict(reversed(dataset.manifest.items()))) == card


@pytest.mark.parametrize(
    ("rows", "words"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**15, "n>1T")],
)
def test_the_size_is_said_in_the_words_of_the_hub(tmp_path: Path, rows: int, words: str) -> None:
    make_dataset(tmp_path)
    dataset = open_dataset(str(tmp_path))

    assert f"\n  - {words}\n" in dataset_card(dataset.plan, {**dataset.manifest, "rows": rows})


def test_filters_and_what_they_dropped_are_told(tmp_path: Path) -> None:
    filters = {"drop_loops": True, "min_tokens": None, "verifier": "math-verify", "keep": "correct"}
    stats = {"dropped_loop": 2.0, "dropped_wrong": 1.0, "judged": 4.0}
    table = table_of(make_dataset(tmp_path, stats, filters=filters))
    assert table["filters"] == '`drop_loops true, verifier "math-verify", keep "correct"`'
    assert table["dropped by filters"] == "4 ending in a loop, 2 found wrong"
    assert "dropped by filters" not in table_of(make_dataset(tmp_path / "other"))
