"""What has been made already: one small JSON file a cell, found again by all that went into it."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from common.canonical import canonical
from common.local_files import write_whole

Inputs = Mapping[str, Any]
"""All that a result depends on, as JSON: settings, and hashes of files and texts instead of their places."""


class Cells:
    """Results below a folder. One that depends on anything else is another cell, and lies elsewhere."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self._root, self._say = root, say

    def get(self, name: str, inputs: Inputs, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `make`, which has run before or runs now; with its wall time as `seconds`."""
        file = self._root / "cells" / f"{named(name, inputs)}.json"
        if file.exists():
            return json.loads(file.read_text())["result"]
        self._say(name)
        began = time.monotonic()
        result = make()
        result = {"seconds": round(time.monotonic() - began, 2), **result}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, BytesIO(json.dumps({"inputs": dict(inputs), "result": result}, indent=1).encode()))
        return result

    def place(self, name: str, inputs: Inputs) -> Path:
        """A folder for models or data that depend on this and nothing else; it need not be there."""
        return self._root / "made" / named(name, inputs)


def named(name: str, inputs: Inputs) -> str:
    """The name with a hash of all that went into it."""
    return f"{name}-{hashlib.sha256(canonical(inputs)).hexdigest()[:8]}"


def digest(*files: Path) -> str:
    """Of the contents of these files, in this order."""
    hashes = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(hashes).hexdigest()[:16]
