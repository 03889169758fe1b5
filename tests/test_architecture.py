"""The arrows between the rooms: precompute -> common <- trainer, and nothing else."""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"common", "precompute", "trainer", "recipes", "deploy", "benchmarks", "tests"}
FORBIDDEN = {
    "common": {"precompute", "trainer", "torch", "vllm"},
    "precompute": {"trainer", "torch"},
    "trainer": {"precompute", "vllm"},
    "recipes": {"tests", "benchmarks"},
    "deploy": ROOMS,
}
"""What the files of a room may not import, by top-level name."""
ALLOWED = {"precompute/audit/reference.py": {"torch"}}
"""Single files that may: the audit's own forward pass, which runs where no engine does."""
NEVER_IMPORTED = {"tests", "recipes", "benchmarks", "deploy"}
"""Rooms that no shipped code imports."""
COMMANDS = "common.cache"
"""The commands on datasets stand on the rest of `common`; nothing that is shipped stands on them."""
PURE = {f"trainer/{name}.py" for name in ("logprobs", "objectives", "epoch", "schedule", "metrics")}
"""Files of pure functions, which import nothing of ours."""


def imports(source: str, file: str) -> list[str]:
    """Modules that `source`, the text of `file`, imports at any depth; relative names made absolute."""
    package = Path(file).parent.parts
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names.append(".".join([*base, *([node.module] if node.module else [])]))
    return names


def violations(sources: Mapping[str, str]) -> list[str]:
    """One line for each forbidden arrow in `sources`, texts by path relative to the root."""
    found = []
    for file, source in sorted(sources.items()):
        room = Path(file).parts[0]
        forbidden = (FORBIDDEN[room] | ({*NEVER_IMPORTED} - {room})) - ALLOWED.get(file, set())
        if file in PURE:
            forbidden = forbidden | ROOMS
        for name in imports(source, file):
            upwards = f"{name}.".startswith(f"{COMMANDS}.") and not file.startswith(("common/cache/", "tests/"))
            if upwards or name.split(".")[0] in forbidden:
                found.append(f"{file} imports {name}")
    return found


def sources() -> dict[str, str]:
    files = [file for room in FORBIDDEN for file in (ROOT / room).rglob("*.py")]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def test_no_arrow_points_the_wrong_way() -> None:
    assert violations(sources()) == []


def test_the_pure_files_and_the_rooms_are_there() -> None:
    """Else the test above would hold for want of files."""
    found = sources()
    assert set(found) >= PURE | {
        "common/dataset.py",
        "common/cache/verify.py",
        "precompute/engine/door.py",
        "trainer/loop.py",
    }


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("common/new.py", "import torch"),
        ("common/new.py", "from vllm import LLM"),
        ("common/new.py", "def late():\n    import precompute.engine.door"),
        ("common/new.py", "from trainer.loop import run"),
        ("common/dataset.py", "from common.cache.verify import verify"),
        ("precompute/new.py", "import common.cache.contents"),
        ("precompute/new.py", "import torch.nn"),
        ("precompute/new.py", "from trainer import model"),
        ("precompute/audit/reference.py", "from trainer import model"),
        ("trainer/new.py", "if True:\n    import vllm"),
        ("trainer/new.py", "from precompute.plan import plan"),
        ("trainer/new.py", "import tests.conftest"),
        ("trainer/objectives.py", "from common.errors import DataError"),
        ("trainer/objectives.py", "from trainer import step"),
        ("trainer/objectives.py", "from . import step"),
        ("trainer/epoch.py", "from .batch import Batch"),
        ("recipes/demo/new.py", "from benchmarks import speed"),
        ("deploy/new.py", "import common.storage"),
    ],
)
def test_a_planted_arrow_is_found(file: str, line: str) -> None:
    assert len(violations({file: f"import math\n{line}\n"})) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("common/cli.py", 'ROOMS = {"cache": "common.cache.cli", "precompute": "precompute.cli"}'),
        ("common/cache/cli.py", "from common.cache.verify import verify"),
        ("trainer/objectives.py", "import torch"),
        ("trainer/loop.py", "from . import step"),
        ("precompute/engine/door.py", "import vllm"),
        ("precompute/audit/reference.py", "import torch"),
        ("deploy/new.py", "import json"),
    ],
)
def test_what_is_allowed_is_not_found(file: str, line: str) -> None:
    assert violations({file: line}) == []
