"""Python in a process of its own, for what a test must not do to itself: be killed, lose its rights, fill its disk."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
BECOME_NOBODY = "import os; os.getuid() == 0 and os.setuid(65534)"
"""Root may write everywhere; after this line a script may not."""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `script`; it finds `arguments` in sys.argv."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(
    script: str, *arguments: str, env: Mapping[str, str] | None = None, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `script` to its end, with further variables `env` and none of `without`."""
    command = [sys.executable, "-c", script, *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    variables = inherited | dict(env or {})
    return subprocess.run(command, text=True, cwd=ROOT, env=variables, capture_output=True, timeout=120)
