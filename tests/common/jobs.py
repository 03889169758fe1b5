"""Jobs that make a dataset in a process of their own, as commands do; every worker makes other rows."""

import subprocess

import pyarrow as pa

from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.schema import to_rows
from common.storage import Store
from tests.common import scripts
from tests.common.rows import make_plan, make_table, same_rows

JOB = """
import sys
from common.cli import guard
from tests.common.jobs import make
sys.exit(guard(lambda: make(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
"""


def shard_of(worker: int, shard: int) -> pa.Table:
    """The shard as this worker makes it."""
    return make_table(rows=3, first=1000 * worker + 10 * shard)


def make(url: str, worker: int, shards: int) -> None:
    """Commit what is left, from the first shard to the last, and finish the dataset."""
    writer = create_dataset(url, make_plan(shards))
    for shard in writer.pending():
        writer.commit(shard, shard_of(worker, shard))
    writer.finalize()


def start_job(url: str, *, worker: int = 1, shards: int = 3) -> subprocess.Popen[str]:
    """A job under way."""
    return scripts.start(JOB, url, str(worker), str(shards))


def run_job(url: str, *, worker: int = 1, shards: int = 3) -> subprocess.CompletedProcess[str]:
    """A job run to its end."""
    return scripts.run(JOB, url, str(worker), str(shards))


def maker(table: pa.Table, shard: int, workers: range = range(1, 3)) -> int:
    """The worker who made this shard; raises StopIteration when none did."""
    rows = to_rows(table)
    return next(worker for worker in workers if same_rows(rows, to_rows(shard_of(worker, shard))))


def makers(url: str, workers: range = range(1, 3)) -> list[int]:
    """Who made each shard of the finished dataset."""
    dataset = open_dataset(url)
    return [maker(dataset.read_shard(shard), shard, workers) for shard in range(dataset.num_shards)]


def names(url: str, prefix: str) -> list[str]:
    """Objects below a prefix."""
    return [entry.name for entry in Store(url).list(prefix)]
