"""A run that was broken off goes on as if it had not been."""

import json
import random
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.errors import DataError, StorageError, UsageError
from common.lineage import read_provenance
from common.models import publish, resolve
from common.storage import Store
from tests.trainer import build
from tests.trainer.runs import await_step, config, course, course_of, quiet, saved_steps, started, words
from trainer.checkpoint import Checkpoints
from trainer.loop import train


@pytest.fixture(scope="module")
def straight(example, tmp_path_factory) -> Path:
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("straight")
    assert build.run_trainer("opd", *words(config(example, output))).returncode == 0
    return output


def test_resumed_losses_and_weights_are_bit_identical(example, alone, tmp_path, straight):
    train(config(example, tmp_path, max_steps=3), alone, quiet)
    said: list[str] = []
    train(config(example, tmp_path), alone, said.append)
    assert any("resuming after step 3 of 6" in line for line in said)
    assert course(tmp_path) == course(straight)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (tmp_path, straight))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_with_the_same_batches(example, tmp_path, straight, first, then):
    for ranks, steps in ((first, 3), (then, 6)):
        result = build.run_trainer("opd", *words(config(example, tmp_path, max_steps=steps)), ranks=ranks)
        assert result.returncode == 0, result.stderr
    ours, theirs = course(tmp_path), course(straight)
    assert [record[-1] for record in ours] == [record[-1] for record in theirs]  # the same tokens in every step
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


STEPS = 30


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def long_run(request, example, tmp_path_factory) -> tuple[int, Path]:
    """A number of ranks, and the output of a long run on them that nothing disturbed."""
    output = tmp_path_factory.mktemp("long")
    settings = config(example, output, max_steps=STEPS)
    assert build.run_trainer("opd", *words(settings), ranks=request.param).returncode == 0
    return request.param, output


def await_half_a_checkpoint(output: Path, process: subprocess.Popen[str]) -> None:
    """Return while a checkpoint is being written that was not yet begun."""
    begun = set(output.glob("checkpoints/step-*"))
    while not any(not (new / ".metadata").exists() for new in set(output.glob("checkpoints/step-*")) - begun):
        assert process.poll() is None
        time.sleep(0.001)


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_the_course_as_it_was(example, tmp_path, long_run):
    """At random moments after random steps, and every second time in the middle of a save."""
    ranks, undisturbed = long_run
    chance = random.Random(ranks)
    settings = config(example, tmp_path, max_steps=STEPS)
    for kills in range(6):
        reached = max(saved_steps(tmp_path), default=0)
        with started(settings, ranks=ranks) as process:
            if kills % 2:
                await_half_a_checkpoint(tmp_path, process)
            else:
                await_step(process, reached + chance.randint(1, 4))
                time.sleep(chance.uniform(0, 0.1))
    result = build.run_trainer("opd", *words(settings), ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert "resuming after step" in result.stderr
    assert course(tmp_path) == course(undisturbed)  # every step once, and bit for bit
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (tmp_path, undisturbed))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert not list(tmp_path.glob(".*"))  # nothing half written is left


@pytest.mark.slow
def test_kill_9_with_the_output_on_s3_leaves_the_course_as_it_was(example, s3, straight):
    settings = config(example, f"{s3}/run")
    store = Store(f"{s3}/run")
    for step in (3, 4, 6):  # while the checkpoint of step 2, 4 and 6 may be on its way
        with started(settings) as process:
            await_step(process, step)
    result = build.run_trainer("opd", *words(settings))
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in store.get("metrics.jsonl").decode().splitlines()]
    assert course_of(lines) == course(straight)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_exits_143(example, tmp_path, ranks):
    settings = config(example, tmp_path, max_steps=4000, save_every=4000)
    command = build.trainer_command("opd", *words(settings), ranks=ranks)
    process = subprocess.Popen(command, env=build.environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "step 2/" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    rest = process.stderr.read()
    assert process.wait() == 143
    assert rest.count("error: stopped by SIGTERM") == 1 and "which is saved" in rest and "Traceback" not in rest
    assert saved_steps(tmp_path) == [len(course(tmp_path))]


def test_only_the_last_checkpoints_are_kept(straight):
    assert sorted(folder.name for folder in (straight / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


def test_a_store_that_lets_nobody_delete_is_told_of_once_and_stops_nothing(example, alone, tmp_path, monkeypatch):
    def refuses(store: Store, key: str) -> None:
        raise StorageError("no permission to delete", where=key)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", refuses)
        train(config(example, tmp_path, keep_last=1), alone, said.append)
    assert len([line for line in said if "WARNING: old checkpoints cannot be deleted" in line]) == 1
    assert said[-1].startswith("exported")
    folders = tmp_path / "checkpoints"
    assert len(list(folders.iterdir())) == 3
    train(config(example, tmp_path, keep_last=1, max_steps=8), alone, said.append)
    assert [folder.name for folder in folders.iterdir()] == ["step-000008"]


def test_a_folder_half_deleted_goes_with_the_next(example, alone, tmp_path):
    train(config(example, tmp_path, max_steps=2), alone, quiet)
    (tmp_path / "checkpoints" / "step-000002" / ".metadata").unlink()
    train(config(example, tmp_path, save_every=3), alone, quiet)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000006"]


def test_a_folder_without_its_marker_is_no_checkpoint(example, alone, tmp_path, straight):
    train(config(example, tmp_path, max_steps=4), alone, quiet)
    (tmp_path / "checkpoints" / "step-000004" / ".metadata").unlink()
    assert Checkpoints(str(tmp_path), alone, 2, quiet).newest() == 2
    train(config(example, tmp_path), alone, quiet)
    assert course(tmp_path) == course(straight)


def test_a_finished_run_is_left_as_it_is(example, alone, straight):
    said: list[str] = []
    before = (straight / "export" / "model.safetensors").stat().st_mtime_ns
    train(config(example, straight), alone, said.append)
    assert said[-1].startswith("already finished")
    assert (straight / "export" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": 2e-3}, UsageError, r"other settings: lr \(0.001 there, 0.002 here\)"),
        ({"objective": "paper", "seed": 1}, UsageError, "objective .*, seed "),
        ({"resume": "never"}, UsageError, "resume=never"),
        ({"max_steps": 5}, UsageError, "already has 6 steps"),
    ],
)
def test_resuming_something_else_is_refused(example, alone, straight, settings, error, message):
    with pytest.raises(error, match=message):
        train(config(example, straight, **settings), alone, quiet)


def test_resuming_on_another_dataset_is_refused(example, alone, straight, tmp_path):
    data = build.make_dataset(
        tmp_path / "data", example.rows[:20], kind="scored", policy=example.student, teacher=example.teacher
    )
    with pytest.raises(DataError, match="trained on another dataset"):
        train(config(example, straight, data=data), alone, quiet)


@pytest.mark.slow
def test_model_dataset_and_output_may_all_lie_on_s3(example, alone, s3, straight):
    publish(example.student, f"{s3}/student")
    build.make_dataset(f"{s3}/scored", example.rows, kind="scored", policy=example.student, teacher=example.teacher)
    places = {"model": f"{s3}/student", "data": f"{s3}/scored"}
    train(config(example, f"{s3}/run", max_steps=3, **places), alone, quiet)
    train(config(example, f"{s3}/run", **places), alone, quiet)
    store = Store(f"{s3}/run")
    lines = [json.loads(line) for line in store.get("metrics.jsonl").decode().splitlines()]
    assert course_of(lines) == course(straight)
    assert Checkpoints(f"{s3}/run", alone, 2, quiet).newest() == 6
    names = {entry.name for entry in store.list()}
    assert not any(name.startswith("checkpoints/step-000002") for name in names)  # pruned
    exported = resolve(f"{s3}/run/export")
    assert read_provenance(exported) is not None
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exported, straight / "export"))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


@pytest.mark.slow
def test_a_store_that_may_only_be_read_is_one_clear_line(example, s3, s3_server, tmp_path):
    settings = config(example, f"{s3}/read-only")
    environment = {**build.environment(), **s3_server.reader()}
    command = build.trainer_command("opd", *words(settings))
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 74, result.stderr
    assert "no permission to write" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line(example, tmp_path):
    command = shlex.join(build.trainer_command("opd", *words(config(example, tmp_path))))
    limited = ["bash", "-c", f"ulimit -f 64; exec {command}"]  # no file over 64 KiB; a checkpoint is larger
    result = subprocess.run(limited, env=build.environment(), capture_output=True, text=True)
    assert result.returncode == 74, result.stderr
    assert result.stderr.count("WARNING: cannot write the checkpoint: a write broke off; is there space left?") == 1
    assert result.stderr.count("error: cannot write the checkpoint: a write broke off; is there space left?") == 1
    assert "Traceback" not in result.stderr
    assert [record[0] for record in course(tmp_path)] == [1, 2, 3, 4, 5, 6]  # of steps 2 and 4, told at the next save


@pytest.mark.slow
def test_an_unwritable_output_is_one_clear_line(example, tmp_path):
    (tmp_path / "file").write_text("")
    result = build.run_trainer("opd", *words(config(example, tmp_path / "file" / "run")))
    assert result.returncode == 74, result.stderr
    assert "Traceback" not in result.stderr
