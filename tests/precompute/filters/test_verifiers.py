"""Verifiers in processes of their own, which hang, die and raise as strangers' code does."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from common.errors import DataError, UsageError
from precompute.filters.verifier_process import answer_in
from precompute.filters.verifiers import Failure, Verifier, pin_of

pytestmark = pytest.mark.slow
MINE = "tests.precompute.filters.verifier_of_mine"
MINE_FILE = Path(__file__).parent / "verifier_of_mine.py"


@contextmanager
def verifier(name: str, key: str | None = None, timeout_s: float = 60.0, processes: int = 1) -> Iterator[Verifier]:
    with TemporaryDirectory() as folder:
        made = Verifier(name, key, timeout_s, processes, pin_of(name, key), Path(folder) / "verifier.log")
        try:
            yield made
        finally:
            made.close()


def meta(answer: object) -> str:
    return json.dumps({"answer": answer, "text": "Ünïcödé\u2028🙂"})


def test_a_function_judges_every_completion_in_its_place() -> None:
    texts = [(f"it is {number % 3} \n 漢字 \ud800", meta(1)) for number in range(20)]
    for name in (f"{MINE}:contains", f"{MINE_FILE}:contains"):
        with verifier(name, processes=3) as mine:
            assert mine.judge(texts) == [number % 3 == 1 for number in range(20)]
            assert mine.judge([]) == []


def test_what_a_verifier_fails_on_gets_a_reason_and_the_next_one_a_verdict() -> None:
    texts = ["right", "raise", "die", "exit", "other", "wrong", "right"]
    with verifier(f"{MINE}:unruly") as mine:
        verdicts = mine.judge([(text, "{}") for text in texts])
        assert mine.judged == len(texts)
    assert verdicts == [
        True,
        Failure("RuntimeError: no idea"),
        Failure("its process ended with exit code 7"),
        Failure("SystemExit: 3"),
        Failure("it returned 'yes', neither True nor False"),
        False,
        True,
    ]


def test_a_verifier_that_hangs_is_killed_and_the_rest_judged() -> None:
    with verifier(f"{MINE}:unruly", timeout_s=5) as mine:
        assert mine.judge([("hang", "{}"), ("right", "{}")]) == [Failure("it gave no verdict within 5 s"), True]


def test_what_a_verifier_prints_goes_to_a_file_of_its_own_which_stays_where_anything_stands_in_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs" / "loud.log", tmp_path / "logs" / "quiet.log"
    for name, log in zip((f"{MINE}:contains", f"{MINE}:unruly"), logs, strict=True):
        mine = Verifier(name, None, 60.0, 1, pin_of(name, None), log)
        assert mine.judge([("41", meta(42))]) == [False]
        mine.close()
    assert "looking for 42" in logs[0].read_text() and not logs[1].exists()
    assert capfd.readouterr() == ("", "")


def test_a_completion_larger_than_a_pipe_is_judged() -> None:
    with verifier(f"{MINE}:contains") as mine:
        assert mine.judge([("x" * 3_000_000 + "42", meta(42))]) == [True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:f", "No module named 'no'"),
        (f"{MINE}:missing", "has no function 'missing'"),
        ("nowhere/file.py:f", "there is no file nowhere/file.py"),
        ("os:_exit_not", "has no function"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_anything_is_sampled(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pin_of(name, None)


def test_a_plan_pins_the_source_of_a_function_and_another_source_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def f(text, meta):\n    return True\n")
    pin = pin_of(f"{file}:f", None)
    assert pin == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text("def f(text, meta):\n    return False\n")
    mine = Verifier(f"{file}:f", None, 60.0, 1, pin, tmp_path / "verifier.log")
    with pytest.raises(DataError, match=f"not the one of the plan: .*the plan says {pin}"):
        mine.judge([("", "{}")])
    mine.close()


MATHS = [
    ("The answer is $\\boxed{\\frac{1}{2}}$.", "0.5", True),
    ("So $x = \\frac12$", "\\frac{1}{2}", True),
    ("It is \\boxed{(1, 2)}", "$(1,2)$", True),
    ("I get 41.", 42, False),
    ("no number at all", 42, False),
    ("Therefore 1,234.", "so we add them.\n#### 1,234", True),
]


def test_math_verify_compares_as_mathematics() -> None:
    with verifier("math-verify", processes=2) as maths:
        assert pin_of("math-verify", None).startswith("math-verify 0.")
        assert maths.judge([(text, meta(answer)) for text, answer, _ in MATHS]) == [right for _, _, right in MATHS]
        [failure] = maths.judge([("\\boxed{1}", meta(""))])
        assert isinstance(failure, Failure) and "cannot read the right answer" in failure.reason


def test_answers_of_reasoning_gym_are_found_right_and_their_neighbours_wrong() -> None:
    gym = pytest.importorskip("reasoning_gym", reason="needs the extra gym")
    tasks = [
        task for name in ("chain_sum", "gcd", "simple_equations") for task in gym.create_dataset(name, size=5, seed=1)
    ]
    right = [(f"... so the answer is \\boxed{{{task['answer']}}}", meta(task["answer"])) for task in tasks]
    wrong = [(f"... so the answer is \\boxed{{{int(task['answer']) + 1}}}", meta(task["answer"])) for task in tasks]
    with verifier("math-verify", processes=2) as maths:
        assert maths.judge(right) == [True] * len(tasks)
        assert maths.judge(wrong) == [False] * len(tasks)


def test_an_answer_is_found_by_name_and_within() -> None:
    nested = {"reward_model": {"ground_truth": "34"}, "label": 5}
    assert answer_in(nested, "reward_model.ground_truth") == "34"
    assert answer_in(nested, None) == "5"
    for absent in ({}, {"answer": None}, {"a": 1}):
        with pytest.raises(LookupError):
            answer_in(absent, "a.b" if absent == {"a": 1} else None)


PARENT = """
import sys
from precompute.filters.verifiers import VerifierProcess
mine = VerifierProcess("tests.precompute.filters.verifier_of_mine:unruly", None, 3600.0)
mine.start()
sys.stdout.write(f"{mine._process.pid}\\n")
sys.stdout.flush()
mine.verdict("hang", "{}")
"""


def test_a_verifier_that_hangs_does_not_outlive_a_worker_that_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)
