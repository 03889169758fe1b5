"""Settings: frozen models, filled from defaults <- a TOML recipe <- LOPD_* variables <- flags, in that order.

One recipe file describes a whole experiment, a section per stage; a command reads its own section. A key that no
model knows is an error that names the nearest one, because a misspelt learning rate must not become a default.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UsageError

SECTIONS = ("sft_data", "sft", "rollouts", "score", "opd", "eval")
"""The stages a recipe may describe."""
OTHER_VARIABLES = ("LOPD_CACHE_DIR", "LOPD_CACHE_GB")
"""Variables of ours that are no settings of a stage."""


class Frozen(BaseModel):
    """Base of every settings and record model: immutable, and no unknown key gets in."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)


Model = TypeVar("Model", bound=Frozen)


def load_section(
    model: type[Model],
    file: str | Path | None,
    section: str,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Model:
    """Build `model` from the `[section]` of a recipe, the environment and the command line.

    Args:
        file: a TOML recipe, or None for defaults alone.
        section: one of `SECTIONS`; its variables are `LOPD_<SECTION>__<KEY>`.
        overrides: `key=value` texts, `nested.key=value` too. The value of a text setting is taken as it stands, any
            other is read as TOML.
        env: the environment; `os.environ` unless given.

    Raises:
        UsageError: the file cannot be read, a key is unknown, a value does not fit.
    """
    values = _read_section(Path(file), section) if file is not None else {}
    origin = dict.fromkeys(values, f"{file} [{section}]")
    for key, text, source in [
        *_from_environment(model, section, os.environ if env is None else env),
        *_from_overrides(overrides),
    ]:
        if text.strip() in ("", '""'):  # what an unset shell or make variable leaves behind
            raise UsageError(f"{key} is blank", where=source, fix=f"Give {key}=..., or leave it out")
        path = key.split(".")
        _assign(values, path, text if _is_text(model, path) else _parse(text), source)
        origin[key] = source
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explain(model, section, error, origin) from None


def _read_section(file: Path, section: str) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError("recipe not found", where=str(file), fix="Give the path of a .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe: {error}", where=str(file)) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the recipe is not valid TOML: {error}", where=str(file)) from None
    for name, body in recipe.items():
        if name not in SECTIONS or not isinstance(body, dict):
            raise UsageError(f"unknown section [{name}]", where=str(file), fix=did_you_mean(name, SECTIONS))
    return recipe.get(section, {})


def _from_environment(model: type[Frozen], section: str, env: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = sorted(name for name in env if name.startswith("LOPD_") and name not in OTHER_VARIABLES)
    prefixes = tuple(_prefix(each) for each in SECTIONS)
    for name in names:
        if not name.startswith(prefixes):
            raise UsageError("unknown variable", where=name, fix=_nearest_variable(name, model, section))
    prefix = _prefix(section)
    return [
        (name.removeprefix(prefix).lower().replace("__", "."), env[name], name)
        for name in names
        if name.startswith(prefix)
    ]


def _prefix(section: str) -> str:
    return f"LOPD_{section.upper()}__"


def _nearest_variable(name: str, model: type[Frozen], section: str) -> str:
    stage, separator, key = name.removeprefix("LOPD_").partition("__")
    near = difflib.get_close_matches(stage.lower(), SECTIONS, n=1, cutoff=0.5)
    if separator and near:
        return f"Did you mean {_prefix(near[0])}{key}?"
    settings = [f"{_prefix(section)}{field.upper()}" for field in model.model_fields]
    return did_you_mean(name, [*OTHER_VARIABLES, *settings])


def _from_overrides(overrides: Sequence[str]) -> list[tuple[str, str, str]]:
    parsed = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"cannot read the override {text!r}", fix="Write key=value")
        parsed.append((key.strip().replace("-", "_"), value, "command line"))
    return parsed


def _is_text(model: type[Frozen], path: Sequence[str]) -> bool:
    """Whether the setting is a text, so that `output=2026-11-22` and `name=true` stay what they are."""
    section = _section_at(model, path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    return field is not None and str in _alternatives(field.annotation)


def _section_at(model: type[Frozen], path: Sequence[str]) -> type[Frozen] | None:
    """The model of the nested settings under `path`; None where there are none."""
    for key in path:
        field = model.model_fields.get(key)
        inner = [each for each in _alternatives(field.annotation) if _is_section(each)] if field else []
        if not inner:
            return None
        model = inner[0]
    return model


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Frozen)


def _parse(text: str) -> Any:
    """A TOML value where the text is one (3, 1e-4, true, [1, 2]), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(values: dict[str, Any], path: list[str], value: Any, source: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UsageError(f"{'.'.join(path)} does not name a setting: {key} is a plain value", where=source)
    values[path[-1]] = value


def _explain(model: type[Frozen], section: str, error: ValidationError, origin: Mapping[str, str]) -> UsageError:
    # A misspelt key also leaves the right one unset; the misspelling is what the user has to see.
    first = next((each for each in error.errors() if each["type"] == "extra_forbidden"), error.errors()[0])
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    prefixes = [".".join(path[:depth]) for depth in range(len(path), 0, -1)]
    where = next((origin[prefix] for prefix in prefixes if prefix in origin), f"[{section}]")
    if first["type"] == "extra_forbidden":
        return UsageError(f"unknown key {key!r}", where=where, fix=did_you_mean(path[-1], _fields(model, path[:-1])))
    if first["type"] == "missing":
        return UsageError(f"{key} is not set", where=f"[{section}]", fix=f"Set it in the recipe or give {key}=...")
    problem = first["msg"].removeprefix("Value error, ")
    return UsageError(f"{key}: {problem}" if key else problem, where=where)


def _fields(model: type[Frozen], path: Sequence[str]) -> list[str]:
    section = _section_at(model, path)
    return list(section.model_fields) if section else []


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A sentence that names the nearest of `known`, or all of them when none is near; nothing where none is known."""
    if not known:
        return ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}"
