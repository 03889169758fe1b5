import socket

import pytest

from common.status_files import STATUS_FILE, box_name, status_key


@pytest.mark.parametrize(
    "host", ["gpu-1.cluster.local", "", "../../etc", "ünïcödé", "x" * 300, ".hidden", "a b\n\x1b[31m"]
)
def test_whatever_a_host_is_called_its_status_has_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    key = status_key(box_name())
    assert STATUS_FILE.fullmatch(key) and key.isprintable() and key.count("/") == 1


def test_a_box_is_named_by_its_host_and_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-1.local")
    monkeypatch.setattr("os.getpid", lambda: 4711)
    assert status_key(box_name()) == "status/gpu-1.local-4711.json"


@pytest.mark.parametrize("box", ["", "../plan", "a/b", ".hidden", "a b", "x" * 200])
def test_what_is_no_name_of_a_box_has_none(box: str) -> None:
    with pytest.raises(ValueError, match="no name of a box"):
        status_key(box)
