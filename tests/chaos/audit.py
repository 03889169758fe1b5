"""What became of the data: every object of every dataset, read from the server itself and judged by its content."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import s3fs

from common.errors import LopdError
from tests.chaos.content import Round, Verdict
from tests.chaos.member import WRITERS
from tests.s3_server import ADMIN


@dataclass
class Tally:
    """Shards that were asked for, and what is wrong with them, each entry once."""

    shards: int = 0
    lost: set[str] = field(default_factory=set)
    """Shards of which a reader does not get all rows."""
    duplicated: set[str] = field(default_factory=set)
    """Shards committed twice, and rows that stand twice."""
    corrupt: set[str] = field(default_factory=set)
    """What a reader, of the run or now, accepted although no worker made it; and pins of what is not there."""
    orphans: int = 0
    """Objects of dead workers; they harm nobody."""
    reads: int = 0
    refused: int = 0
    """Reads that ended in an error of ours, which is how it should be."""

    @property
    def clean(self) -> bool:
        """Whether nothing is lost, duplicated or corrupt."""
        return not (self.lost or self.duplicated or self.corrupt)


def audit(writer: str, rounds: Sequence[Round], endpoint: str, folder: Path) -> Tally:
    """Judge all datasets as they lie on the server, and all that the readers of the run were given."""
    tally = Tally()
    access_key, secret = ADMIN
    fs = s3fs.S3FileSystem(key=access_key, secret=secret, endpoint_url=endpoint, skip_instance_cache=True)
    said = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    for place in rounds:
        objects = _objects(fs, place)
        _count_stored(tally, writer, place, objects)
        _count_opened(tally, writer, place)
        pin = WRITERS[writer].pin(objects)
        pins = [line["pin"] for line in said if "pin" in line and line["round"] == place.number]
        tally.corrupt |= {
            f"dataset {place.number} was pinned as {other}, which is not there" for other in pins if other != pin
        }
    _count_reads(tally, [line for line in said if "verdict" in line])
    return tally


def _objects(fs: s3fs.S3FileSystem, place: Round) -> dict[str, bytes]:
    root = place.url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): cast(bytes, fs.cat_file(path)) for path in fs.find(root)}


def _count_stored(tally: Tally, writer: str, place: Round, objects: Mapping[str, bytes]) -> None:
    """By the bare objects, without any code of ours that reads datasets."""
    committed = WRITERS[writer].committed(objects)
    tally.shards += place.shards
    tally.orphans += len({name for name in objects if name.startswith("data/")} - {file for _, file in committed})
    whole: set[int] = set()
    uids: Counter[str] = Counter()
    for shard, file in committed:
        try:
            table = pq.read_table(pa.BufferReader(objects[file]))
        except (pa.ArrowException, OSError):
            continue
        verdict = place.judge(shard, table)
        uids.update(table["uid"].to_pylist())
        whole |= {shard} if verdict in (Verdict.RIGHT, Verdict.TWICE) else set()
        tally.corrupt |= {_name(place, shard)} if verdict == Verdict.WRONG else set()
    tally.lost |= {_name(place, shard) for shard in range(place.shards) if shard not in whole}
    tally.duplicated |= {f"row {uid}" for uid, count in uids.items() if count > 1}
    commits = Counter(shard for shard, _ in committed)
    tally.duplicated |= {_name(place, shard) for shard, count in commits.items() if count > 1}


def _count_opened(tally: Tally, writer: str, place: Round) -> None:
    """Through the reader of the writer, from the server itself, which fails no more."""
    try:
        _, read = WRITERS[writer].reader(place)
    except LopdError:
        tally.lost |= {_name(place, shard) for shard in range(place.shards)}
        return
    for shard in range(place.shards):
        try:
            verdict = place.judge(shard, read(shard))
        except (LopdError, pa.ArrowException, OSError):
            verdict = Verdict.SHORT
        tally.lost |= {_name(place, shard)} if verdict == Verdict.SHORT else set()
        tally.corrupt |= {_name(place, shard)} if verdict == Verdict.WRONG else set()


def _count_reads(tally: Tally, reads: Sequence[Mapping[str, object]]) -> None:
    verdicts = Counter(str(read["verdict"]) for read in reads)
    tally.reads, tally.refused = len(reads), verdicts["refused"]
    tally.corrupt |= {
        f"dataset {read['round']} shard {read['shard']}, {read['verdict']} in read {index}"
        for index, read in enumerate(reads)
        if read["verdict"] not in ("refused", Verdict.RIGHT)
    }


def _name(place: Round, shard: int) -> str:
    return f"dataset {place.number} shard {shard}"
