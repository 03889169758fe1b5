"""The page on precompute: its commands are run as they stand, against a real S3 server, with tiny models."""

import re
from pathlib import Path

import botocore.session
import pytest

from common.dataset import open_dataset
from tests.deploy.shell import ROOT, run_page
from tests.precompute import tiny
from tests.s3_server import ADMIN, S3Server

PAGE = ROOT / "docs" / "precompute.md"
PROMPTS = 8
SMALL = {
    "ENGINE__DTYPE": "float32",
    "ENGINE__MAX_NUM_SEQS": "16",
    "ENGINE__CPU_KV_GIB": "0.1",
}
SHORT = {
    f"LOPD_{phase}__{key}": value
    for phase in ("ROLLOUTS", "SFT_DATA")
    for key, value in {"PROMPTS_PER_SHARD": "4", "SAMPLING__MAX_TOKENS": "16"}.items()
}
"""Settings that make the page a matter of a minute; its commands stay as they are."""


@pytest.mark.slow
def test_every_command_of_the_page_on_precompute_runs(
    own_s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny.make_teacher(tmp_path / "teacher")
    tiny.make_student(tmp_path / "student", teacher)
    tiny.write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    place = {"AWS_ENDPOINT_URL": own_s3_server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    keys = f"aws_access_key_id = {ADMIN[0]}\naws_secret_access_key = {ADMIN[1]}\n"
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(f"[opd-producer]\n{keys}")
    for name, value in own_s3_server.environment().items():
        monkeypatch.setenv(name, value)
    botocore.session.get_session().create_client("s3", endpoint_url=own_s3_server.endpoint).create_bucket(
        Bucket="opd-datasets"
    )
    small = {
        f"LOPD_{phase}__{key}": value for phase in ("ROLLOUTS", "SCORE", "SFT_DATA") for key, value in SMALL.items()
    }

    done = run_page(PAGE.read_text(), {**place, **small, **SHORT}, tmp_path)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    run = "s3://opd-datasets/opd/first-run"
    assert open_dataset(f"{run}/scored").num_rows == PROMPTS
    assert open_dataset(f"{run}/sft").num_rows == PROMPTS
    assert '"state":"complete"' in (tmp_path / "status.json").read_text()
    assert "lopd_precompute_complete{" in (tmp_path / "lopd.prom").read_text()
    assert "already complete" in done.stdout


def test_the_files_that_the_page_names_are_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE.read_text()) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
