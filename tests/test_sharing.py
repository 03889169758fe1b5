"""A dataset passes from one who makes it to those who may only read it: two identities on a real S3 server.

The commands of the documentation are run here as they stand.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from common.card import URL
from common.dataset import Dataset, open_dataset
from common.dataset_writer import create_dataset
from common.errors import StorageError
from common.storage import Store
from tests.common.rows import make_plan, make_shard
from tests.deploy.identities import Team, make_team
from tests.precompute import tiny
from tests.s3_server import ADMIN, S3Server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SHARDS = 3
ENGINE = {"DTYPE": "float32", "MAX_NUM_SEQS": "16", "CPU_KV_GIB": "0.1"}
SHORT = {
    "LOPD_ROLLOUTS__PROMPTS_PER_SHARD": "4",
    "LOPD_ROLLOUTS__SAMPLING__MAX_TOKENS": "16",
    "LOPD_OPD__DEVICE": "cpu",
    "LOPD_OPD__COMPUTE": "float32",
    "LOPD_OPD__TOKEN_BUDGET": "512",
    "LOPD_OPD__ROWS_PER_STEP": "8",
}
"""Settings that make the run of a page a matter of a minute; its commands stay as they are."""
Become = Callable[[str], None]


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` with these variables and nothing else of ours that could help it."""
    bare = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env={**bare, **environment}, cwd=folder, capture_output=True, text=True, timeout=1800
    )


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
    for access_key, secret in team.keys.values():
        assert access_key.encode() not in stored and secret.encode() not in stored


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
    assert {entry.name for entry in Store(shared.url).list()} == before - {orphan}
    for name in ("MANIFEST.json", "plan.json", "commits/000000.json", "README.md"):
        collector = team.client("collector")
        with pytest.raises(collector.exceptions.ClientError, match="AccessDenied"):
            collector.delete_object(Bucket=bucket, Key=f"{prefix}/{name}")


def blocks(page: str) -> Iterator[str]:
    """The fenced commands of a page as lines of bash; Python becomes a script on the standard input of `python`."""
    for language, text in re.findall(r"^```(bash|python)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        yield text if language == "bash" else f"python - <<'END OF PYTHON'\n{text}END OF PYTHON\n"


def run_page(page: str, environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run all commands of a page in one shell, which stops at the first that fails and says which it was."""
    (folder / "deploy").symlink_to(ROOT / "deploy")
    stop = "set -eEuo pipefail\ntrap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n"
    return run(["bash", "-c", stop + "".join(blocks(page))], environment, folder)


def test_every_command_of_the_page_on_sharing_runs(s3_server: S3Server, tmp_path: Path) -> None:
    teacher = tiny.make_teacher(tmp_path / "teacher")
    tiny.make_student(tmp_path / "student", teacher)
    tiny.write_prompts(tmp_path / "prompts.jsonl", 16)
    (tmp_path / ".aws").mkdir()
    credentials = tmp_path / ".aws" / "credentials"
    credentials.write_text(f"[admin]\naws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {ADMIN[1]}\n")
    credentials.chmod(0o600)
    small = {f"LOPD_{phase}__ENGINE__{key}": value for phase in ("ROLLOUTS", "SCORE") for key, value in ENGINE.items()}
    place = {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    done = run_page((ROOT / "docs" / "sharing.md").read_text(), {**place, **small, **SHORT}, tmp_path)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert open_dataset(str(tmp_path / "copies" / "scored")).num_rows == 16


def test_every_command_of_the_readme_on_sharing_runs(team: Team, shared: Dataset, tmp_path: Path) -> None:
    (section,) = re.findall(
        r"^## Sharing datasets\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )

    done = run_page(section, {**team.environment("reader"), "RUN": shared.url.removesuffix("/scored")}, tmp_path)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "page.html").exists() and (tmp_path / "scored.parquet").exists()
    assert open_dataset(str(tmp_path / "copies" / "scored")).manifest_sha256 == shared.manifest_sha256
