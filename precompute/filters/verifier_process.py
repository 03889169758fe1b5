"""One verifier in a process of its own: a completion a line in, a verdict a line out, both JSON.

    python -m precompute.filters.verifier_process NAME [KEY]

It may hang, die or eat all memory without anybody's loss but its own: whoever started it kills it and starts another.
What it prints goes to stderr, for stdout holds the verdicts.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

MATH_VERIFY = "math-verify"
ANSWERS = ("answer", "ground_truth", "label", "solution")
"""Where the right answer is looked for in a prompt's `meta`, in this order, when no key is named."""
MATH_BYTES = 8 << 30
"""Address space of a process that runs math-verify: a completion may ask for 9^9^9^9."""
LOOK_S = 1.0
"""Between two looks at whether the parent lives."""

Verify = Callable[[str, Mapping[str, Any]], object]


def answer_in(meta: Mapping[str, Any], key: str | None) -> str:
    """The right answer that a prompt brought along; of a GSM8K solution what follows `####`.

    Args:
        key: where it stands, `a.b` for b within a; None for the first of `ANSWERS`.

    Raises:
        LookupError: it is not there.
    """
    value: Any = meta
    for name in key.split(".") if key else [next((name for name in ANSWERS if name in meta), ANSWERS[0])]:
        if not isinstance(value, Mapping) or value.get(name) is None:
            raise LookupError(f"the prompt brings no {key or 'answer'!r} along")
        value = value[name]
    return str(value).rpartition("####")[2].strip()


def load(name: str, key: str | None) -> tuple[Verify, str]:
    """The verifier of this name, and what pins it: the sha256 of a user's source file, or the package's version.

    Raises:
        ValueError, LookupError, ImportError, or what a user's module raises when it is imported.
    """
    if name == MATH_VERIFY:
        return _math_verify(key), f"{MATH_VERIFY} {version(MATH_VERIFY)}"
    place, _, function = name.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    found = getattr(module, function, None)
    if not callable(found) or module.__file__ is None:
        raise LookupError(f"{place} has no function {function!r}")
    return found, hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()


def serve(name: str, key: str | None) -> None:
    """Say what pins the verifier, then answer until there is no more to judge."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def say(**said: Any) -> None:
            answers.write(json.dumps(said) + "\n")
            answers.flush()

        try:
            verify, pin = load(name, key)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's module may raise anything
            say(error=_told(error))
            return
        say(pin=pin)
        for line in sys.stdin:
            item = json.loads(line)
            try:
                verdict = verify(item["text"], item["meta"])
            except (Exception, SystemExit) as error:  # noqa: BLE001 - and so may its function
                say(error=_told(error))
                continue
            if type(verdict).__name__ in ("bool", "bool_"):  # numpy's as well
                say(verdict=bool(verdict))
            else:
                say(error=f"it returned {verdict!r:.80}, neither True nor False")


def _math_verify(key: str | None) -> Verify:
    """Equality of the last answer in a completion and the right one, as mathematics.

    Its own time limits are off: they would call what they cut short wrong, without a word.
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as error:
        raise ImportError("install lightning-opd[verify]") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    resource.setrlimit(resource.RLIMIT_AS, (MATH_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def equal(text: str, meta: Mapping[str, Any]) -> bool:
        answer = answer_in(meta, key)
        gold = parse(answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}", parsing_timeout=0)
        if not gold:
            raise ValueError(f"math-verify cannot read the right answer {answer!r:.80}")
        return verify(gold, parse(text, parsing_timeout=0), timeout_seconds=0)

    return equal


def _from_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lopd_verifier", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise LookupError(f"there is no file {file}")
    sys.path.insert(0, str(file.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules["lopd_verifier"] = module
    spec.loader.exec_module(module)
    return module


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _end_with(parent: int) -> None:
    """End when the parent has: a verdict that takes for ever would outlive it."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the parent, which finishes what is in flight
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    serve(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
