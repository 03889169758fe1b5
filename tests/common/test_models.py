import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import close_session

from common.errors import DataError, LopdError, RetryLater, StorageError, UsageError
from common.lineage import PROVENANCE, Provenance, identify, read_provenance, same_model, write_provenance
from common.models import ModelConfig, publish, read_config, reference, resolve
from common.storage import Store
from tests.common.tiny_models import make_model, make_weights


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def cached_models(cache: Path) -> list[Path]:
    return sorted((cache / "models").iterdir())


def test_a_folder_is_taken_as_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(model)) == model
    monkeypatch.chdir(model.parent)
    assert resolve("model").resolve() == model
    assert resolve("./model/").resolve() == model


def test_a_published_model_is_fetched_once_and_is_the_same(s3: str, model: Path, own_cache: Path) -> None:
    publish(model, f"{s3}/model")
    fetched = resolve(f"{s3}/model")

    assert same_model(identify(fetched, "x"), identify(model, "y"))
    assert {file.name for file in fetched.iterdir()} == {file.name for file in model.iterdir()}
    (fetched / "mark").touch()
    assert (resolve(f"{s3}/model/") / "mark").exists()
    assert cached_models(own_cache) == [fetched]


def test_a_model_published_anew_is_fetched_anew(s3: str, model: Path) -> None:
    """Even where only the weights changed, and not their size."""
    publish(model, s3)
    before = resolve(s3)
    make_weights(model, seed=7)
    publish(model, s3)
    after = resolve(s3)

    assert before != after
    assert same_model(identify(after, "x"), identify(model, "x"))


def test_a_fetched_model_whose_weights_are_not_its_own_is_refused_every_time(s3: str, model: Path) -> None:
    write_provenance(model, Provenance(role="sft"))
    make_weights(model, seed=7)
    publish(model, s3)

    for _ in range(2):
        with pytest.raises(DataError, match="weights were changed after their provenance"):
            resolve(s3)


def test_a_claim_made_after_the_weights_were_fetched_costs_no_second_fetch(
    s3: str, model: Path, own_cache: Path
) -> None:
    publish(model, s3)
    fetched = resolve(s3)
    claim = write_provenance(model, Provenance(role="attested"))
    Store(s3).put(PROVENANCE, (model / PROVENANCE).read_bytes())

    assert resolve(s3) == fetched
    assert read_provenance(fetched) == claim
    Store(s3).remove(PROVENANCE)
    assert read_provenance(resolve(s3)) is None
    assert cached_models(own_cache) == [fetched]


def test_half_a_published_model_is_no_model(location: str, model: Path) -> None:
    publish(model, location)
    config = json.loads(Store(location).get("config.json"))
    half = Store(f"{location}-half")
    for entry in Store(location).list():
        if entry.name != "config.json":
            half.put(entry.name, Store(location).get(entry.name))

    assert config["vocab_size"] > 0
    with pytest.raises(DataError, match="no config.json"):
        resolve(half.url)


def test_an_interrupted_fetch_is_begun_again(s3: str, model: Path, own_cache: Path) -> None:
    publish(model, s3)
    fetched = resolve(s3)
    (fetched / "config.json").unlink()
    (fetched / "model.safetensors").write_bytes(b"half")

    assert same_model(identify(resolve(s3), "x"), identify(model, "x"))


@pytest.mark.parametrize("name", ["", "   "])
def test_no_model_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="no model is named.*MODEL="):
        resolve(name)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"there is no such model .{tmp_path}/none"):
        resolve(str(tmp_path / "none"))


def test_a_file_is_no_model(model: Path) -> None:
    with pytest.raises(UsageError, match="there is no such model"):
        resolve(str(model / "config.json"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no config.json") as raised:
        resolve(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_a_url_without_a_model_is_refused(s3: str) -> None:
    with pytest.raises(DataError, match=f"no config.json .{s3}"):
        resolve(s3)


def test_a_file_url_is_the_folder_itself(model: Path, tmp_path: Path) -> None:
    assert resolve(f"file://{model}") == model
    with pytest.raises(UsageError, match="there is no such model"):
        resolve(f"file://{tmp_path}/none")


def test_a_file_url_is_decoded(tmp_path: Path) -> None:
    model = make_model(tmp_path / "my größe")
    assert resolve(model.as_uri()) == model
    assert reference(model.as_uri()) == str(model)


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path, status: int = 200, endpoint: str | None = None) -> Iterator[None]:
    """The Hub switched on, at a server that answers everything with `status`, or at `endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    own = f"http://127.0.0.1:{server.server_port}"
    for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.constants.ENDPOINT"):
        monkeypatch.setattr(name, endpoint or own)
    close_session()  # the Hub's client keeps one, made when the Hub was switched off
    try:
        yield
    finally:
        close_session()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [(404, UsageError, "there is no such model"), (503, RetryLater, "the Hub cannot be reached: HfHubHTTPError")],
)
def test_what_the_hub_answers_decides_between_a_wrong_name_and_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[LopdError], words: str
) -> None:
    with hub(monkeypatch, tmp_path, status), pytest.raises(kind, match=words) as raised:
        resolve("org/name")
    assert "org/name" in str(raised.value) and "\n" not in str(raised.value)


def test_a_lost_network_is_for_another_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(RetryLater, match=r"the Hub cannot be reached: ConnectError \(org/name")
    with hub(monkeypatch, tmp_path, endpoint="http://127.0.0.1:9"), refused:
        resolve("org/name")


def test_a_full_disk_under_the_hub_cache_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.models.snapshot_download", full)
    with pytest.raises(StorageError, match=r"no space left \(org/name"):
        resolve("org/name")


@pytest.mark.parametrize("name", ["org/no-such-model", "org/no-such-model@v1", "plain-name"])
def test_a_hub_id_that_cannot_be_had_is_one_line(name: str) -> None:
    with pytest.raises(UsageError, match="there is no such model") as raised:
        resolve(name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_the_config_says_vocabulary_context_and_ends(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert read_config(model) == ModelConfig(
        vocab_size=config["vocab_size"], max_positions=64, eos_token_ids=(0,), model_type=config["model_type"]
    )

    (model / "generation_config.json").write_text('{"eos_token_id": [5, 0, 3]}')
    assert read_config(model).eos_token_ids == (0, 3, 5)
    (model / "config.json").write_text('{"vocab_size": 8, "max_position_embeddings": 16}')
    assert read_config(model) == ModelConfig(vocab_size=8, max_positions=16, eos_token_ids=(0, 3, 5))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"vocab_size": 8}', '{"vocab_size": null, "max_position_embeddings": "x"}']
)
def test_a_malformed_config_is_one_line(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(LopdError, match="config.json") as raised:
        read_config(model)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 65
