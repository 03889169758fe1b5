"""Fixtures of every room: a real S3 server, and a machine without network or leftovers.

`s3` is what a test asks for: a URL on a real S3 server (SeaweedFS), with the environment set so that `Store(url)` opens
it. `s3_server` is the server itself, for the tests that need its endpoint or its read-only identity; many tests
share it. `own_s3_server` is one that nothing else has written to.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.s3_server import ADMIN, BUCKET, READER, S3Server, run_server

__all__ = ["ADMIN", "BUCKET", "READER", "S3Server"]

os.environ["HF_HUB_OFFLINE"] = "1"  # here, for huggingface_hub reads it when some other conftest imports it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs the S3 server starts one, and so is slow."""
    for item in items:
        if {"s3_server", "own_s3_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own empty `LOPD_CACHE_DIR`; the value is that folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOPD_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole run: starts on first use, ends with the run."""
    with run_server(tmp_path_factory.mktemp("s3-server")) as server:
        yield server


@pytest.fixture
def own_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of this test alone, for pages whose commands name their bucket."""
    with run_server(tmp_path_factory.mktemp("own-s3-server")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh `s3://bucket/prefix` of this test alone, with the environment that opens it (read and write)."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid4().hex[:12]}"
