import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cache.collect import collect
from common.cache.contents import list_contents, shard_of
from common.cache.copying import copy
from common.canonical import sha256
from common.dataset import open_dataset
from common.records import CARD, MANIFEST, PLAN, commit_key
from common.schema import to_table
from common.storage import PROBE, Store
from tests.cache.datasets import flip, lopd, make_dataset, names, orphan
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.common.scripts import ROOT
from tests.s3_server import S3Server

DIRECTIONS = ["local to s3", "s3 to local", "s3 to s3"]


@pytest.fixture
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(from, to), of the direction that the test is given."""
    kinds = request.param.split(" to ")
    s3 = request.getfixturevalue("s3") if "s3" in kinds else ""
    source, target = (
        f"{s3}/{name}" if kind == "s3" else str(tmp_path / name)
        for kind, name in zip(kinds, ("from", "to"), strict=True)
    )
    return source, target


def same_objects(source: str, target: str) -> bool:
    """Whether both hold the same bytes under the same names, orphans and probes aside."""
    here, there = Store(source), Store(target)
    digests = [
        {name: sha256(store.get(name)) for name in names(store) - {PROBE} if "orphan" not in name}
        for store in (here, there)
    ]
    return digests[0] == digests[1]


@pytest.mark.parametrize(
    "places",
    ["local to local", *(pytest.param(one, marks=pytest.mark.slow) for one in DIRECTIONS)],
    indirect=True,
)
def test_the_copy_is_the_same_dataset(places: tuple[str, str]) -> None:
    source, target = places
    digest = make_dataset(source, shards=5, topk=2).finalize()

    ran = lopd("cache", "copy", source, target)

    assert ran.code == 0
    assert f"manifest sha256 {digest}, the same at both ends" in ran.out
    assert same_objects(source, target)
    copied = open_dataset(target)
    assert copied.manifest_sha256 == digest
    assert [copied.read_shard(shard).equals(open_dataset(source).read_shard(shard)) for shard in range(5)] == [True] * 5


def test_what_is_there_is_not_copied_again(location: str, tmp_path: Path) -> None:
    source = str(tmp_path / "from")
    make_dataset(source, shards=4)
    assert lopd("cache", "copy", source, location, "--json").json["shards_copied"] == 4

    here = Store(location)
    before = here.list()
    again = lopd("cache", "copy", source, location, "--json").json
    assert (again["shards"], again["shards_copied"], again["bytes_copied"]) == (4, 0, 0)
    assert here.list() == before
    assert "nothing to do" in lopd("cache", "copy", source, location).out


@pytest.mark.parametrize(
    "lost", [MANIFEST, CARD, PLAN, commit_key(1), "a shard", "the middle of a shard", "all but plan and one shard"]
)
def test_a_copy_of_which_something_is_lost_is_made_whole(lost: str, tmp_path: Path) -> None:
    source, target = str(tmp_path / "from"), str(tmp_path / "to")
    make_dataset(source)
    lopd("cache", "copy", source, target)
    there = Store(target)
    shard = there.list("data")[1].name
    if lost == "a shard":
        there.remove(shard)
    elif lost == "the middle of a shard":
        there.put(shard, there.get(shard)[:-7])
    elif lost == "all but plan and one shard":
        for name in names(there) - {PLAN, shard}:
            there.remove(name)
    else:
        there.remove(lost)

    assert lopd("cache", "copy", source, target).code == 0
    assert same_objects(source, target)


def test_an_interrupted_copy_has_committed_what_it_copied(location: str, tmp_path: Path) -> None:
    """So that `gc`, which deletes what lost to a commit, leaves all of it."""
    target = str(tmp_path / "to")
    make_dataset(location, shards=12)
    flip(Store(location), Store(location).list("data")[11].name)
    assert lopd("cache", "copy", location, target).code == 65
    there = list_contents(Store(target))
    assert len(there.commits) >= 4 and {shard_of(name) for name in there.data} == {*there.commits}
    assert [one.garbage for one in collect(target, 0.0, delete=True)] == [()]


ALTERED = [MANIFEST, PLAN, commit_key(1), "a shard", "all of these"]


@pytest.mark.parametrize("altered", ALTERED)
def test_a_copy_in_which_a_bit_flipped_is_repaired(altered: str, location: str, tmp_path: Path) -> None:
    source = str(tmp_path / "from")
    digest = make_dataset(source).finalize()
    lopd("cache", "copy", source, location)
    there = Store(location)
    shard = there.list("data")[1].name
    broken = (
        [MANIFEST, PLAN, commit_key(1), shard] if altered == "all of these" else [altered.replace("a shard", shard)]
    )
    for name in broken:
        flip(there, name)

    refused = lopd("cache", "copy", source, location)
    if altered != "a shard":
        assert refused.code == 65 and "was altered" in refused.err and "--repair" in refused.err
    repaired = lopd("cache", "copy", source, location, "--repair", "--json")

    assert repaired.code == 0
    assert repaired.json["shards_copied"] == (shard in broken)
    assert {*repaired.json["altered_records"]} == {*broken} - {shard}
    assert same_objects(source, location)
    assert open_dataset(location).manifest_sha256 == digest


def test_a_sound_copy_needs_no_repair(location: str, tmp_path: Path) -> None:
    source = str(tmp_path / "from")
    make_dataset(source)
    lopd("cache", "copy", source, location)
    before = Store(location).list()
    ran = lopd("cache", "copy", source, location, "--repair")
    assert ran.code == 0 and "nothing to do" in ran.out
    assert Store(location).list() == before


def test_another_dataset_is_not_repaired_into_this_one(tmp_path: Path) -> None:
    source, target = str(tmp_path / "from"), str(tmp_path / "to")
    make_dataset(source)
    make_dataset(target, finish=False, table=lambda shard: _other_table(shard))
    flip(Store(target), commit_key(0))
    before = {name: Store(target).get(name) for name in names(Store(target))}
    ran = lopd("cache", "copy", source, target, "--repair")
    assert ran.code == 65 and "committed here with another content" in ran.err
    assert {name: Store(target).get(name) for name in names(Store(target))} == before


def test_a_card_that_differs_is_replaced_by_a_repair_alone(tmp_path: Path) -> None:
    source, target = str(tmp_path / "from"), str(tmp_path / "to")
    make_dataset(source)
    lopd("cache", "copy", source, target)
    Store(target).put(CARD, b"ours")
    lopd("cache", "copy", source, target)
    assert Store(target).get(CARD) == b"ours"
    assert lopd("cache", "copy", source, target, "--repair", "--json").json["altered_records"] == [CARD]
    assert same_objects(source, target)


def test_a_dataset_is_not_repaired_from_itself(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    ran = lopd("cache", "copy", str(tmp_path), str(tmp_path), "--repair")
    assert ran.code == 64 and "cannot be repaired from itself" in ran.err


def test_a_card_that_is_lost_is_made_anew(tmp_path: Path) -> None:
    source, target = str(tmp_path / "from"), str(tmp_path / "to")
    make_dataset(source)
    card = Store(source).get(CARD)
    Store(source).remove(CARD)
    assert lopd("cache", "copy", source, target).code == 0
    assert Store(target).get(CARD) == card


def test_orphans_stay_behind(tmp_path: Path) -> None:
    source, target = str(tmp_path / "from"), str(tmp_path / "to")
    make_dataset(source)
    left = orphan(Store(source), 1)
    Store(source).put("notes.txt", b"mine")
    assert lopd("cache", "copy", source, target).code == 0
    assert not names(Store(target)) & {left, "notes.txt"}


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda source, target: None, "no finished dataset here"),
        (lambda source, target: make_dataset(source, committed=[0]), "no finished dataset here"),
        (lambda source, target: make_dataset(source) and make_dataset(target, vocab_size=101), "another finished"),
        (
            lambda source, target: make_dataset(source) and make_dataset(target, committed=[], vocab_size=101),
            "differs in vocab_size",
        ),
        (
            lambda source, target: (
                make_dataset(source)
                and make_dataset(target, committed=[], created={"owner": "bob", "at": "2026-02-02", "by": "x"})
            ),
            "another dataset of the same plan was begun here by bob",
        ),
        (
            lambda source, target: (
                make_dataset(source) and make_dataset(target, finish=False, table=lambda shard: _other_table(shard))
            ),
            "the shard is committed here with another content",
        ),
    ],
)
def test_what_is_not_to_be_copied_is_refused(tmp_path: Path, prepare, words: str) -> None:
    source, target = str(tmp_path / "from"), str(tmp_path / "to")
    prepare(source, target)
    finished = MANIFEST in names(Store(target))

    ran = lopd("cache", "copy", source, target)

    assert (ran.code, ran.out) == (65, "") and words in ran.err
    assert (MANIFEST in names(Store(target))) == finished


def _other_table(shard: int):
    from tests.common.rows import make_table

    return make_table(rows=2, first=1000 + shard)


@pytest.mark.parametrize("target", ["/run/copy", "/run/data", ""])
def test_a_place_within_the_other_is_refused(tmp_path: Path, target: str) -> None:
    location = str(tmp_path)
    make_dataset(f"{location}/run")
    before = names(Store(location))
    ran = lopd("cache", "copy", f"{location}/run", f"{location}{target}")
    assert ran.code == 64 and "one of the two places lies within the other" in ran.err
    assert names(Store(location)) == before


def test_a_place_within_the_other_is_refused_by_whatever_link_one_comes_there(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "run"))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    ran = lopd("cache", "copy", str(tmp_path / "run"), str(tmp_path / "link" / "copy"))
    assert ran.code == 64 and "one of the two places lies within the other" in ran.err


def test_a_place_that_only_begins_alike_is_another(tmp_path: Path) -> None:
    make_dataset(str(tmp_path / "run"))
    assert lopd("cache", "copy", str(tmp_path / "run"), str(tmp_path / "run2")).code == 0


def test_a_copy_onto_itself_has_nothing_to_do(tmp_path: Path) -> None:
    digest = make_dataset(str(tmp_path / "run")).finalize()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = names(Store(str(tmp_path / "run")))
    for target in ("run", "link"):
        ran = lopd("cache", "copy", str(tmp_path / "run"), str(tmp_path / target))
        assert ran.code == 0 and "nothing to do" in ran.out and digest in ran.out
    assert names(Store(str(tmp_path / "run"))) == before


def test_an_altered_shard_is_named_and_the_copy_is_not_finished(location: str, tmp_path: Path) -> None:
    target = str(tmp_path / "to")
    make_dataset(location)
    altered = Store(location).list("data")[1].name
    flip(Store(location), altered)

    ran = lopd("cache", "copy", location, target)

    assert ran.code == 65 and altered in ran.err and "sha256 differs" in ran.err
    assert MANIFEST not in names(Store(target)) and altered not in names(Store(target))


@pytest.mark.slow
def test_a_reader_copies_to_a_place_of_his_own_and_not_back(
    s3: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3)
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    assert lopd("cache", "copy", s3, str(tmp_path / "mine")).code == 0
    ran = lopd("cache", "copy", str(tmp_path / "mine"), f"{s3}-shared")
    assert ran.code == 74 and "no permission" in ran.err


@pytest.mark.slow
def test_credentials_that_expire_cost_what_is_left_and_the_same_command_goes_on(
    s3: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = make_dataset(s3, shards=12).finalize()
    expired = [
        Fault(Kind.REFUSE, path=f"data/0000{shard:02}", status=400, code="ExpiredToken") for shard in range(9, 12)
    ]
    with fault_proxy(s3_server.endpoint, Faults(*expired)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ran = lopd("cache", "copy", s3, str(tmp_path / "to"))
        assert ran.code == 75 and "Renew, then run again" in ran.err
        assert MANIFEST not in names(Store(str(tmp_path / "to")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    again = lopd("cache", "copy", s3, str(tmp_path / "to"), "--json").json
    assert again["manifest_sha256"] == digest and 3 <= again["shards_copied"] < 12
    assert same_objects(s3, str(tmp_path / "to"))


@pytest.mark.slow
def test_no_bit_that_flips_on_the_way_arrives(
    s3: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3, shards=12)
    faults = Faults(Fault(Kind.FLIP, path="/data/", chance=0.25), Fault(Kind.ALTER, path="/to/", chance=0.1), seed=4)
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for target in (str(tmp_path / "to"), f"{s3}-copies/to"):
            while lopd("cache", "copy", s3, target).code:
                assert faults.injected.total() < 200
    assert faults.injected[Kind.FLIP] >= 3
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    assert same_objects(s3, str(tmp_path / "to")) and same_objects(s3, f"{s3}-copies/to")


@pytest.mark.slow
@pytest.mark.parametrize("places", DIRECTIONS, indirect=True)
def test_a_copy_that_is_killed_again_and_again_goes_on(places: tuple[str, str]) -> None:
    source, target = places
    shards = 80
    digest = make_dataset(source, shards=shards).finalize()
    there, killed = Store(target), 0
    for threshold in (1, shards // 2, shards + 1, shards + shards // 2):  # objects there: a shard, then its commit
        process = subprocess.Popen([sys.executable, "-m", "common.cli", "cache", "copy", source, target], cwd=ROOT)
        while process.poll() is None and len(there.list()) < threshold:
            time.sleep(0.002)
        process.kill()
        killed += process.wait() == -signal.SIGKILL and MANIFEST not in names(there)

    assert killed >= 2  # the others were faster than this test
    last = lopd("cache", "copy", source, target, "--json")
    assert last.code == 0 and last.json["manifest_sha256"] == digest
    assert last.json["shards_copied"] < shards
    assert same_objects(source, target)
    assert open_dataset(target).num_rows == 3 * shards


def test_rejected_rows_and_shards_without_rows_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    writer = make_dataset(source, shards=2, committed=[0])
    writer.commit(1, to_table([]), {}, {"p10/0": "engine died"})
    writer.finalize()
    copy(source, target)
    assert copy(source, target, repair=True).altered_records == ()
    for entry in Store(source).list():
        assert Store(target).get(entry.name) == Store(source).get(entry.name)
    assert open_dataset(target).shards[1].rejected == open_dataset(source).shards[1].rejected != ()
