"""Fixtures of the tests of `common`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Failing, Fault, Faults
from tests.common.tiny_models import make_model
from tests.s3_server import S3Server


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for objects: a test that takes it runs on a local folder and on the S3 server."""
    return request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "place")


@pytest.fixture
def failing(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """`with failing(fault, ...) as faults`: the store is reached through the fault proxy, and directly afterwards."""

    @contextmanager
    def through(*faults: Fault) -> Iterator[Faults]:
        injected = Faults(*faults)
        with fault_proxy(s3_server.endpoint, injected) as endpoint, monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            yield injected

    return through


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_model(tmp_path / "student", seed=1)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_model(tmp_path / "teacher", seed=2)
