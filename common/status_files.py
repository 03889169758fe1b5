"""Where a box says how it gets on: `status/<box>.json` beside the records of the dataset that it works on.

No part of the dataset: each is written over as the work goes on, nothing names it, and it may be deleted at any time.
"""

import os
import re
import socket

STATUS = "status"
"""The folder."""
STATUS_FILE = re.compile(r"status/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.json")


def box_name() -> str:
    """This process among all that work on one dataset: host name and process id, fit for a key."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:64] or "box"
    return f"{host}-{os.getpid()}"


def status_key(box: str) -> str:
    """Where the status of a box lies. Raises `ValueError` for what is no name of a box."""
    key = f"{STATUS}/{box}.json"
    if not STATUS_FILE.fullmatch(key):
        raise ValueError(f"{box!r} is no name of a box")
    return key
