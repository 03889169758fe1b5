"""A dataset passes from one who makes it to those who may only read it: identities of deploy/iam, on a real server."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.card import URL
from common.dataset import Dataset, open_dataset
from common.dataset_writer import create_dataset
from common.errors import StorageError
from common.storage import CLOCK, Store
from tests.common.rows import make_plan, make_shard
from tests.deploy.identities import Team, make_team
from tests.deploy.shell import run
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow
SHARDS = 3
Become = Callable[[str], None]


@pytest.fixture(scope="module")
def team(s3_server: S3Server) -> Team:
    """A bucket with a producer, a reader and a collector; every test takes a prefix of its own."""
    return make_team(s3_server)


@pytest.fixture
def become(team: Team, monkeypatch: pytest.MonkeyPatch) -> Become:
    """Makes this process one of the team's identities."""

    def switch(role: str) -> None:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in team.environment(role).items():
            monkeypatch.setenv(name, value)

    return switch


@pytest.fixture
def shared(team: Team, become: Become, request: pytest.FixtureRequest) -> Dataset:
    """A dataset that the producer made, opened by the reader, who this process is from now on."""
    url = f"{team.url}/{request.node.name}/scored"
    become("producer")
    writer = create_dataset(url, make_plan(SHARDS, prompts_per_shard=3))
    for shard in writer.shards_left():
        writer.commit(shard, make_shard(shard))
    writer.finalize()
    become("reader")
    return open_dataset(url)


def test_a_producer_makes_resumes_and_finishes_a_dataset(team: Team, become: Become) -> None:
    become("producer")
    url = f"{team.url}/made"

    create_dataset(url, make_plan(SHARDS)).commit(1, make_shard(1))
    resumed = create_dataset(url, make_plan(SHARDS))
    assert resumed.pending() == [0, 2]
    for shard in resumed.shards_left():
        resumed.commit(shard, make_shard(shard))
    resumed.finalize()

    assert open_dataset(url).read_shard(1).equals(make_shard(1))


def test_a_producer_cannot_delete_what_it_made(team: Team, become: Become, shared: Dataset) -> None:
    become("producer")
    store = Store(shared.url)
    names = {entry.name for entry in store.list()}

    for name in sorted(names):
        with pytest.raises(StorageError, match="no permission to delete"):
            store.remove(name)
    refused = team.client("producer").delete_objects(
        Bucket=team.bucket, Delete={"Objects": [{"Key": f"{shared.url.split('/', 3)[3]}/{name}"} for name in names]}
    )
    assert {error["Code"] for error in refused["Errors"]} == {"AccessDenied"}
    assert {entry.name for entry in store.list()} == names


def test_a_producer_has_no_business_outside_its_prefix_nor_with_the_bucket(team: Team, become: Become) -> None:
    become("producer")

    with pytest.raises(StorageError, match="no permission to write"):
        Store(f"s3://{team.bucket}/elsewhere").put("object", b"data")
    with pytest.raises(StorageError, match="no permission to create"):
        create_dataset(f"s3://{team.bucket}/elsewhere/run", make_plan(SHARDS))
    client = team.client("producer")
    for act in (
        lambda: client.put_bucket_policy(Bucket=team.bucket, Policy="{}"),
        lambda: client.delete_bucket(Bucket=team.bucket),
        lambda: client.put_bucket_versioning(Bucket=team.bucket, VersioningConfiguration={"Status": "Suspended"}),
    ):
        with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
            act()


def test_a_reader_reads_all_of_it(shared: Dataset) -> None:
    assert shared.plan["created"]["owner"] == "ann"
    for shard in range(SHARDS):
        assert shared.read_shard(shard).equals(make_shard(shard))


def test_a_reader_cannot_write(shared: Dataset) -> None:
    store = Store(shared.url)
    before = store.list()

    for write in (
        lambda: store.put("README.md", b"other"),
        lambda: store.put_new("note", b"mine"),
        lambda: store.remove("MANIFEST.json"),
        lambda: create_dataset(f"{shared.url}-mine", make_plan(SHARDS)),
    ):
        with pytest.raises(StorageError, match="no permission"):
            write()
    assert store.list() == before


def test_datasets_and_duckdb_read_it_with_the_variables_of_aws_alone(
    team: Team, shared: Dataset, tmp_path: Path
) -> None:
    card = Store(shared.url).get("README.md").decode()
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    streamed = 'print(load_dataset("parquet", data_files=files, split="train", streaming=True).take(9).to_list())'
    script = "\n".join([*blocks, "print(rows.to_list())", streamed]).replace(URL, shared.url)

    done = run([sys.executable, "-c", script], team.environment("reader"), tmp_path)

    assert done.returncode == 0, done.stderr
    assert re.search(rf"stop\W+{shared.num_rows}\b", done.stdout)
    loaded, streamed = (ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("[{"))
    assert loaded == streamed == [row for shard in range(SHARDS) for row in make_shard(shard).to_pylist()]


def test_what_lies_in_the_bucket_holds_no_credentials(team: Team, shared: Dataset) -> None:
    store = Store(shared.url)
    stored = b"".join(data for _, data in store.get_many([entry.name for entry in store.list()]))

    assert shared.manifest["dataset_id"].encode() in stored
    assert not any(text.encode() in stored for key in team.keys.values() for text in key)


def test_the_fullest_log_holds_no_credentials(team: Team, shared: Dataset, tmp_path: Path) -> None:
    done = run(["lopd", "-vv", "cache", "copy", shared.url, "mine"], team.environment("reader"), tmp_path)

    assert done.returncode == 0 and "copied data/" in done.stderr
    assert not any(text in done.stderr + done.stdout for text in team.keys["reader"])


def test_a_reader_copies_it_out_and_not_in(team: Team, shared: Dataset, tmp_path: Path) -> None:
    reader = team.environment("reader")
    out = run(["lopd", "cache", "copy", shared.url, "mine"], reader, tmp_path)
    into = run(["lopd", "cache", "copy", "mine", f"{team.url}/into"], reader, tmp_path)

    assert out.returncode == 0, out.stderr
    assert open_dataset(str(tmp_path / "mine")).manifest_sha256 == shared.manifest_sha256
    assert into.returncode == 74
    assert into.stderr.startswith("error: no permission to create") and into.stderr.count("\n") == 1


def test_the_collector_alone_deletes_and_only_what_nothing_names(team: Team, shared: Dataset, tmp_path: Path) -> None:
    orphan, command = f"data/000001-{'0' * 16}.parquet", ["lopd", "cache", "gc", shared.url, "--older-than", "0s"]
    bucket, prefix = team.bucket, shared.url.split("/", 3)[3]
    team.client("producer").put_object(Bucket=bucket, Key=f"{prefix}/{orphan}", Body=b"of a worker that was killed")
    before = {entry.name for entry in Store(shared.url).list()}

    refused = run([*command, "--delete"], team.environment("producer"), tmp_path)
    assert refused.returncode != 0 and "no permission to delete" in refused.stdout
    assert orphan in {entry.name for entry in Store(shared.url).list("data")}
    done = run([*command, "--delete"], team.environment("collector"), tmp_path)

    assert done.returncode == 0, done.stdout
    left = {entry.name for entry in Store(shared.url).list()}
    assert {name for name in left if not name.endswith(CLOCK)} == before - {orphan}  # the producer's look at the clock
    for name in ("MANIFEST.json", "plan.json", "commits/000000.json", "README.md"):
        collector = team.client("collector")
        with pytest.raises(collector.exceptions.ClientError, match="AccessDenied"):
            collector.delete_object(Bucket=bucket, Key=f"{prefix}/{name}")
