"""No credential gets out: not by any command of `lopd cache`, not at -vv, not into what it writes, not by a pickle."""

import pickle
from pathlib import Path

import pytest

from common.storage import Store
from tests.cache.datasets import flip, make_dataset, orphan
from tests.common import scripts
from tests.s3_server import ADMIN, S3Server

LOPD = "from common.cli import main; main()"
SIGNS = (ADMIN[1], "AWS4-HMAC-SHA256", "Signature=", "x-amz-security-token", "Authorization")
"""The secret itself, and what a signed request holds."""

pytestmark = pytest.mark.slow


def leaks(text: str) -> list[str]:
    return [sign for sign in SIGNS if sign.lower() in text.lower()]


@pytest.fixture
def datasets(s3: str) -> str:
    """One that is whole, one unfinished with an orphan, one altered."""
    make_dataset(f"{s3}/whole")
    make_dataset(f"{s3}/begun", committed=[1])
    orphan(Store(f"{s3}/begun"), 0)
    make_dataset(f"{s3}/altered")
    flip(Store(f"{s3}/altered"), Store(f"{s3}/altered").list("data")[0].name)
    return s3


def test_no_command_says_a_secret_however_much_it_says(datasets: str, tmp_path: Path) -> None:
    commands = [
        ("ls", datasets),
        ("status", f"{datasets}/begun"),
        ("verify", f"{datasets}/altered"),
        ("copy", f"{datasets}/whole", str(tmp_path / "copy")),
        ("copy", f"{datasets}/whole", f"{datasets}/copy"),
        ("copy", f"{datasets}/altered", str(tmp_path / "none")),
        ("gc", datasets, "--older-than", "0s", "--delete"),
    ]
    said = ""
    for words in commands:
        ran = scripts.run(LOPD, "-vv", "cache", *words)
        assert ran.returncode in (0, 65) and "Traceback" not in ran.stderr
        said += ran.stdout + ran.stderr
    assert "DEBUG common." in said and "INFO botocore" in said  # it did say all it says
    assert leaks(said) == []


def test_nothing_that_is_written_holds_a_secret(datasets: str, tmp_path: Path) -> None:
    for target in (str(tmp_path / "copy"), f"{datasets}/copy"):
        assert scripts.run(LOPD, "-vv", "cache", "copy", f"{datasets}/whole", target).returncode == 0
        store = Store(target)
        for entry in store.list():
            assert leaks(store.get(entry.name).decode("latin-1")) == [], entry.name


def test_a_refused_request_says_no_secret_either(
    datasets: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = "wrong-id", "wrong-canary-secret"
    for name, value in s3_server.environment((key, secret)).items():
        monkeypatch.setenv(name, value)
    for words in (("ls", datasets), ("copy", f"{datasets}/whole", str(tmp_path / "copy"))):
        ran = scripts.run(LOPD, "-vv", "cache", *words)
        assert ran.returncode == 74 and "no permission" in ran.stderr
        assert leaks(ran.stdout + ran.stderr) == [] and secret not in ran.stdout + ran.stderr


def test_a_store_is_pickled_without_its_credentials(datasets: str) -> None:
    store = Store(f"{datasets}/whole")
    assert store.list()  # now it holds an open filesystem
    data = pickle.dumps(store)
    assert leaks(data.decode("latin-1")) == [] and ADMIN[0].encode() not in data
    assert pickle.loads(data).list() == store.list()
    assert leaks(repr(store)) == []
