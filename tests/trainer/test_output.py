"""An output that already holds something: what is this run's own is gone on with, what is another's is kept."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError, StorageError, UsageError
from tests.trainer import build
from tests.trainer.runs import config, quiet, saved_steps
from trainer import loop
from trainer.checkpoint import Checkpoints
from trainer.loop import train


@pytest.fixture
def finished(example, alone, tmp_path) -> Path:
    """A finished run whose checkpoints were deleted to make room."""
    train(config(example, tmp_path, max_steps=2), alone, quiet)
    shutil.rmtree(tmp_path / "checkpoints")
    return tmp_path


def contents(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 2e-3}, r"the export was made with other settings: lr .*/export\).*choose another output"),
        ({"resume": "never"}, "holds an export and resume=never.*Choose another output"),
        ({"max_steps": 1}, "already has 2 steps.*choose another output"),
    ],
)
def test_an_export_without_checkpoints_is_not_written_over(example, alone, finished, settings, message):
    before = contents(finished)
    with pytest.raises(UsageError, match=message):
        train(config(example, finished, **{"max_steps": 2, **settings}), alone, quiet)
    assert contents(finished) == before


def test_an_export_on_another_dataset_is_not_written_over(example, alone, finished):
    rows = example.rows[:20]
    data = build.make_dataset(finished / "data", rows, kind="scored", policy=example.student, teacher=example.teacher)
    with pytest.raises(DataError, match="the export was trained on another dataset"):
        train(config(example, finished, max_steps=2, data=data), alone, quiet)


def test_an_export_that_says_nothing_of_itself_is_not_written_over(example, alone, finished):
    for spoil in (lambda file: file.write_text("[]"), Path.unlink):
        spoil(finished / "export" / "export.json")
        with pytest.raises(UsageError, match="does not say what it was made of"):
            train(config(example, finished, max_steps=2), alone, quiet)


def test_the_same_run_is_finished_without_its_checkpoints_too(example, alone, finished):
    before, said = contents(finished), []
    train(config(example, finished, max_steps=2), alone, said.append)
    assert said[-1].startswith("already finished") and contents(finished) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 2e-3}, "holds metrics.jsonl of another run.*lr"), ({"resume": "never"}, "metrics.jsonl and resume=never")],
)
def test_metrics_of_another_course_are_not_written_over(example, alone, finished, settings, message):
    shutil.rmtree(finished / "export")
    before = contents(finished)
    with pytest.raises(UsageError, match=message):
        train(config(example, finished, max_steps=2, **settings), alone, quiet)
    assert contents(finished) == before


def test_metrics_of_a_run_that_was_killed_before_its_first_save_are_made_anew(example, alone, finished):
    shutil.rmtree(finished / "export")
    train(config(example, finished, max_steps=2), alone, quiet)
    assert [record["step"] for record in build.read_metrics(finished)] == [1, 2]


def test_an_output_that_cannot_be_written_is_told_before_the_weights_are_loaded(example, alone, tmp_path, monkeypatch):
    def loads(*args: object, **settings: object) -> None:
        raise AssertionError("the weights were loaded first")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").mkdir()
    monkeypatch.setattr(loop, "load_sharded", loads)
    with pytest.raises(StorageError):
        train(config(example, tmp_path / "run"), alone, quiet)


def test_only_the_export_of_a_trained_run_is_made_again(example, alone, tmp_path):
    train(config(example, tmp_path, max_steps=2), alone, quiet)
    shutil.rmtree(tmp_path / "export")
    before = contents(tmp_path / "checkpoints"), (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    said: list[str] = []
    train(config(example, tmp_path, max_steps=2), alone, said.append)
    assert (tmp_path / "export" / "config.json").exists() and said[-1].startswith("exported")
    assert before == (contents(tmp_path / "checkpoints"), (tmp_path / "metrics.jsonl").stat().st_mtime_ns)


def test_sigterm_while_the_last_save_is_waited_for_leaves_the_export_to_the_next(example, alone, tmp_path, monkeypatch):
    waits = Checkpoints.__exit__

    def hears(checkpoints: Checkpoints, *raised: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        waits(checkpoints, *raised)

    monkeypatch.setattr(Checkpoints, "__exit__", hears)
    with pytest.raises(loop.Stopped, match="after step 2, which is saved"):
        train(config(example, tmp_path, max_steps=2), alone, quiet)
    assert saved_steps(tmp_path) == [2] and not (tmp_path / "export").exists()


@pytest.mark.parametrize("place", ["data", "model"])
def test_an_output_inside_what_the_run_reads_is_refused(example, alone, tmp_path, place):
    settings = config(example, tmp_path)
    with pytest.raises(UsageError, match="would be written into the (dataset|starting model)"):
        train(settings.model_copy(update={"output": getattr(settings, place)}), alone, quiet)


def test_an_export_does_not_take_the_place_of_its_own_start(example, alone, tmp_path):
    shutil.copytree(example.student, tmp_path / "export")
    with pytest.raises(UsageError, match="written into the starting model"):
        train(config(example, tmp_path, model=str(tmp_path / "export")), alone, quiet)
    assert not (tmp_path / "run.json").exists()
