"""Models that bring Python code along, which runs on our box with all our rights.

Such code is run only when somebody asks for it and says which: a commit, or the hash of the files. That hash is part of
the plan, for other code computes other numbers.
"""

import re
from pathlib import Path

from common.canonical import canonical, sha256
from common.errors import DataError, UsageError
from common.models import ModelConfig, hub_repo
from precompute.config import Engine

ELSEWHERE = "--"
"""Stands in an `auto_map` between another repository and the class in it."""
COMMIT = re.compile(r".+@[0-9a-f]{40}")


def trusted_code(folder: Path, name: str, model: ModelConfig, engine: Engine) -> str | None:
    """The sha256 of the code that loading this model will run; None when it runs none.

    A model whose type transformers knows by itself needs no code of its own, though it may name some.

    Args:
        name: Hub id, folder or URL under which the model was asked for.

    Raises:
        UsageError: it needs code, and nobody said that it may run, or not which.
        DataError: its code is not here, lies in another repository, or is not the one that was pinned.
    """
    if not model.code or not (engine.trust_remote_code or _is_unknown(model.model_type)):
        return None
    here = code_sha256(folder, name, model)
    files = ", ".join(sorted({f"{each.rpartition('.')[0]}.py" for each in model.code}))
    by_hash = f"engine.trust_remote_code = true and engine.code_sha256 = {here}"
    if not engine.trust_remote_code:
        raise UsageError(f"the model needs code of its own ({files})", where=name, fix=f"Read it; then set {by_hash}")
    if engine.code_sha256 is None and not (hub_repo(name) and COMMIT.fullmatch(name)):
        commit = f", or name its full commit: {hub_repo(name)}@COMMIT" if hub_repo(name) else ""
        raise UsageError(
            f"the model brings code of its own ({files}), and no version of it is pinned",
            where=name,
            fix=f"Read it; then set {by_hash}{commit}",
        )
    if engine.code_sha256 not in (None, here):
        raise DataError(
            f"the model's code ({files}) has sha256 {here}, not {engine.code_sha256}",
            where=name,
            fix="Read what changed; then pin it anew",
        )
    return here


def code_sha256(folder: Path, name: str, model: ModelConfig) -> str:
    """Hash of every Python file in the folder, for each may import the others."""
    elsewhere = [each for each in model.code if ELSEWHERE in each]
    if elsewhere:
        raise DataError(
            f"the model's code lies in another repository ({elsewhere[0].partition(ELSEWHERE)[0]}), with no pin",
            where=name,
            fix="Put the code into the model's own folder and mend auto_map in its config.json",
        )
    files = {file.relative_to(folder).as_posix(): sha256(file.read_bytes()) for file in sorted(folder.rglob("*.py"))}
    for each in model.code:
        if f"{each.rpartition('.')[0]}.py" not in files:
            raise DataError(
                f"the model's code is not here: config.json names {each}", where=name, fix="Fetch the model again"
            )
    return sha256(canonical(files))


def _is_unknown(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

    return model_type not in CONFIG_MAPPING_NAMES
