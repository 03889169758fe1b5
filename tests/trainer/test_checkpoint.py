"""What a save does to training, and what is left when it fails."""

import shutil
import subprocess
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from common.errors import DataError, StorageError
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.precompute.disk import no_room_for_files_above
from tests.trainer import build
from tests.trainer.runs import config, course, quiet, saved_steps, words
from trainer.checkpoint import Checkpoints
from trainer.header import Header, require_same_run
from trainer.loop import train
from trainer.model import load_sharded

HEADER = Header(1, 0, 1, "m", "s", {"lr": 1.0})


@pytest.fixture
def state(example, alone) -> tuple[Any, torch.optim.Optimizer]:
    """A small model and an optimizer that has taken a step."""
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def save(checkpoints: Checkpoints, state: tuple[Any, torch.optim.Optimizer], number: int) -> float:
    return checkpoints.save(*state, replace(HEADER, step=number))


def copied(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every weight and moment as it is now."""
    moments = [value for held in optimizer.state.values() for value in held.values()]
    return [value.detach().clone() for value in (*model.parameters(), *moments)]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(bool((one == other).all()) for one, other in zip(ours, theirs, strict=True))


def test_steps_taken_while_a_save_is_written_do_not_reach_it(state, alone, tmp_path, monkeypatch):
    model, optimizer = state
    checkpoints = Checkpoints(str(tmp_path), alone, 2, quiet)
    before, written = copied(model, optimizer), threading.Event()
    create_stream = FileSystem.create_stream

    def late(self, path, mode):
        assert written.wait(60)
        return create_stream(self, path, mode)

    monkeypatch.setattr(FileSystem, "create_stream", late)
    with checkpoints:
        assert save(checkpoints, state, 1) > 0
        step(model, optimizer)
        assert not equal(copied(model, optimizer), before)
        written.set()
    checkpoints.restore(model, optimizer, 1)
    assert equal(copied(model, optimizer), before)


def test_an_error_in_training_does_not_cost_the_save_under_way(state, alone, tmp_path):
    checkpoints = Checkpoints(str(tmp_path), alone, 2, quiet)
    with pytest.raises(DataError, match="of training"), checkpoints:
        save(checkpoints, state, 1)
        raise DataError("an error of training")
    assert checkpoints.newest() == 1


def test_one_failed_save_is_a_warning_and_leaves_nothing(state, alone, tmp_path):
    said: list[str] = []
    checkpoints = Checkpoints(str(tmp_path), alone, 2, said.append)
    with checkpoints:
        save(checkpoints, state, 1)
    with no_room_for_files_above(4096):
        save(checkpoints, state, 2)
        save(checkpoints, state, 3)  # waits for the one before, and fails as well
        with pytest.raises(StorageError, match=r"cannot write the checkpoint: no space left .*step-000003"):
            save(checkpoints, state, 4)
    assert len(said) == 1 and "WARNING: cannot write the checkpoint: no space left" in said[0]
    assert "step-000002" in said[0] and "the next failure ends it" in said[0]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoints.header(1).settings == HEADER.settings


def test_a_save_that_succeeds_makes_good_for_one_that_failed(state, alone, tmp_path):
    checkpoints = Checkpoints(str(tmp_path), alone, 9, quiet)
    for number in (1, 3, 5):
        with pytest.raises(StorageError), no_room_for_files_above(4096), checkpoints:
            save(checkpoints, state, number)
        with checkpoints:
            save(checkpoints, state, number + 1)
    assert saved_steps(tmp_path) == [2, 4, 6]


def test_another_starting_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="started from another model"):
        require_same_run(replace(HEADER, start_sha256="t"), HEADER, "there")


def test_a_checkpoint_cut_short_is_named_and_nothing_else_is_lost(example, alone, tmp_path):
    train(config(example, tmp_path, max_steps=4), alone, quiet)
    file = tmp_path / "checkpoints" / "step-000004" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"the checkpoint cannot be read: .*step-000004.*Delete this checkpoint"):
        train(config(example, tmp_path), alone, quiet)
    shutil.rmtree(file.parent)
    said: list[str] = []
    train(config(example, tmp_path), alone, said.append)
    assert any("resuming after step 2 of 6" in line for line in said)


def without_privileges() -> bool:
    """Whether this machine gives a process a mount namespace of its own."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        ).returncode
    )


@pytest.mark.slow
@pytest.mark.skipif(not without_privileges(), reason="needs Linux with user namespaces")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_in_the_middle_of_a_save(example, tmp_path, ranks):
    """A disk of its own with room for two checkpoints; later it grows, and the same command finishes."""
    output = tmp_path / "disk" / "run"
    output.parent.mkdir()
    settings = config(example, output, keep_last=9, rows_per_step=24, max_steps=5, save_every=1)
    command = subprocess.list2cmdline(build.trainer_command("opd", *words(settings), ranks=ranks))
    script = f"""
        mount -t tmpfs -o size=1000k none {output.parent}
        {command} 2> {tmp_path}/first; echo $? > {tmp_path}/code
        ls {output}/checkpoints > {tmp_path}/kept
        mount -o remount,size=99m {output.parent}
        {command} 2> {tmp_path}/second || exit
        cp -r {output} {tmp_path}/finished
    """
    subprocess.run(["unshare", "-rm", "bash", "-c", script], env=build.environment(), check=True)
    first, second = ((tmp_path / name).read_text() for name in ("first", "second"))
    assert (tmp_path / "code").read_text() == "74\n", first
    [error] = [line for line in first.splitlines() if line.startswith("error:")]  # of a checkpoint or of the metrics
    assert "space left" in error.lower() and "Traceback" not in first
    kept = (tmp_path / "kept").read_text().split()
    assert kept == [f"step-{number:06d}" for number in range(1, len(kept) + 1)] and kept
    assert f"resuming after step {len(kept)} of 5" in second
    assert [record[0] for record in course(tmp_path / "finished")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_bucket_that_refuses_one_save_and_then_all(example, s3, s3_server):
    full = {"kind": Kind.REFUSE, "method": "PUT", "status": 403, "code": "QuotaExceeded"}
    settings = config(example, f"{s3}/run", max_steps=8)

    def run(*paths: str) -> subprocess.CompletedProcess[str]:
        faults = Faults(*[Fault(path=path, **full) for path in paths])
        with fault_proxy(s3_server.endpoint, faults) as endpoint:
            environment = {**build.environment(), "AWS_ENDPOINT_URL": endpoint}
            command = build.trainer_command("opd", *words(settings))
            return subprocess.run(command, env=environment, capture_output=True, text=True)

    refused = run("step-000004", "step-000008")
    assert refused.returncode == 74, refused.stderr
    assert refused.stderr.count("WARNING: cannot write the checkpoint") == 1
    assert "error: cannot write the checkpoint: " in refused.stderr and "Traceback" not in refused.stderr
    finished = run()
    assert finished.returncode == 0, finished.stderr
    assert "resuming after step 6 of 8" in finished.stderr
