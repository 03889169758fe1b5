"""Code that a model brings along: when it is needed, and who may run it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError, UsageError
from common.models import read_config
from precompute.checks.remote_code import code_sha256, trusted_code
from precompute.config import Engine
from tests.precompute.conftest import Models

OWN = {"model_type": "strange", "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}}


def with_config(folder: Path, model: Path, **changes: Any) -> Path:
    """A copy of the model whose config.json says something else, with a file of code."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "odd.py").write_text("raise AssertionError('nobody may run this')\n")
    return folder


def _asked(folder: Path, name: str = "", **engine: Any) -> str | None:
    return trusted_code(folder, name or str(folder), read_config(folder), Engine(**engine))


def test_a_model_without_code_runs_none(models: Models) -> None:
    assert _asked(models.teacher) is None
    assert _asked(models.teacher, trust_remote_code=True) is None


def test_code_that_transformers_does_not_need_is_left_alone(models: Models, tmp_path: Path) -> None:
    folder = with_config(tmp_path / "known", models.teacher, auto_map=OWN["auto_map"])
    assert _asked(folder) is None
    assert _asked(folder, trust_remote_code=True, code_sha256=code_sha256(folder, "", read_config(folder)))


def test_code_that_is_needed_runs_only_when_asked_for_and_pinned(models: Models, tmp_path: Path) -> None:
    folder = with_config(tmp_path / "odd", models.teacher, **OWN)
    digest = code_sha256(folder, "", read_config(folder))
    with pytest.raises(UsageError, match=rf"needs code of its own \(odd.py\).*code_sha256 = {digest}"):
        _asked(folder)
    with pytest.raises(UsageError, match="no version of it is pinned"):
        _asked(folder, trust_remote_code=True)
    assert _asked(folder, trust_remote_code=True, code_sha256=digest) == digest
    (folder / "helper.py").write_text("import os\n")
    with pytest.raises(DataError, match=rf"not {digest}.*Read what changed"):
        _asked(folder, trust_remote_code=True, code_sha256=digest)


def test_a_hub_id_is_pinned_by_its_full_commit_alone(models: Models, tmp_path: Path) -> None:
    folder = with_config(tmp_path / "odd", models.teacher, **OWN)
    digest = code_sha256(folder, "", read_config(folder))
    assert _asked(folder, f"org/odd@{'a' * 40}", trust_remote_code=True) == digest
    for name in ("org/odd", "org/odd@main", f"org/odd@{'a' * 39}"):
        with pytest.raises(UsageError, match="full commit: org/odd@COMMIT"):
            _asked(folder, name, trust_remote_code=True)


def test_code_of_another_repository_or_none_at_all_is_refused(models: Models, tmp_path: Path) -> None:
    other = with_config(tmp_path / "other", models.teacher, **{**OWN, "auto_map": {"AutoConfig": "org/code--odd.Odd"}})
    with pytest.raises(DataError, match="another repository .org/code"):
        _asked(other, trust_remote_code=True)
    bare = with_config(tmp_path / "bare", models.teacher, **OWN)
    (bare / "odd.py").unlink()
    with pytest.raises(DataError, match="not here: config.json names odd"):
        _asked(bare)
