"""What has been measured already: one small JSON file a cell, found again by all that went into it."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from common.canonical import canonical
from common.local_files import write_whole


class Cells:
    """Results below a folder, by name. One that was made of other inputs is made again."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self._root, self._say = root, say

    def get(self, name: str, inputs: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `make`, which has run before or runs now; with its wall time as `seconds`.

        Args:
            inputs: all that the result depends on, as JSON.
        """
        file = self._root / f"{name}.json"
        digest = hashlib.sha256(canonical(inputs)).hexdigest()[:16]
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("inputs") == digest:
            return known["result"]
        self._say(name)
        began = time.monotonic()
        result = make()
        result = {"seconds": round(time.monotonic() - began, 2), **result}
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"inputs": digest, "of": dict(inputs), "result": result}
        write_whole(file, BytesIO(json.dumps(kept, indent=1).encode()))
        return result
