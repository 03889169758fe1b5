"""No credential gets out: not by any command of `lopd cache`, not at -vv, not into what it writes, not by a pickle."""

import pickle
from pathlib import Path

import pytest

from common.lineage import Provenance, identify, write_provenance
from common.models import publish
from common.storage import Store
from tests.cache.datasets import flip, lopd, make_dataset, orphan
from tests.common import scripts
from tests.common.tiny_models import make_model
from tests.s3_server import ADMIN, S3Server

LOPD = "from common.cli import main; main()"
SIGNS = (ADMIN[1], "AWS4-HMAC-SHA256", "Signature=", "x-amz-security-token", "Authorization")
"""The secret itself, and what a signed request holds."""

USER, PASSWORD = "AKIAUSEROFAURL", "canary-of-a-url"

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


def _given(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command with a user and a password in every URL."""
    return tuple(word.replace("s3://", f"s3://{USER}:{PASSWORD}@") for word in words)


COMMANDS: list[tuple[int, tuple[str, ...]]] = [
    (0, ("cache", "ls", "s3://PLACE")),
    (0, ("cache", "ls", "s3://PLACE/nothing")),
    (74, ("cache", "ls", "s3://no-such-bucket/x")),
    (0, ("cache", "status", "s3://PLACE/begun")),
    (65, ("cache", "status", "s3://PLACE/nothing")),
    (0, ("cache", "inspect", "s3://PLACE/whole")),
    (65, ("cache", "inspect", "s3://PLACE/nothing")),
    (64, ("cache", "inspect", "s3://PLACE/whole", "--row", "none")),
    (64, ("cache", "inspect", "s3://PLACE/whole", "--html", "s3://PLACE/page.html")),
    (64, ("cache", "inspect", "s3://PLACE/whole", "--tokenizer", "s3://PLACE/model")),
    (0, ("cache", "verify", "s3://PLACE/whole")),
    (65, ("cache", "verify", "s3://PLACE/altered")),
    (65, ("cache", "verify", "s3://PLACE/nothing")),
    (0, ("cache", "copy", "s3://PLACE/whole", "s3://PLACE/copy")),
    (65, ("cache", "copy", "s3://PLACE/altered", "s3://PLACE/copy")),
    (64, ("cache", "copy", "s3://PLACE/whole", "s3://PLACE/whole/copy")),
    (0, ("cache", "export", "s3://PLACE/whole", "--format", "slime", "--output", "s3://PLACE/out.parquet")),
    (64, ("cache", "export", "s3://PLACE/whole", "--format", "slime", "--output", "s3://PLACE/out.jsonl")),
    (64, ("cache", "export", "s3://PLACE/whole", "--format", "slime", "--output", "s3://PLACE/o?.parquet")),
    (64, ("cache", "export", "s3://PLACE/whole", "--format", "slime", "--output", "s3://o.parquet")),
    (64, ("cache", "export", "s3://PLACE/whole", "--format", "jsonl", "--output", "s3://PLACE/there.jsonl")),
    (0, ("cache", "gc", "s3://PLACE")),
    (65, ("attest", "s3://PLACE/nothing", "--teacher", "s3://PLACE/nothing")),
    (64, ("attest", "s3://PLACE/attested", "--teacher", "s3://PLACE/other")),
    (64, ("attest", "s3://PLACE/trained", "--teacher", "s3://PLACE/other")),
    (0, ("attest", "s3://PLACE/student", "--teacher", "s3://PLACE/other")),
]


@pytest.fixture
def models(s3: str, tmp_path: Path) -> None:
    """A teacher, a student of which nothing is claimed, one of another claim and one with a recorded training."""
    teacher = identify(make_model(tmp_path / "teacher", seed=2), "org/teacher")
    publish(make_model(tmp_path / "other", seed=3), f"{s3}/other")
    publish(make_model(tmp_path / "student", seed=1), f"{s3}/student")
    for name, role in (("attested", "attested"), ("trained", "sft")):
        folder = make_model(tmp_path / name, seed=1)
        write_provenance(folder, Provenance(role=role, teacher=teacher))
        publish(folder, f"{s3}/{name}")


@pytest.mark.parametrize(("code", "words"), COMMANDS)
def test_a_password_in_a_url_is_repeated_nowhere(
    datasets: str, models: None, code: int, words: tuple[str, ...]
) -> None:
    Store(datasets).put("there.jsonl", b"dear to somebody")
    given = _given(tuple(word.replace("s3://PLACE", datasets) for word in words))
    assert any(PASSWORD in word for word in given)
    ran = lopd(*given)
    assert ran.code == code, ran.err
    assert ran.out + ran.err and PASSWORD not in ran.out + ran.err and USER not in ran.out + ran.err
    told = lopd(*given, "--json")
    assert PASSWORD not in told.out + told.err and USER not in told.out + told.err


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
        assert ran.returncode == 74 and "does not know these credentials" in ran.stderr
        assert leaks(ran.stdout + ran.stderr) == [] and secret not in ran.stdout + ran.stderr


def test_a_store_is_pickled_without_its_credentials(datasets: str) -> None:
    store = Store(f"{datasets}/whole")
    assert store.list()  # now it holds an open filesystem
    data = pickle.dumps(store)
    assert leaks(data.decode("latin-1")) == [] and ADMIN[0].encode() not in data
    assert pickle.loads(data).list() == store.list()
    assert leaks(repr(store)) == []
