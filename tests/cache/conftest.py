"""Fixtures of the tests of `lopd cache`."""

from pathlib import Path

import pytest


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for datasets: a test that takes it runs on a local folder and on the S3 server."""
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "place")
