"""The documentation on sharing datasets: its commands are run as they stand, against a real S3 server."""

import re
from pathlib import Path

import pytest

from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.lineage import read_provenance
from tests.common.rows import make_plan, make_shard
from tests.deploy.identities import make_team
from tests.deploy.shell import ROOT, run_page
from tests.precompute import tiny
from tests.s3_server import ADMIN, S3Server

pytestmark = pytest.mark.slow
PROMPTS = 16
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


def test_every_command_of_the_page_on_sharing_runs(own_s3_server: S3Server, tmp_path: Path) -> None:
    teacher = tiny.make_teacher(tmp_path / "teacher")
    tiny.make_student(tmp_path / "student", teacher)
    tiny.write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    (tmp_path / ".aws").mkdir()
    credentials = tmp_path / ".aws" / "credentials"
    credentials.write_text(f"[admin]\naws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {ADMIN[1]}\n")
    credentials.chmod(0o600)
    small = {f"LOPD_{phase}__ENGINE__{key}": value for phase in ("ROLLOUTS", "SCORE") for key, value in ENGINE.items()}
    place = {"AWS_ENDPOINT_URL": own_s3_server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    done = run_page((ROOT / "docs" / "sharing.md").read_text(), {**place, **small, **SHORT}, tmp_path)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    copied = open_dataset(str(tmp_path / "copies" / "scored"))
    assert copied.num_rows == PROMPTS
    trained = read_provenance(tmp_path / "trained" / "export")
    assert trained is not None and trained.scored_data is not None
    assert trained.scored_data.manifest_sha256 == copied.manifest_sha256


def test_every_command_of_the_readme_on_sharing_runs(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = make_team(s3_server)
    for name, value in team.environment("producer").items():
        monkeypatch.setenv(name, value)
    writer = create_dataset(f"{team.url}/run/scored", make_plan(2, prompts_per_shard=3))
    for shard in writer.shards_left():
        writer.commit(shard, make_shard(shard))
    digest = writer.finalize()
    policies = (ROOT / "deploy" / "iam" / "README.md").read_text()
    (section,) = re.findall(
        r"^## Sharing datasets\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )

    done = run_page(section + policies, {**team.environment("reader"), "RUN": f"{team.url}/run"}, tmp_path)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "page.html").exists() and (tmp_path / "scored.parquet").exists()
    assert open_dataset(str(tmp_path / "copies" / "scored")).manifest_sha256 == digest
