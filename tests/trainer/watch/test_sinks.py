import io
import math
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from common.errors import DataError, StorageError
from common.storage import Store
from tests.trainer import build
from trainer.config import OpdConfig
from trainer.loop import train
from trainer.watch import live
from trainer.watch.live import Live, fields, fitted
from trainer.watch.report import read_output
from trainer.watch.sinks import MetricsFile, finite, stored_records


def record(step: int, **changes: Any) -> dict[str, Any]:
    known = {
        "step": step,
        "loss": 0.1234,
        "kl/teacher_k1": 0.0432,
        "ratio/ess": 0.98,
        "optim/grad_norm": 0.312,
        "optim/lr": 2e-6,
        "perf/tokens_per_s": 3100.0,
        "perf/mfu": 0.52,
    }
    return {**known, **changes}


def line(*found: Any) -> str:
    return "  ".join(map(str, fields(*found)))


def test_the_line_has_what_one_watches():
    said = line(record(12), 150, 252)
    for part in ("step 12/150", "loss   0.1234", "kl  0.0432", "ess 0.98", "3,100 tok/s", "mfu  52%", "4m12s left"):
        assert part in said


def test_lines_stand_below_each_other():
    """The same columns whatever the digits, so that the eye can run down them."""
    early = line(record(1, loss=-12.5, **{"perf/tokens_per_s": 88.0, "perf/mfu": 0.07}), 1000, 3700)
    late = line(record(999), 1000, 5)
    assert [early.index(word) for word in ("loss", "kl", "tok/s", "mfu", "left")] == [
        late.index(word) for word in ("loss", "kl", "tok/s", "mfu", "left")
    ]


def test_a_figure_that_was_not_finite_or_is_not_known_breaks_no_line():
    said = line(record(3, **{"kl/teacher_k1": None, "perf/mfu": None}), 10, 1)
    assert "kl     nan" in said and "mfu" not in said


def test_sft_shows_its_validation_loss_where_there_is_one():
    step = {key: value for key, value in record(5).items() if key not in ("kl/teacher_k1", "ratio/ess")}
    assert "val" not in line(step, 10, 1) and "kl" not in line(step, 10, 1)
    assert "val 0.5120" in line({**step, "validation/loss": 0.512}, 10, 1)


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_a_narrow_terminal_keeps_the_step_and_the_loss(width):
    kept = fitted(fields(record(12), 150, 252), width)
    said = "  ".join(map(str, kept))
    assert len(said) <= width
    assert said.startswith("step 12/150") and "loss" in said
    assert ("kl" in said and "left" in said) or width == 30


@pytest.mark.parametrize("width", [20, 40, 79, 200])
def test_a_terminal_gets_one_line_a_step_that_fits(width, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, soft_wrap=True)
    monkeypatch.setattr(live, "rich_console", lambda stream: console)
    said: list[str] = []
    shown = Live(150, said.append)
    for step in (1, 2, 3):
        shown.step(record(step))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 3 and said == []
    assert all("\x1b" in text for text in lines), "the labels are dim"
    assert all(cell_len(Text.from_ansi(text).plain) <= width for text in lines)


def test_elsewhere_the_line_is_said_in_full():
    said: list[str] = []
    Live(150, said.append, io.StringIO()).step(record(1))
    assert len(said) == 1 and "lr 2.0e-06" in said[0] and "\x1b" not in said[0]


def test_the_time_left_comes_from_the_last_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    said: list[str] = []
    shown = Live(1000, said.append, io.StringIO())
    now[0] += 600  # the first step compiles
    for step in range(1, 51):
        shown.step(record(step))
        now[0] += 2
    assert said[0].endswith("166h30m left") and said[-1].endswith("31m40s left")


def test_later_lines_of_a_killed_run_are_dropped_and_a_torn_one_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(str(tmp_path), resumed=2).append({"step": 3, "again": True})
    assert stored_records(Store(str(tmp_path))) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_store_without_appending_has_the_lines_after_a_flush():
    place = "memory://metrics-test"
    file = MetricsFile(place, resumed=0)
    file.append({"step": 1})
    assert stored_records(Store(place)) == []
    file.flush()
    assert stored_records(Store(place)) == [{"step": 1}]


def test_metrics_that_cannot_be_written_are_one_clear_line(tmp_path):
    file = MetricsFile(str(tmp_path), resumed=0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match="cannot write the metrics"):
        file.append({"step": 1})


def spending(example, output, **settings) -> OpdConfig:
    """A run whose rate is so high that its rollouts are soon spent."""
    common = {"model": str(example.student), "data": example.scored, "output": str(output), "compute": "float32"}
    course = {"rows_per_step": 7, "token_budget": 90, "lr": 3e-3, "max_steps": 10, "save_every": 4}
    return OpdConfig.model_validate({**common, **course, **settings})


def test_spent_rollouts_are_told_of_once_and_written_into_every_line(example, alone, tmp_path):
    said: list[str] = []
    train(spending(example, tmp_path), alone, said.append)
    warnings = [text for text in said if "the rollouts are spent" in text]
    assert len(warnings) == 1 and "Sample round 2" in warnings[0]
    lines = build.read_metrics(tmp_path)
    assert "spent" in lines[-1] and "spent" not in lines[0]
    train(spending(example, tmp_path, max_steps=12), alone, said.append)
    assert len([text for text in said if "the rollouts are spent" in text]) == 1, "nor again after a resume"


def test_the_lines_are_json_whatever_the_figures(tmp_path):
    file = MetricsFile(str(tmp_path), resumed=0)
    file.append(finite({"step": 1, "loss": math.nan, "ratio/max": math.inf, "entropy": 1.5, "perf/mfu": None}))
    (known,) = build.read_metrics(tmp_path)
    assert known == {"step": 1, "loss": None, "ratio/max": None, "entropy": 1.5, "perf/mfu": None}
    with pytest.raises(ValueError):
        file.append({"step": 2, "loss": math.nan})


@pytest.mark.parametrize("garbage", [b'{"a": 1}', b"[]", b"\xff\xfe", b"", b'{"step": "two"}'])
def test_a_line_that_is_no_record_is_told_by_its_number(tmp_path, garbage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + garbage + b"\n")
    for read in (lambda: read_output(str(tmp_path)), lambda: MetricsFile(str(tmp_path), resumed=1)):
        with pytest.raises(DataError, match=r"no record of a step \(.*metrics.jsonl, line 2\)"):
            read()


def test_of_a_step_that_is_there_twice_the_last_line_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "again": true}\n')
    assert stored_records(Store(str(tmp_path))) == [{"step": 1}, {"step": 2, "again": True}]


def overflowing(example, output: str) -> OpdConfig:
    """A run whose weights overflow after a few steps, long before it saves."""
    return spending(example, output, lr=1e30, max_steps=40, save_every=40)


def test_the_steps_before_an_error_are_readable_on_a_store_without_appending(example, alone):
    place = "memory://me:hunter2@metrics-of-an-error/run"
    with pytest.raises(DataError, match=r"step \d+: the (loss|gradient)") as raised:
        train(overflowing(example, place), alone, lambda line: None)
    assert "hunter2" not in str(raised.value) and "memory://metrics-of-an-error/run/failures" in str(raised.value)
    failed = int(str(raised.value).split(":")[0].split()[-1])
    steps = [record["step"] for record in stored_records(Store(place))]
    assert failed > 1 and steps == list(range(1, failed))


def test_metrics_that_are_lost_at_the_end_do_not_hide_the_error(example, alone, monkeypatch):
    def refuses(file: MetricsFile) -> None:
        raise StorageError("no permission to write")

    said: list[str] = []
    monkeypatch.setattr(MetricsFile, "flush", refuses)
    with pytest.raises(DataError, match="not finite"):
        train(overflowing(example, "memory://metrics-lost/run"), alone, said.append)
    assert len([line for line in said if "WARNING: the last lines of metrics.jsonl are lost" in line]) == 1
