"""A phase on puppets: `python -m tests.precompute.fleet.stage FOLDER KEY=VALUE...` works on FOLDER/dataset."""

import sys
from collections.abc import Mapping
from pathlib import Path

from common import cli
from common.config import load_section
from common.dataset import Dataset, open_dataset
from common.prompts import load_prompts
from common.schema import Rollout, to_rows
from precompute.config import Generate
from precompute.engine.requests import GenerateRequest
from precompute.fleet.devices import slots
from precompute.fleet.local import Box
from precompute.generate import seed_of
from precompute.phases import make_rollouts
from tests.precompute import tiny
from tests.precompute.fleet.puppet import completion

PROMPTS, SAMPLES, PER_SHARD = 40, 3, 2
SHARDS, ROWS = PROMPTS // PER_SHARD, PROMPTS * SAMPLES


def prepare(folder: Path) -> None:
    """Model and prompts."""
    tiny.make_teacher(folder / "model")
    tiny.write_prompts(folder / "prompts.jsonl", PROMPTS)


def settings(folder: Path) -> list[str]:
    return [
        f"model={folder}/model",
        f"prompts={folder}/prompts.jsonl",
        f"cache={folder}/dataset",
        f"prompts_per_shard={PER_SHARD}",
        f"sampling.samples={SAMPLES}",
        "sampling.max_tokens=32",
        "engine.max_num_seqs=4",
        "keep_text=false",
    ]


def faults(folder: Path) -> list[str]:
    """What is wrong with the rows of the finished dataset; those that it names as rejected may be missing."""
    return faults_of(open_dataset(str(folder / "dataset")))


def faults_of(dataset: Dataset) -> list[str]:
    """The same for one that lies elsewhere."""
    rejected = {row.uid for shard in dataset.shards for row in shard.rejected}
    expected = {f"p{prompt:03d}/{sample}" for prompt in range(PROMPTS) for sample in range(SAMPLES)} - rejected
    rows = rows_of(dataset)
    wrong = [f"{uid} is missing" for uid in sorted(expected - {row.uid for row in rows})]
    if [row.uid for row in rows] != sorted(row.uid for row in rows):
        wrong.append("the rows are not in their order")
    wrong += [f"{row.uid} stands twice" for row in rows if sum(other.uid == row.uid for other in rows) > 1]
    return wrong + [f"{row.uid} holds something else" for row in rows if not _is_right(row)]


def rows_of(dataset: Dataset) -> list[Rollout]:
    return [row for shard in range(dataset.num_shards) for row in to_rows(dataset.read_shard(shard))]


def rejected_of(folder: Path) -> Mapping[str, str]:
    """Uid and reason of the rows that the dataset names as rejected."""
    return {row.uid: row.reason for shard in open_dataset(str(folder / "dataset")).shards for row in shard.rejected}


def _is_right(row: Rollout) -> bool:
    made = completion(GenerateRequest(None, [], seed_of(0, row.prompt_id, row.sample_idx), row.uid))
    return row.completion_ids.tolist() == made.completion_ids.tolist() and bool(
        (row.rollout_logprobs == made.logprobs).all()
    )


def main(folder: Path, *more: str) -> None:
    config = load_section(Generate, None, "rollouts", [*settings(folder), *more])
    box = Box(slots(config.fleet, config.engine), folder / "logs", "tests.precompute.fleet.puppet")
    make_rollouts("rollouts", config, load_prompts(config.prompts, limit=config.limit), launcher=box)


if __name__ == "__main__":
    sys.exit(cli.guard(lambda: main(Path(sys.argv[1]), *sys.argv[2:])))
