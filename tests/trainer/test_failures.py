"""Ranks that fail, together or alone, and numbers that are none: one line, the right exit code, and nothing harmed."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from common.errors import DataError
from common.lineage import Provenance, identify, write_provenance
from tests.trainer import build
from tests.trainer.runs import await_step, config, quiet, saved_steps, started, words
from trainer.checkpoint import Checkpoints
from trainer.config import OpdConfig
from trainer.loop import train
from trainer.postmortem import read_failure

ENDS_S = 60
"""By then all ranks are gone; torch kills after 30 s those that do not hear."""


def ranks_of(launcher: "subprocess.Popen[str]") -> dict[int, int]:
    """The process id of every rank."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(value[5:]): int(child) for value in variables if value.startswith(b"RANK=")}
    return found


def the_rest(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """The exit code, and the lines of stderr that tell of no step."""
    _, said = process.communicate(timeout=ENDS_S)
    return process.returncode, [line for line in said.splitlines() if not line.startswith("step ")]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_is_told_of_in_one_line(example, tmp_path, killed):
    with started(config(example, tmp_path, max_steps=4000), ranks=2) as process:
        await_step(process, 3)
        ranks = ranks_of(process)
        os.kill(ranks[killed], signal.SIGKILL)
        code, lines = the_rest(process)
    assert (code, lines) == (
        137,
        [f"error: rank {killed} was killed by SIGKILL. The same command resumes from the last checkpoint"],
    )
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks.values())
    saved = max(saved_steps(tmp_path), default=0)
    finished = build.run_trainer("opd", *words(config(example, tmp_path, max_steps=saved + 2)), ranks=2)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(example, tmp_path):
    with started(config(example, tmp_path, max_steps=4000, save_every=4000), ranks=2) as process:
        await_step(process, 2)
        ranks = ranks_of(process)
        process.kill()
        await_end(ranks)
    assert len(ranks) == 2 and len(saved_steps(tmp_path)) == 1


def await_end(ranks: dict[int, int]) -> None:
    deadline = time.monotonic() + ENDS_S
    while any(Path(f"/proc/{rank}").exists() for rank in ranks.values()):
        assert time.monotonic() < deadline, "ranks are left over"
        time.sleep(0.1)


def spoilt(example: Any, folder: Path, weights: Mapping[str, float], **settings: Any) -> OpdConfig:
    """A run of a student some of whose weights are multiplied."""
    student = build.make_model(folder / "student", tied=False)
    state = load_file(student / "model.safetensors")
    for name, factor in weights.items():
        state[name] *= factor
    save_file(state, student / "model.safetensors", {"format": "pt"})
    write_provenance(student, Provenance(role="sft", teacher=identify(example.teacher, str(example.teacher))))
    data = build.make_dataset(folder / "data", example.rows, kind="scored", policy=student, teacher=example.teacher)
    return config(example, folder / "run", model=str(student), data=data, parity="report", **settings)


INFINITE = {"model.layers.1.mlp.up_proj.weight": math.inf}
"""The first loss of such a student is no number."""
STEEP = {"model.norm.weight": 1e25, "lm_head.weight": 1e-25}
"""Such a student computes what it did before, and the norm of its gradient is too large for float32."""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_no_number_stops_all_ranks_and_keeps_the_batch(example, tmp_path, ranks):
    settings = spoilt(example, tmp_path, INFINITE)
    result = build.run_trainer("opd", *words(settings), ranks=ranks)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 65 and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert "step 1: the loss of 7 rows is not finite; the model was not updated" in errors[0]
    assert "failures/step-000001-rank*.parquet" in errors[0] and "into another output with a lower lr" in errors[0]
    files = sorted((tmp_path / "run" / "failures").iterdir())
    assert [file.name for file in files] == [f"step-000001-rank{rank}.parquet" for rank in range(ranks)]
    kept = [row for file in files for row in read_failure(str(file)).rows.to_pylist()]
    assert len(kept) == 7 and all(row["blamed"] for row in kept)
    assert saved_steps(tmp_path / "run") == []


def test_what_is_kept_is_what_the_model_saw(example, alone, tmp_path):
    settings = spoilt(example, tmp_path, INFINITE)
    with pytest.raises(DataError, match="not finite") as raised:
        train(settings, alone, quiet)
    failure = read_failure(str(tmp_path / "run" / "failures" / "step-000001-rank0.parquet"))
    assert failure.header["step"] == 1 and failure.header["settings"]["lr"] == settings.lr
    by_uid = {row.uid: row for row in example.rows}
    for row in failure.rows.to_pylist():
        stored = by_uid[row["uid"]]
        assert row["input_ids"] == [*stored.prompt_ids, *stored.completion_ids]
        assert row["completion_ids"] == list(stored.completion_ids)
        assert np.allclose(row["rollout_logprobs"], stored.rollout_logprobs)
        assert np.allclose(row["teacher_logprobs"], stored.teacher_logprobs)
        assert len(row["student_logprobs"]) == len(row["losses"]) == len(stored.completion_ids)
        assert not np.isfinite(row["losses"]).all()
    assert str(raised.value).count("kept in") == 1


def test_weights_that_overflow_later_leave_the_checkpoints_before(example, alone, tmp_path):
    with pytest.raises(DataError, match=r"step \d+: the (loss|gradient)") as raised:
        train(config(example, tmp_path, lr=1e30, max_steps=40, save_every=1, keep_last=40), alone, quiet)
    step = int(str(raised.value).split(":")[0].split()[-1])
    assert saved_steps(tmp_path) == list(range(1, step))
    assert Checkpoints(str(tmp_path), alone, 2, quiet).header(step - 1).step == step - 1
    assert (tmp_path / "failures" / f"step-{step:06d}-rank0.parquet").exists()


def test_a_gradient_that_is_not_finite_under_a_loss_that_is(example, alone, tmp_path):
    with pytest.raises(DataError, match=r"step 1: the gradient is not finite \(inf\).*one of 7 rows"):
        train(spoilt(example, tmp_path, STEEP), alone, quiet)
    failure = read_failure(str(tmp_path / "run" / "failures" / "step-000001-rank0.parquet"))
    assert len(failure.rows) == 7 and not any(failure.rows["blamed"].to_pylist())
    assert all(np.isfinite(row["losses"]).all() for row in failure.rows.to_pylist())


def test_an_output_that_cannot_keep_the_rows_hides_nothing(example, alone, tmp_path):
    settings = spoilt(example, tmp_path, INFINITE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failures").write_text("a file where a folder should be")
    with pytest.raises(DataError, match="not finite.*rank 0 could not keep its rows"):
        train(settings, alone, quiet)
