"""The same rollouts in four layouts: ours, and what else one would write.

Every layout keeps the prompt, the completion's ids, both log-prob columns and the text. Ours is the dataset as workers
commit it and trainers read it, every check on; the others check nothing. A layout first *holds* the rows as a program
of its kind does when it comes to writing (we are handed arrays, who asks a server in JSON is handed lists of numbers);
reading ends where the layout's own reader hands over to a trainer.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.schema import Rollout, to_rows, to_table

IDS, ROLLOUT, TEACHER = "completion_ids", "rollout_logprobs", "teacher_logprobs"
LEAVES = (IDS, ROLLOUT, TEACHER)
Plan = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How one kind of program keeps rollouts, in numbered files under one folder."""

    title: str
    hold: Callable[[Iterable[Rollout]], Any]
    writer: Callable[[Path, Plan], Callable[[int, Any], None]]
    """Folder and plan -> what writes the file of a number; the plan says how many there will be."""
    reader: Callable[[Path], Callable[[int], Any]]
    """Folder -> what reads the file of a number."""
    leaf_bytes: Callable[[Path], dict[str, int]]
    """Stored bytes of a file: in all, and of each of `LEAVES`."""
    by_shard: bool = False
    """Whether a large dataset is many files, written and read one at a time, or one file."""

    def files(self, folder: Path) -> list[Path]:
        """The files with the rows."""
        return sorted((folder / "data" if self.by_shard else folder).iterdir())


def _our_writer(folder: Path, plan: Plan) -> Callable[[int, Sequence[Rollout]], None]:
    writer = create_dataset(str(folder), dict(plan))

    def write(number: int, rows: Sequence[Rollout]) -> None:
        writer.commit(number, to_table(rows, plan["topk"]))
        if number == plan["shards"] - 1:
            writer.finalize()

    return write


def _our_reader(folder: Path) -> Callable[[int], list[Rollout]]:
    dataset = open_dataset(str(folder))
    return lambda number: to_rows(dataset.read_shard(number))


def parquet_bytes(file: Path) -> dict[str, int]:
    """Bytes of a Parquet file: `total`, and compressed bytes by the last name of each column's path."""
    footer, found = pq.read_metadata(file), {"total": file.stat().st_size}
    for group in range(footer.num_row_groups):
        for leaf in range(footer.num_columns):
            column = footer.row_group(group).column(leaf)
            name = column.path_in_schema.split(".list.")[0].rpartition(".")[2]
            found[name] = found.get(name, 0) + column.total_compressed_size
    return found


def _nested(rows: Iterable[Rollout]) -> list[dict[str, Any]]:
    """A dict of dicts a row, of Python numbers; the rollout log-probs, which the paper does not store, added."""
    return [
        {
            "prompt": [{"role": "user", "content": row.prompt}],
            "label": "",
            "metadata": {
                "response": row.completion,
                "response_ids": row.completion_ids.tolist(),
                "loss_mask": [1] * len(row.completion_ids),
                "response_length": len(row.completion_ids),
                "rollout_log_probs": row.rollout_logprobs.tolist(),
                "teacher_log_probs": _scored(row).tolist(),
            },
        }
        for row in rows
    ]


def _nested_writer(folder: Path, plan: Plan) -> Callable[[int, list[dict[str, Any]]], None]:
    import pandas

    return lambda number, rows: pandas.DataFrame(rows).to_parquet(folder / f"{number}.parquet")


def _nested_reader(folder: Path) -> Callable[[int], list[Any]]:
    import pandas

    def read(number: int) -> list[Any]:
        records: list[Any] = pandas.read_parquet(folder / f"{number}.parquet").to_dict("records")
        for record in records:
            metadata = record["metadata"]
            for name in ("response_ids", "loss_mask"):
                metadata[name] = [int(value) for value in metadata[name]]
            for name in ("rollout_log_probs", "teacher_log_probs"):
                metadata[name] = [float(value) for value in metadata[name]]
        return records

    return read


def _nested_bytes(file: Path) -> dict[str, int]:
    found = parquet_bytes(file)
    return {
        "total": found["total"],
        IDS: found["response_ids"] + found["loss_mask"],
        ROLLOUT: found["rollout_log_probs"],
        TEACHER: found["teacher_log_probs"],
    }


def _flat(rows: Iterable[Rollout]) -> list[dict[str, Any]]:
    return [
        {
            "uid": row.uid,
            "prompt": row.prompt,
            "completion": row.completion,
            "finish_reason": row.finish_reason,
            "prompt_ids": row.prompt_ids.tolist(),
            IDS: row.completion_ids.tolist(),
            ROLLOUT: row.rollout_logprobs.tolist(),
            TEACHER: _scored(row).tolist(),
        }
        for row in rows
    ]


def _lines_writer(folder: Path, plan: Plan) -> Callable[[int, list[dict[str, Any]]], None]:
    def write(number: int, rows: list[dict[str, Any]]) -> None:
        with open(folder / f"{number}.jsonl", "w") as lines:
            for row in rows:
                lines.write(json.dumps(row) + "\n")

    return write


def _lines_reader(folder: Path) -> Callable[[int], list[dict[str, Any]]]:
    def read(number: int) -> list[dict[str, Any]]:
        with open(folder / f"{number}.jsonl") as lines:
            return [json.loads(line) for line in lines]

    return read


def _lines_bytes(file: Path) -> dict[str, int]:
    with open(file) as lines:
        rows = [json.loads(line) for line in lines]
    leaves = {name: sum(len(json.dumps(row[name])) for row in rows) for name in LEAVES}
    return {"total": file.stat().st_size, **leaves}


def _default_writer(folder: Path, plan: Plan) -> Callable[[int, Sequence[Rollout]], None]:
    return lambda number, rows: pq.write_table(to_table(rows), folder / f"{number}.parquet")


def _default_reader(folder: Path) -> Callable[[int], list[Rollout]]:
    return lambda number: to_rows(pq.read_table(folder / f"{number}.parquet"))


def _scored(row: Rollout) -> np.ndarray:
    assert row.teacher_logprobs is not None, "the dataset is of kind `scored`, whose rows are checked when read"
    return row.teacher_logprobs


LAYOUTS = {
    "ours": Layout("ours, every check on", list, _our_writer, _our_reader, parquet_bytes, by_shard=True),
    "nested": Layout("paper: nested dicts by pandas", _nested, _nested_writer, _nested_reader, _nested_bytes),
    "jsonl": Layout("JSONL", _flat, _lines_writer, _lines_reader, _lines_bytes),
    "default": Layout("pyarrow's defaults", list, _default_writer, _default_reader, parquet_bytes),
}
