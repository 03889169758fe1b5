"""What is kept when a loss or the gradient is not finite: the rows of that step, as the model saw them.

    <output>/failures/step-000123-rank0.parquet   one file a rank, one row a rollout of its share of step 123

By then nothing can be asked again: the next attempt may have other weights. `pandas.read_parquet` opens it, and
`read_failure` here.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from common.errors import DataError, LopdError
from common.storage import Store
from common.urls import split_key
from trainer.batch import Batch
from trainer.header import Header
from trainer.world import World

FOLDER = "failures"
METADATA = b"lopd_failure"
"""Key of the file's metadata that holds the header: step, settings, dataset."""


class Seen(NamedTuple):
    """A micro-batch and what the model made of it, before any update."""

    batch: Batch
    student: Tensor  # (tokens,) nats
    losses: Tensor  # (tokens,) as they are summed: weighted where the mean is one per rollout


class NotFinite(DataError):
    """A loss or the gradient is not finite; raised on every rank, before the optimizer's step.

    `seen` holds the micro-batches of this rank, `uids` the rows at fault on all ranks, as far as they are known.
    """

    seen: Sequence[Seen] = ()
    uids: Sequence[str] = ()


@dataclass(frozen=True)
class Failure:
    """A file of a failed step, read back."""

    header: dict[str, Any]
    """What a checkpoint after this step would have said it is."""
    rows: pa.Table
    """uid, blamed, input_ids, completion_ids, rollout_logprobs, teacher_logprobs, student_logprobs, losses."""


def keep(error: NotFinite, header: Header, output: str, world: World) -> NotFinite:
    """Write this rank's rows of the step that `header` stands behind; called by all ranks.

    Returns:
        The same error, which also says where the rows are; one that could not be written hides nothing.
    """
    name = f"step-{header.step:06d}-rank{world.rank}.parquet"
    try:
        Store(output).child(FOLDER).put(name, _file(error, header))
        missing = ""
    except LopdError as failure:
        missing = f"; rank {world.rank} could not keep its rows: {failure.what}"
    lost = "".join(world.gather(missing))
    kept = f"{Store(output).url}/{FOLDER}/step-{header.step:06d}-rank*.parquet"
    told = NotFinite(f"step {header.step}: {error.what}{lost}", where=f"{error.where}; kept in {kept}", fix=error.fix)
    told.shared = True
    return told


def read_failure(place: str) -> Failure:
    """Open a file that `keep` wrote, by its path or URL."""
    url, name = split_key(place)
    table = pq.read_table(BytesIO(Store(url).get(name)))
    return Failure(json.loads((table.schema.metadata or {})[METADATA]), table)


def _file(error: NotFinite, header: Header) -> bytes:
    rows = [row for seen in error.seen for row in _rows(seen, set(error.uids))]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    buffer = BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(asdict(header))}), buffer, compression="zstd")
    return buffer.getvalue()


def _rows(seen: Seen, blamed: set[str]) -> list[dict[str, Any]]:
    batch = seen.batch
    starts = np.flatnonzero(batch.position_ids[0].cpu().numpy() == 0)
    whole = np.split(batch.input_ids[0].cpu().numpy(), starts[1:])
    counts = np.bincount(batch.row.cpu().numpy(), minlength=len(batch.uids))
    ends = np.cumsum(counts)[:-1]
    columns = {
        "completion_ids": batch.ids,
        "rollout_logprobs": batch.rollout,
        "teacher_logprobs": batch.teacher,
        "student_logprobs": seen.student,
        "losses": seen.losses,
    }
    split = {name: np.split(values.detach().cpu().numpy(), ends) for name, values in columns.items()}
    return [
        {"uid": uid, "blamed": uid in blamed, "input_ids": whole[row], **{name: split[name][row] for name in split}}
        for row, uid in enumerate(batch.uids)
    ]


SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("blamed", pa.bool_()),
        ("input_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        *[(f"{who}_logprobs", pa.list_(pa.float32())) for who in ("rollout", "teacher", "student")],
        ("losses", pa.list_(pa.float32())),
    ]
)
"""`input_ids` are prompt and completion together; every other list has one entry a token of the completion."""
