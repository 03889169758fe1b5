"""A real S3 server on the loopback for as long as it is measured against."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UsageError


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """URL of an empty bucket, whose data lie in `folder`; the environment leads there, also of processes begun within.

    Raises:
        UsageError: the server is not installed or does not start.
    """
    from tests.s3_server import BUCKET, ServerError, run_server

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with run_server(folder) as server, _environment(server.environment()):
            yield f"s3://{BUCKET}"
    except ServerError as error:
        raise UsageError(str(error), fix="Install lightning-opd[dev]") from None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The variables set, and the user's own AWS identity put aside."""
    before = dict(os.environ)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
