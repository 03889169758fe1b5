"""Processes of a job: each phase in a process of its own, because only process exit surely frees a GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

LOPD = (sys.executable, "-m", "common.cli")
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Torch reads it when it is loaded; else every engine warns of how it binds memory."""


def run_phase(arguments: Sequence[str]) -> int:
    """Run `lopd <arguments>` as a child and return its exit code; SIGTERM and SIGINT are passed on to it.

    The child's stderr is ours, so its progress and its one-line errors reach the user as they are.
    """
    child = subprocess.Popen([*LOPD, *arguments], env={**QUIET, **os.environ})

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
