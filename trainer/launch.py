"""Several ranks on this machine from one command, and their exit code as its own.

torchrun ends with code 1 and a report whatever happened; a user and a scheduler want the code and the line of the rank
that failed. The ranks are torchrun's all the same: this is its launcher without its command line.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import uuid4

import click
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SAVING_S = 3600
"""How long the ranks may take after SIGTERM to end their step and save, before they are killed. When one of them has
failed, the others get torch's 30 seconds."""
PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""


def launch(ranks: int, words: Sequence[str]) -> int:
    """Run `python -m trainer WORDS` as `ranks` ranks; returns the exit code of the first that failed, 0 if none did.

    A signal is handed on to the ranks; they are waited for, and the code is 128 + signal, 143 for SIGTERM.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SAVING_S,
    )
    # Every rank would start a thread per core otherwise, and they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    try:
        with _unheard():
            elastic_launch(config, sys.executable)("-m", "trainer", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(rank, failure.exitcode)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def end_with_launcher() -> None:
    """Have the kernel send this rank SIGTERM when its launcher dies: a rank left over would write beside the next run.

    A launcher that is killed by SIGKILL, or for want of memory, tells its ranks nothing. Linux alone knows how to.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _code(rank: int, exitcode: int) -> int:
    """The shell's exit code; a rank that was killed could not say so itself."""
    if exitcode >= 0:
        return exitcode
    name = signal.Signals(-exitcode).name
    click.echo(f"error: rank {rank} was killed by {name}. The same command resumes from the last checkpoint", err=True)
    return 128 - exitcode


@contextmanager
def _unheard() -> Iterator[None]:
    """Without the launcher's own reports: the ranks have said what there is to say."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
