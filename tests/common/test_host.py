"""How much memory a machine or a container says that it has left."""

from pathlib import Path

import pytest

from common.host import free_memory, in_words, whole_memory

GIB = 1 << 30


def _write(files: dict[str, str], root: Path) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def _free(root: Path, proc: dict[str, str], cgroups: dict[str, str]) -> int | None:
    _write({"meminfo": f"MemTotal: 9 kB\nMemAvailable: {64 << 20} kB\n", **proc}, root / "proc")
    _write(cgroups, root / "cgroup")
    return free_memory(root / "proc", root / "cgroup")


def test_without_a_container_the_machine_alone_counts(tmp_path: Path) -> None:
    assert _free(tmp_path, {}, {"memory.max": "max\n", "memory.current": "5\n"}) == 64 * GIB


@pytest.mark.parametrize(
    "group",
    [
        {"memory.max": f"{8 * GIB}", "memory.current": f"{5 * GIB}", "memory.stat": f"anon 1\ninactive_file {GIB}\n"},
        {
            "memory/memory.limit_in_bytes": f"{8 * GIB}",
            "memory/memory.usage_in_bytes": f"{5 * GIB}",
            "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_container_leaves_its_limit_less_what_it_holds_and_files_can_be_forgotten(
    tmp_path: Path, group: dict[str, str]
) -> None:
    assert _free(tmp_path, {}, group) == 4 * GIB


@pytest.mark.parametrize(("line", "tree"), [("0::/a/job/step", ""), ("5:memory:/a/job/step", "memory/")])
def test_the_tightest_of_nested_groups_counts(tmp_path: Path, line: str, tree: str) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if tree else ("memory.max", "memory.current")
    groups = {"a/job/step": (6, 1), "a/job": (4, 2), "a": (32, 9)}
    files = {
        f"{tree}{path}/{name}": str(size * GIB)
        for path, sizes in groups.items()
        for name, size in zip(names, sizes, strict=True)
    }
    assert _free(tmp_path, {"self/cgroup": f"{line}\n"}, files) == 2 * GIB


@pytest.mark.parametrize(("limit", "whole"), [("max", 64), (str(48 * GIB), 48), (str(80 * GIB), 64)])
def test_what_could_be_taken_is_all_of_the_machine_or_of_its_container(tmp_path: Path, limit: str, whole: int) -> None:
    proc = {"meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {9 << 20} kB\n"}
    _write({"proc/meminfo": proc["meminfo"], "cgroup/memory.max": limit, "cgroup/memory.current": "5"}, tmp_path)
    assert whole_memory(tmp_path / "proc", tmp_path / "cgroup") == whole * GIB


def test_where_nothing_is_told_nothing_is_made_up(tmp_path: Path) -> None:
    assert free_memory(tmp_path / "proc", tmp_path / "cgroup") is None
    assert whole_memory(tmp_path / "proc", tmp_path / "cgroup") is None


def test_this_machine_says_something() -> None:
    free = free_memory()
    assert free is None or free > 0


def test_bytes_in_words() -> None:
    assert in_words(3 * GIB // 2) == "1.5 GiB"
    assert in_words(300 << 20) == "300 MiB"
