"""All rows of a dataset, one row group after another, with progress."""

from collections.abc import Iterator

import pyarrow as pa

from common.dataset import Dataset
from common.progress import Progress


def row_groups(dataset: Dataset, label: str) -> Iterator[pa.Table]:
    """Every row, verified, in dataset order; one row group is in memory at a time."""
    with Progress(f"{label} {dataset.url}", dataset.num_rows, "tok") as progress:
        for shard in range(dataset.num_shards):
            for table in dataset.iter_row_groups(shard):
                yield table
                progress.advance(len(table), len(table["completion_ids"].combine_chunks().flatten()))
