"""The main job from end to end, through the public commands alone, with nothing but an S3 server between the halves.

The trainer runs in an environment of its own, which `make setup` made with the extra `train` alone and so without vLLM;
the engine then opens what the trainer exported.
"""

import json
import os
import subprocess
from pathlib import Path

import duckdb
import numpy as np
import pytest
from datasets import load_dataset

from common.dataset import open_dataset
from common.lineage import read_provenance
from common.models import resolve
from common.schema import to_rows
from common.storage import Store
from tests.precompute import tiny
from tests.precompute.commands import ROOT, SMALL_ENGINE, finish, run_words

pytestmark = pytest.mark.slow
ENGINE = [word for setting in SMALL_ENGINE for word in ("--set", f"engine.{setting}")]
SHORT = ["--max-tokens", "24", "--set", "prompts_per_shard=8"]
PROMPTS = 24


@pytest.fixture(scope="module")
def trainer_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a cluster's environment: the extra `train` and nothing else."""
    venv = tmp_path_factory.mktemp("cluster") / "venv"
    made = subprocess.run(
        ["make", "setup", "EXTRAS=train", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert made.returncode == 0, made.stderr
    missing = subprocess.run([venv / "bin" / "python", "-c", "import vllm"], capture_output=True, text=True)
    assert "No module named 'vllm'" in missing.stderr
    return venv / "bin" / "python"


def trained(python: Path, ranks: int, *words: str) -> None:
    """Run `python -m trainer --ranks <ranks> <words>` to a good end."""
    settings = ["token_budget=512", "rows_per_step=8", "compute=float32", "export_dtype=float32", "device=cpu"]
    done = subprocess.run(
        [python, "-m", "trainer", "--ranks", str(ranks), *words, *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def precomputed(*words: str) -> None:
    """Run `lopd precompute <words>` to a good end."""
    done = finish(*words)
    assert done.returncode == 0, done.stderr


def test_from_the_teachers_answers_to_a_distilled_model_that_vllm_opens(
    s3: str, tmp_path: Path, trainer_python: Path
) -> None:
    teacher = tiny.make_teacher(tmp_path / "teacher")
    base = tiny.make_student(tmp_path / "base", teacher, noise=0.03, attested=False)
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", PROMPTS))

    precomputed("sft-data", "--model", str(teacher), "--prompts", prompts, "--cache", f"{s3}/sft", *SHORT, *ENGINE)
    trained(trainer_python, 1, "sft", f"model={base}", f"data={s3}/sft", f"output={s3}/sft-run", "lr=1e-4")
    student = f"{s3}/sft-run/export"
    short = ["--max-tokens", "24", "--set", "rollouts.prompts_per_shard=8", "--topk", "8"]
    precomputed(*run_words(student, Path(prompts), f"{s3}/run", *short))
    trained(
        trainer_python, 2, "opd", f"model={student}", f"data={s3}/run/scored", f"output={s3}/opd-run",
        "objective=topk", "lr=1e-4",
    )  # fmt: skip
    distilled = f"{s3}/opd-run/export"
    precomputed("rollouts", "--model", distilled, "--prompts", prompts, "--cache", f"{s3}/after", *SHORT, *ENGINE)

    scored, after = open_dataset(f"{s3}/run/scored"), open_dataset(f"{s3}/after")
    assert scored.num_rows == after.num_rows == PROMPTS
    provenance = read_provenance(resolve(distilled))
    assert provenance is not None and provenance.role == "opd" and provenance.overrides == ()
    assert provenance.teacher is not None and provenance.teacher.name == str(teacher)
    assert provenance.scored_data is not None and provenance.scored_data.manifest_sha256 == scored.manifest_sha256
    assert after.plan["lineage"]["scored_data"]["manifest_sha256"] == scored.manifest_sha256
    losses = [json.loads(line)["loss"] for line in Store(s3).get("opd-run/metrics.jsonl").splitlines()]
    assert len(losses) == PROMPTS // 8
    assert np.isfinite(losses).all()
    _read_by_strangers(f"{s3}/run/scored", tmp_path)


def _read_by_strangers(url: str, tmp_path: Path) -> None:
    """`datasets` reads the dataset from S3, DuckDB a copy on disk; both see the lengths that we wrote."""
    dataset = open_dataset(url)
    lengths = sorted(
        len(row.completion_ids) for s in range(dataset.num_shards) for row in to_rows(dataset.read_shard(s))
    )
    rows = load_dataset("parquet", data_files=f"{url}/data/*.parquet", split="train", streaming=True)
    assert sorted(len(row["teacher_logprobs"]) for row in rows) == lengths
    for commit in dataset.shards:
        Store(url).fetch(commit.file, tmp_path / commit.file)
    seen = duckdb.execute(f"SELECT len(teacher_topk_ids) FROM '{tmp_path}/data/*.parquet' ORDER BY 1").fetchall()
    assert [length for (length,) in seen] == lengths
