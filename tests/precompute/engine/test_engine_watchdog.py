"""The thread that ends a process whose engine will never answer, and keeps nothing alive that could go."""

import gc
import subprocess
import sys
import weakref
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest

from precompute.engine import door
from tests.precompute.commands import ROOT

HANGS = """
import time, weakref
from threading import Thread
from types import SimpleNamespace
from precompute.engine import door

class Engine:
    waiting = True

    def __init__(self):
        self.watch = self

    def dying(self):
        {dying}

engine = Engine()
Thread(target=door._watch, args=(weakref.ref(engine), SimpleNamespace(engine_dead=True)), daemon=True).start()
time.sleep(60)
"""


class Watched:
    """What stands where an engine does; who watches it knows it, as a worker knows its engine."""

    waiting = True

    def __init__(self) -> None:
        self.watch = SimpleNamespace(engine=self)


@pytest.mark.parametrize(
    ("dying", "said"), [("print('saved', flush=True)", "saved"), ("raise OSError('the socket is gone')", "")]
)
def test_a_process_whose_engine_is_gone_ends_though_what_it_saves_may_fail(dying: str, said: str) -> None:
    script = [sys.executable, "-c", HANGS.format(dying=dying)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout.strip()) == (75, said), done.stderr
    assert "vLLM's engine died" in done.stderr


def test_an_engine_that_nobody_needs_any_more_goes_and_its_watchdog_with_it() -> None:
    engine = Watched()
    left = weakref.ref(engine)
    watchdog = Thread(
        target=door._watch, args=(cast("Any", left), SimpleNamespace(engine_dead=False)), name="watchdog", daemon=True
    )
    watchdog.start()
    watchdog.join(0.2)
    assert watchdog.is_alive()
    del engine
    gc.collect()
    assert left() is None, "the watchdog sleeps, and holds nothing meanwhile"
    watchdog.join(30)
    assert not watchdog.is_alive()
