from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from common.config import SECTIONS, Frozen, did_you_mean, load_section
from common.errors import UsageError


class Sampling(Frozen):
    temperature: float = 1.0
    name: str = "plain"
    stop_ids: tuple[int, ...] = ()


class Template(Frozen):
    system: str | None = None
    arguments: dict[str, Any] = {}


class Settings(Frozen):
    learning_rate: float = Field(default=1e-3, gt=0)
    steps: int = 10
    model: str | None = None
    sampling: Sampling = Sampling()
    template: Template | None = None

    @model_validator(mode="after")
    def _check_model(self) -> "Settings":
        if self.model == "forbidden":
            raise ValueError("this model is forbidden")
        return self


class Needy(Frozen):
    data: str


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text("[opd]\nlearning_rate = 2e-6\nsteps = 20\n[opd.sampling]\nstop_ids = [1, 2]\n[sft]\nanything = 1\n")
    return file


def test_without_a_recipe_the_defaults_hold() -> None:
    assert load_section(Settings, None, "opd", env={}) == Settings()


def test_flags_win_over_environment_over_recipe_over_defaults(recipe: Path) -> None:
    env = {"LOPD_OPD__STEPS": "30", "LOPD_OPD__MODEL": "from-env", "LOPD_SFT__STEPS": "99", "OTHER": "1"}
    settings = load_section(Settings, recipe, "opd", ["model=from-flag"], env)

    assert settings.learning_rate == 2e-6
    assert settings.steps == 30
    assert settings.model == "from-flag"
    assert settings.sampling == Sampling(temperature=1.0, stop_ids=(1, 2))


def test_the_process_environment_is_read_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPD_OPD__STEPS", "7")
    assert load_section(Settings, None, "opd").steps == 7
    assert load_section(Settings, None, "opd", env={}).steps == 10


def test_a_command_reads_its_own_section_alone(recipe: Path) -> None:
    assert load_section(Settings, recipe, "eval", env={}) == Settings()


def test_nested_keys_are_set_from_flags_and_environment(recipe: Path) -> None:
    env = {"LOPD_OPD__SAMPLING__TEMPERATURE": "0.5"}
    settings = load_section(Settings, recipe, "opd", ["sampling.stop_ids=[3]"], env)
    assert settings.sampling == Sampling(temperature=0.5, stop_ids=(3,))


def test_a_blank_value_is_an_error_and_not_a_default() -> None:
    with pytest.raises(UsageError, match="model is blank"):
        load_section(Settings, None, "opd", ["model="], env={})


def test_a_blank_variable_is_an_error_too() -> None:
    with pytest.raises(UsageError, match=r"model is blank \(LOPD_OPD__MODEL\)"):
        load_section(Settings, None, "opd", env={"LOPD_OPD__MODEL": ""})


WORDS = [
    "2026-11-22",
    "1_000",
    "true",
    "12e4567",
    "0x10",
    "[1]",
    "1e3",
    "07:32:00",
    "inf",
    "{a = 1}",
    '"quoted"',
    "a=b",
]


@pytest.mark.parametrize("word", WORDS)
def test_the_value_of_a_text_setting_stays_what_it_is(word: str) -> None:
    flags = [f"model={word}", f"sampling.name={word}", f"template.system={word}"]
    env = {f"LOPD_OPD__{flag.partition('=')[0].upper().replace('.', '__')}": word for flag in flags}
    for settings in (load_section(Settings, None, "opd", flags, {}), load_section(Settings, None, "opd", env=env)):
        assert (settings.model, settings.sampling.name) == (word, word)
        assert settings.template is not None and settings.template.system == word


def test_what_is_no_text_setting_is_read_as_toml() -> None:
    flags = ["template.arguments.enable_thinking=false", "steps=1_000"]
    settings = load_section(Settings, None, "opd", flags, {})
    assert settings.steps == 1000
    assert settings.template == Template(arguments={"enable_thinking": False})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("LOPD_ODP__STEPS", "Did you mean LOPD_OPD__STEPS?"),
        ("LOPD_SFTDATA__LIMIT", "Did you mean LOPD_SFT_DATA__LIMIT?"),
        ("LOPD_OPD_STEPS", "Did you mean 'LOPD_OPD__STEPS'?"),
        ("LOPD_CACHEDIR", "Did you mean 'LOPD_CACHE_DIR'?"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="unknown variable") as raised:
        load_section(Settings, None, "opd", env={name: "1"})
    assert name in str(raised.value) and nearest in str(raised.value)


def test_the_other_variables_are_known() -> None:
    env = {"LOPD_CACHE_DIR": "/x", "_LOPD_COMPLETE": "bash_source", "LOPD_EVAL__ANY": "1"}
    assert load_section(Settings, None, "opd", env=env) == Settings()


def test_dashes_and_equals_signs_in_flags_are_understood() -> None:
    settings = load_section(Settings, None, "opd", ["learning-rate=1e-5", "model=s3://b/x?a=b"], env={})
    assert (settings.learning_rate, settings.model) == (1e-5, "s3://b/x?a=b")


@given(st.integers(-(10**9), 10**9), st.floats(1e-9, 1e9))
def test_numbers_are_read_as_they_are_written(steps: int, rate: float) -> None:
    settings = load_section(Settings, None, "opd", [f"steps={steps}", f"learning_rate={rate}"], env={})
    assert (settings.steps, settings.learning_rate) == (steps, rate)


@pytest.mark.parametrize(
    ("toml", "env", "flags", "source"),
    [
        ("[opd]\nlerning_rate = 1.0", {}, [], "recipe.toml [opd]"),
        ("", {"LOPD_OPD__LERNING_RATE": "1"}, [], "LOPD_OPD__LERNING_RATE"),
        ("", {}, ["lerning_rate=1"], "command line"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_where_it_stands(
    tmp_path: Path, toml: str, env: dict[str, str], flags: list[str], source: str
) -> None:
    (tmp_path / "recipe.toml").write_text(toml)
    with pytest.raises(UsageError, match="unknown key 'lerning_rate'") as raised:
        load_section(Settings, tmp_path / "recipe.toml", "opd", flags, env)
    assert source in str(raised.value)
    assert "Did you mean 'learning_rate'?" in str(raised.value)


def test_an_unknown_nested_key_names_the_nearest_and_its_own_source(recipe: Path) -> None:
    recipe.write_text("[opd.sampling]\ntemprature = 1.0")
    with pytest.raises(UsageError, match="'sampling.temprature'.*recipe.toml.*Did you mean 'temperature'"):
        load_section(Settings, recipe, "opd", ["sampling.stop_ids=[1]"], env={})
    recipe.write_text("[opd.sampling]\ntemperature = 1.0")
    with pytest.raises(UsageError, match="'sampling.stop_idz'.*command line.*Did you mean 'stop_ids'"):
        load_section(Settings, recipe, "opd", ["sampling.stop_idz=[1]"], env={})


@pytest.mark.parametrize("toml", ["[odp]\nsteps = 1", "odp = 1"])
def test_an_unknown_section_names_the_nearest(tmp_path: Path, toml: str) -> None:
    (tmp_path / "recipe.toml").write_text(toml)
    with pytest.raises(UsageError, match=r"unknown section \[odp\].*Did you mean 'opd'"):
        load_section(Settings, tmp_path / "recipe.toml", "opd", env={})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("steps=many", "steps: .*valid integer.*command line"),
        ("learning_rate=-1", "learning_rate: .*greater than 0"),
        ("sampling=1", "sampling: "),
        ("sampling.stop_ids=[1, 'x']", "sampling.stop_ids.1: .*valid integer.*command line"),
        ("steps.deeper=1", "steps is a plain value"),
        ("model=forbidden", "^this model is forbidden"),
        ("nothing", "cannot read the override 'nothing'.*key=value"),
        ("=1", "unknown key"),
    ],
)
def test_a_value_that_does_not_fit_says_which_and_why(flag: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        load_section(Settings, None, "opd", ["steps=3", flag], env={})
    assert "\n" not in str(raised.value)


def test_a_key_that_must_be_set_says_how() -> None:
    with pytest.raises(UsageError, match=r"data is not set \(\[opd\]\).*data=\.\.\."):
        load_section(Needy, None, "opd", env={})


def test_bad_toml_says_where(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[opd]\nsteps = = 1\n")
    with pytest.raises(UsageError, match=r"not valid TOML: .*line 2.*recipe.toml"):
        load_section(Settings, tmp_path / "recipe.toml", "opd", env={})


def test_a_recipe_that_cannot_be_read_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="recipe not found .*none.toml"):
        load_section(Settings, tmp_path / "none.toml", "opd", env={})
    for path in (tmp_path, tmp_path / "binary.toml", tmp_path / "binary.toml" / "below"):
        with pytest.raises(UsageError, match="cannot read the recipe"):
            load_section(Settings, path, "opd", env={})


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError):
        Settings().steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_far_from_everything_all_that_is_known_is_named() -> None:
    assert did_you_mean("zzz", SECTIONS) == f"Known: {', '.join(SECTIONS)}"
    assert did_you_mean("zzz", []) == ""
