"""The trackers' own packages, read back: nothing here stands in for them."""

import json
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from common.storage import Store
from tests.trainer import build
from trainer.config import OpdConfig
from trainer.loop import train
from trainer.run import open_run
from trainer.watch import trackers
from trainer.watch.run_record import read_record, recorded
from trainer.watch.trackers import Trackers, require_trackers


def config(example, output: Path | str, *names: str, **settings: Any) -> OpdConfig:
    places = {"model": str(example.student), "data": example.scored, "output": str(output), "trackers": names}
    course = {"compute": "float32", "rows_per_step": 7, "token_budget": 90, "lr": 1e-3, "save_every": 2}
    return OpdConfig.model_validate({**places, **course, **settings})


def words(settings: OpdConfig) -> list[str]:
    """The settings as words of the command line."""
    given = settings.model_dump(exclude_unset=True).items()
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given]


def quiet(line: str) -> None:
    pass


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a TensorBoard folder as (step, value), as TensorBoard shows them."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_multiplexer")
    shown = loader.EventMultiplexer({"run": str(folder)})
    shown.Reload()
    names = shown.GetAccumulator("run").Tags()["scalars"]
    return {name: [(event.step, event.value) for event in shown.Scalars("run", name)] for name in names}


@pytest.fixture(scope="module")
def boarded(example, tmp_path_factory) -> Path:
    """A run with TensorBoard that was killed after step 5 of which 4 were saved, and resumed to step 8."""
    pytest.importorskip("tensorboard")
    output = tmp_path_factory.mktemp("boarded")
    for steps in ("5", "8"):
        result = build.run_trainer("opd", *words(config(example, output, "tensorboard")), f"max_steps={steps}")
        assert result.returncode == 0, result.stderr
        if steps == "5":
            (output / "checkpoints" / "step-000005" / ".metadata").unlink()
    return output


@pytest.mark.slow
def test_tensorboard_has_every_step_once_after_a_resume(boarded):
    found, lines = curves(boarded / "tensorboard"), build.read_metrics(boarded)
    assert [step for step, _ in found["loss"]] == list(range(1, 9))
    for name in ("loss", "kl/teacher_k1", "ratio/ess", "data/fill", "optim/lr"):
        assert [value for _, value in found[name]] == pytest.approx([line[name] for line in lines]), name


@pytest.mark.slow
def test_a_figure_without_a_value_is_no_point(boarded):
    assert build.read_metrics(boarded)[0]["perf/mfu"] is None
    assert "perf/mfu" not in curves(boarded / "tensorboard") and "step" not in curves(boarded / "tensorboard")


def test_a_resumed_run_keeps_its_identity_and_another_one_gets_its_own(example, alone, tmp_path):
    identities = []
    for output, steps in ((tmp_path / "one", 1), (tmp_path / "one", 2), (tmp_path / "other", 1)):
        train(config(example, output, max_steps=steps), alone, quiet)
        record = read_record(Store(str(output)))
        assert record is not None
        identities.append(record.id)
    assert identities[0] == identities[1] != identities[2]
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    shutil.rmtree(tmp_path / "other" / "export")
    (tmp_path / "other" / "metrics.jsonl").unlink()
    train(config(example, tmp_path / "other", max_steps=1, lr=2e-3), alone, quiet)
    other = read_record(Store(str(tmp_path / "other")))
    assert other is not None and other.id != identities[2], "another course is another run"


def test_the_record_says_what_the_run_is_and_no_password(example, alone):
    run = open_run(config(example, "memory://me:hunter2@runs/a", max_steps=1), alone, quiet)
    recorded(run)
    text = Store("memory://runs/a").get("run.json").decode()
    assert "hunter2" not in text
    record = json.loads(text)
    assert record["settings"]["output"] == "memory://runs/a" and record["settings"]["lr"] == 1e-3
    assert record["teacher"]["name"] == str(example.teacher) and record["round"] == 1
    assert record["data"]["url"] == example.scored and record["data"]["rows"] == 24


@pytest.mark.slow
def test_tensorboard_of_a_run_on_s3_lies_there_too(example, alone, s3, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("LOPD_CACHE_DIR", str(tmp_path / "cache"))
    for steps in (2, 4):
        train(config(example, f"{s3}/run", "tensorboard", max_steps=steps), alone, quiet)
    store = Store(f"{s3}/run/tensorboard")
    for entry in store.list():
        (tmp_path / entry.name).write_bytes(store.get(entry.name))
    assert [step for step, _ in curves(tmp_path)["loss"]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_wandb_gets_the_figures_and_the_record_under_one_id(example, alone, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (2, 3):
        train(config(example, tmp_path, "wandb", max_steps=steps), alone, quiet)
    record = read_record(Store(str(tmp_path)))
    assert record is not None
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{record.id}/*.wandb"))
    seen = [message for file in files for message in wandb_messages(file)]
    history = [{_key(item): json.loads(item.value_json) for item in m.history.item} for m in seen if m.history.item]
    losses = [line["loss"] for line in build.read_metrics(tmp_path)]
    assert [(row["_step"], row["loss"]) for row in history] == list(zip((1, 2, 3), losses, strict=True))
    settings = {item.key: json.loads(item.value_json) for message in seen for item in message.run.config.update}
    assert settings["teacher"]["name"] == str(example.teacher) and settings["round"] == 1
    assert not list(tmp_path.glob("wandb/**/wandb-metadata.json")), "no command line, no host"


def wandb_messages(file: Path) -> Iterator[Any]:
    """The messages in a .wandb file, a LevelDB log behind 7 bytes of its own: blocks of 32 kB hold parts of records,
    each behind checksum, length and whether it is whole (1), the first (2), a middle (3) or the last part (4)."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


@pytest.mark.slow
def test_trackio_goes_on_with_the_same_run(example, alone, tmp_path):
    """In processes of their own: trackio reads where it stores when it is imported."""
    pytest.importorskip("trackio")
    environment = {**build.environment(), "TRACKIO_DIR": str(tmp_path / "trackio")}
    for steps in (2, 3):
        command = build.trainer_command("opd", *words(config(example, tmp_path, "trackio")), f"max_steps={steps}")
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout == "", result.stderr
    record = read_record(Store(str(tmp_path)))
    assert record is not None
    with sqlite3.connect(tmp_path / "trackio" / "lightning-opd.db") as base:
        rows = base.execute("SELECT run_name, step FROM metrics ORDER BY step").fetchall()
    assert rows == [(f"{record.name}-{record.id}", step) for step in (1, 2, 3)]


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package wandb.*Install lightning-opd\[wandb\]"):
        require_trackers(["wandb"])


@pytest.mark.slow
def test_weights_and_biases_without_a_login_is_one_clear_line(example, tmp_path):
    pytest.importorskip("wandb")
    nobody = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
        "WANDB_API_KEY": "",
    }
    command = build.trainer_command("opd", *words(config(example, tmp_path / "run", "wandb", max_steps=1)))
    result = subprocess.run(command, env={**build.environment(), **nobody}, capture_output=True, text=True)
    assert result.returncode == 64 and "Traceback" not in result.stderr, result.stderr
    assert "error: Weights & Biases cannot be used" in result.stderr and "WANDB_MODE=offline" in result.stderr


def test_a_tracker_that_breaks_later_stops_nothing(example, alone, tmp_path):
    train(config(example, tmp_path, max_steps=1), alone, quiet)
    record = read_record(Store(str(tmp_path)))
    assert record is not None
    said: list[str] = []
    opened = Trackers(["tensorboard"], record, 0, said.append)
    opened.log({"step": 1, "loss": 1.0})
    board = opened._open["tensorboard"]
    board.flush = _full  # type: ignore[method-assign]
    opened.flush()
    opened.log({"step": 2, "loss": 1.0})
    opened.close()
    assert len(said) == 1 and "tensorboard is left out from here on" in said[0]
    board._writer.close()  # type: ignore[attr-defined]


def _full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_finds_a_file_in_its_way_is_one_clear_line(example, alone, tmp_path, name):
    pytest.importorskip(name)
    (tmp_path / "file").write_text("")
    run = open_run(config(example, tmp_path / "run", max_steps=1), alone, quiet)
    record = recorded(run)
    record = record.model_copy(update={"settings": {**record.settings, "output": str(tmp_path / "file")}})
    with pytest.raises(UsageError, match=f"trackers={name} cannot be opened: .*leave it out"):
        Trackers([name], record, 0, quiet)


@pytest.mark.slow
def test_a_trackio_server_that_is_no_url_is_one_clear_line(example, tmp_path):
    pytest.importorskip("trackio")
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_SERVER_URL": "http://[/?write_token=none"}
    command = build.trainer_command("opd", *words(config(example, tmp_path / "run", "trackio", max_steps=1)))
    result = subprocess.run(command, env={**build.environment(), **variables}, capture_output=True, text=True)
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == 64 and "error: trackers=trackio cannot be opened" in result.stderr


def test_points_of_a_run_that_was_killed_before_its_first_save_are_hidden(example, alone, tmp_path):
    pytest.importorskip("tensorboard")
    run = open_run(config(example, tmp_path, max_steps=1), alone, quiet)
    for steps in (5, 2):
        board = Trackers(["tensorboard"], recorded(run), 0, quiet)
        for step in range(1, steps + 1):
            board.log({"step": step, "loss": float(steps)})
        board.close()
    assert curves(tmp_path / "tensorboard")["loss"] == [(1, 2.0), (2, 2.0)]
