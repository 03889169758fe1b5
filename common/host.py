"""How much of this machine's RAM this process may take, now and at most, as the kernel and its container say."""

from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that may still be taken: the least of what the machine has and what every control group leaves.

    What the kernel keeps of files it has read counts as free, because it gives that back: a model that was just hashed
    would else take its own room. None where nobody can tell.
    """
    left = [limit - taken for limit, taken in _limits(proc, cgroups)]
    return min((room for room in (_meminfo(proc, "MemAvailable"), *left) if room is not None), default=None)


def whole_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that could be taken if nobody else took any: those of the machine, or the least limit of a control group.

    None where nobody can tell.
    """
    limits = [limit for limit, _ in _limits(proc, cgroups)]
    return min((most for most in (_meminfo(proc, "MemTotal"), *limits) if most is not None), default=None)


def in_words(count: int) -> str:
    """Bytes as makers of memory and torch count them: 1.5 GiB, 300 MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _meminfo(proc: Path, key: str) -> int | None:
    with suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _limits(proc: Path, cgroups: Path) -> list[tuple[int, int]]:
    """The limit of each control group that this process is in, and what is taken of it; none of those without one."""
    limits = []
    for folder in _groups(proc, cgroups):
        with suppress(OSError, ValueError):  # not here, or no limit: "max"
            if (folder / "memory.max").exists():
                limit, used, kept = "memory.max", "memory.current", "inactive_file"
            else:
                limit, used, kept = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
            limits.append((most, taken - _statistic(folder, kept)))
    return limits


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """Folders of the control groups from this process's own up to the root; in a container the root is its own.

    Version 2 has one tree for all (`0::/path`), version 1 one a controller (`5:memory:/path`).
    """
    folders = [cgroups, cgroups / "memory"]
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = cgroups / controllers
                own = root / path.lstrip("/")
                folders += [folder for folder in (own, *own.parents) if root in folder.parents]
    return list(dict.fromkeys(folders))


def _statistic(folder: Path, name: str) -> int:
    with suppress(OSError):
        for line in (folder / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
