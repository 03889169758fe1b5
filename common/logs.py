"""Log lines on stderr: what `-v` and `-vv` turn on, and what no flag turns on."""

import logging
import sys

OURS = ("common", "precompute", "trainer")
"""Loggers of our own modules."""


class _ToStderr(logging.Handler):
    """Writes to the stderr of the moment, which a progress bar exchanges to keep its line in place."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


def show_logs(verbosity: int) -> None:
    """Send log lines to stderr.

    Args:
        verbosity: 0 leaves Python's default, warnings alone; 1 adds what our own modules tell; 2 their details too, and
            what the libraries tell. DEBUG of the libraries stays off at any number: botocore prints the Authorization
            header there.
    """
    if verbosity < 1:
        return
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _ToStderr)]:
        root.removeHandler(handler)
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if verbosity > 1 else logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
