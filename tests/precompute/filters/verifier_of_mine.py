"""Functions such as a user writes, for the tests of verifiers."""

import os
import sys
import time
from typing import Any


def contains(text: str, meta: dict[str, Any]) -> bool:
    """Whether the completion says the answer; what it prints must not spoil anything."""
    sys.stdout.write(f"looking for {meta['answer']}\n")
    return str(meta["answer"]) in text


def unruly(text: str, meta: dict[str, Any]) -> Any:
    """Does what the text says."""
    match text:
        case "hang":
            time.sleep(3600)
        case "die":
            os._exit(7)
        case "raise":
            raise RuntimeError("no idea")
        case "exit":
            sys.exit(3)
        case "other":
            return "yes"
    return text == "right"
