"""What became of the datasets of boxes that vanished, beside those of a run that nobody disturbed."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.dataset import open_dataset
from common.schema import to_rows
from tests.common.faults import Faults

EXAMPLES = 5
"""Of each kind of damage, so many are named."""
PROMPTS, SAMPLES, PER_SHARD = 40, 3, 2
POISON = {"rollouts": "p007/1", "scored": "p020/0"}
"""Rows that puppets die of, by dataset; vLLM dies of none."""


@dataclass
class Findings:
    """What happened, and what is wrong with what came of it."""

    blows: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    rounds: int = 0
    orphans: int = 0
    """Processes that outlived their box."""
    lost: set[str] = field(default_factory=set)
    duplicated: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    """Rows that hold something else than an undisturbed run's, shards of other bytes, rows rejected without reason."""
    wrong: list[str] = field(default_factory=list)
    """The ends of the logs of boxes that ended as they must not."""

    @property
    def clean(self) -> bool:
        return not (self.orphans or self.lost or self.duplicated or self.corrupt or self.wrong)

    @property
    def kills(self) -> int:
        return sum(self.blows.values())


def audit(found: Findings, url: str, undisturbed: str, poison: Mapping[str, str]) -> None:
    """Judge both datasets of a round beside those of a run that nobody disturbed."""
    for name in ("rollouts", "scored"):
        here, there = open_dataset(f"{url}/{name}"), open_dataset(f"{undisturbed}/{name}")
        found.shards += here.num_shards
        rows = [row for shard in range(here.num_shards) for row in to_rows(here.read_shard(shard))]
        counts = Counter(row.uid for row in rows)
        gone = {*poison.values()} if name == "scored" else {*poison.values()} - {poison.get("scored", "")}
        expected = [f"p{prompt:03d}/{sample}" for prompt in range(PROMPTS) for sample in range(SAMPLES)]
        found.lost |= {f"{here.url} {uid}" for uid in expected if uid not in counts and uid not in gone}
        found.duplicated |= {f"{here.url} {uid}" for uid, count in counts.items() if count > 1}
        if list(counts) != [uid for uid in expected if uid in counts]:
            found.corrupt.add(f"{here.url}: rows out of order")
        rejected = {row.uid for shard in here.shards for row in shard.rejected}
        if rejected != ({poison[name]} if name in poison else set()):
            found.corrupt.add(f"{here.url}: rejected {sorted(rejected)}")
        found.corrupt |= {
            f"{here.url} shard {ours.shard}: other bytes than those of an undisturbed run"
            for ours, theirs in zip(here.shards, there.shards, strict=True)
            if ours.sha256 != theirs.sha256 or hashlib.sha256(here.store.get(ours.file)).hexdigest() != ours.sha256
        }


def table(found: Findings, faults: Faults, seconds: float) -> str:
    """The run in lines of two columns, and what to look at when it went wrong."""
    rows = [("datasets", 2 * found.rounds), ("shards", found.shards), ("blows", found.kills)]
    rows += [(f"  {name}", count) for name, count in sorted(found.blows.items())]
    rows += [(f"command {how}", count) for how, count in sorted(found.ends.items())]
    rows += [("requests", len(faults.requests)), ("  that failed", sum(faults.injected.values()))]
    rows += [("processes left behind", found.orphans), ("lost", len(found.lost))]
    rows += [("duplicated", len(found.duplicated)), ("corrupt", len(found.corrupt)), ("seconds", round(seconds))]
    lines = [f"  {name:<50} {count:>8}" for name, count in rows]
    damage = [sorted(found.lost), sorted(found.duplicated), sorted(found.corrupt), found.wrong]
    lines += [f"  {line}" for kind in damage for line in kind[:EXAMPLES]]
    return "\n".join(lines)
