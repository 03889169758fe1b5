"""The cheap half of a verification: what plan, manifest, commits, card and listing say of each other."""

from dataclasses import dataclass, field

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from common.cache.contents import Contents
from common.cache.findings import Findings
from common.cache.transfer import in_parallel
from common.card import dataset_card
from common.errors import LopdError
from common.plans import Plan
from common.progress import followed, size, waiting
from common.records import CARD, Commit, Manifest, read_commit, read_manifest, read_plan
from common.rejected import rejected_lines
from common.storage import Store

READS_AT_ONCE = 16
NAMED = 3
"""Files of others that a note names."""
CARD_ROOM = 1 << 20
"""Bytes by which a card may have grown since it was written."""


@dataclass
class Records:
    """What could be read, and the commits that hold: the manifest's where there is one."""

    plan: Plan | None = None
    manifest: Manifest | None = None
    manifest_sha256: str | None = None
    commits: dict[int, Commit] = field(default_factory=dict)


def check_records(store: Store, contents: Contents, records: Records, findings: Findings) -> None:
    """Read all `records`; what is altered, missing or at odds with another becomes a finding."""
    try:
        records.plan = read_plan(store)
    except LopdError as error:
        findings.add_error(error)
    if contents.finished:
        _read_manifest(store, records, findings)
        records.commits = {commit.shard: commit for commit in (records.manifest.shards if records.manifest else ())}
    commits = _read_commits(store, contents, findings)
    records.commits = commits | records.commits
    _compare(records, commits, contents, findings)
    _check_card(store, contents, records, findings)


def check_listing(contents: Contents, records: Records, findings: Findings) -> set[int]:
    """Shards whose object is there, of the size that its commit says; the others become findings."""
    sound = set()
    for shard, commit in sorted(records.commits.items()):
        entry = contents.data.get(commit.file)
        if entry is None:
            findings.add(f"shard {shard}", f"{commit.file} is missing")
        elif entry.size != commit.bytes:
            findings.add(f"shard {shard}", f"{commit.file} has {entry.size} bytes, its commit says {commit.bytes}")
        else:
            sound.add(shard)
    return sound


def strangers(contents: Contents, records: Records) -> list[str]:
    """Notes on objects that are none of the dataset's: they harm nobody, but somebody may want to know."""
    named = {commit.file for commit in records.commits.values()}
    orphans = [entry for name, entry in contents.data.items() if name not in named]
    notes = []
    if orphans:
        total = sum(entry.size for entry in orphans)
        notes.append(f"{len(orphans)} orphans, {size(total)}, such as {orphans[0].name}: see `lopd cache gc`")
    if contents.others:
        some = ", ".join(entry.name for entry in contents.others[:NAMED])
        notes.append(f"{len(contents.others)} other files, such as {some}")
    return notes


def left_out(records: Records) -> list[str]:
    """Notes on the rows that were rejected."""
    rejected = [row for _, commit in sorted(records.commits.items()) for row in commit.rejected]
    return [f"rejected rows: {line}" for line in rejected_lines(rejected)]


def _read_manifest(store: Store, records: Records, findings: Findings) -> None:
    try:
        with waiting(f"reading {store.url}"):
            records.manifest, _, records.manifest_sha256 = read_manifest(store)
    except LopdError as error:
        findings.add_error(error)


def _read_commits(store: Store, contents: Contents, findings: Findings) -> dict[int, Commit]:
    """All commits that can be read, by shard."""

    def read(shard: int) -> Commit | LopdError:
        try:
            return read_commit(store, shard)
        except LopdError as error:
            return error

    read_all = in_parallel(read, sorted(contents.commits), READS_AT_ONCE)
    commits = {}
    for answer in followed(read_all, "reading commits", len(contents.commits), "commits"):
        if isinstance(answer, LopdError):
            findings.add_error(answer)
        else:
            commits[answer.shard] = answer
    return dict(sorted(commits.items()))


def _compare(records: Records, commits: dict[int, Commit], contents: Contents, findings: Findings) -> None:
    """Commits against plan and manifest."""
    if records.plan is not None:
        for shard in sorted(shard for shard in contents.commits if shard >= records.plan["shards"]):
            findings.add(f"shard {shard}", f"it is committed, but the plan has {records.plan['shards']} shards")
    if records.manifest is not None:
        for commit in records.manifest.shards:
            if commit.shard not in contents.commits:
                findings.add(f"shard {commit.shard}", "its commit is missing")
            elif commit.shard in commits and commits[commit.shard] != commit:
                keys = ", ".join(
                    name
                    for name in Commit.model_fields
                    if getattr(commits[commit.shard], name) != getattr(commit, name)
                )
                findings.add(f"shard {commit.shard}", f"commit and manifest differ in {keys}")


def _check_card(store: Store, contents: Contents, records: Records, findings: Findings) -> None:
    """The card has those who load the dataset by its name load the files of the manifest, and no others."""
    if contents.finished and CARD not in contents.records:
        findings.add(CARD, "the card is missing")
    elif records.manifest is not None and records.plan is not None:
        ours = dataset_card(records.plan, records.manifest.model_dump()).encode()
        try:
            theirs = store.get(CARD, at_most=len(ours) + CARD_ROOM)
        except LopdError as error:
            findings.add_error(error)
            return
        front = ours.partition(b"\n---\n")[0] + b"\n---\n"
        if not theirs.startswith(front) and _configs(theirs) != _configs(ours):
            findings.add(
                CARD, "it names other files than the manifest, and whoever loads the dataset by name reads those"
            )


def _configs(card: bytes) -> object:
    """What the front matter tells a loader to read, as the Hub's own library understands it; None for none."""
    try:
        found = REGEX_YAML_BLOCK.search(card.decode())
        front = yaml.safe_load(found.group(2)) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return front.get("configs") if isinstance(front, dict) else None
