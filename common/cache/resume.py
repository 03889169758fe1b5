"""The command that goes on with an unfinished dataset, as its plan tells it."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from common.chat import Template
from common.models import pinned
from common.plans import Plan


def resume_command(plan: Plan, url: str) -> str:
    """The command that goes on with the dataset, with what the plan knows of it; words in CAPITALS are to be filled in.

    Another setting than the plan's is refused by the command itself, which then names it.
    """
    if plan["kind"] == "scored":
        teacher = pinned(plan["teacher"]["name"], plan["teacher"]["revision"])
        words = ["lopd", "precompute", "score", "--rollouts", "ROLLOUTS", "--teacher", teacher]
        words += ["--topk", str(plan["topk"])] if plan["topk"] else []
        words += ["--set", "topk_support=student"] if plan.get("topk_support") == "student" else []
        words += ["--allow-teacher-mismatch"] if "teacher-mismatch" in plan["overrides"] else []
        words += _engine_words(plan.get("scoring_engine", {}))
    else:
        verb = {"sft": "sft-data", "rollouts": "rollouts"}[plan["kind"]]
        model = pinned(plan["policy"]["name"], plan["policy"]["revision"])
        words = ["lopd", "precompute", verb, "--model", model, "--prompts", "PROMPTS"]
        words += [word for key, value in _settings(plan) for word in ("--set", f"{key}={value}")]
        words += _engine_words(plan.get("engine", {}))
    return shlex.join([*words, "--cache", url])


def fill_in(plan: Plan) -> str:
    """What the word in CAPITALS stands for."""
    if plan["kind"] == "scored":
        return f"ROLLOUTS is the dataset whose manifest has sha256 {plan['parent']}"
    prompts = plan["prompts"]
    return f"PROMPTS are the same {prompts['count']} prompts as before, of sha256 {prompts['sha256']}"


def _settings(plan: Plan) -> list[tuple[str, str]]:
    """The plan's sampling, shards, template and filters as `--set` takes them; most that is the default is left out."""
    values = {f"sampling.{key}": value for key, value in sorted(plan["sampling"].items())}
    values |= {key: plan[key] for key in ("prompts_per_shard", "keep_text") if key in plan}
    values |= {"topk": plan["rollout_topk"]} if "rollout_topk" in plan else {}
    tuned = (plan["lineage"] or {}).get("template") if plan["kind"] == "rollouts" else None
    default = Template().model_dump(mode="json") if tuned is None else tuned
    values |= {"template": plan["template"]} if plan["template"] != default else {}
    return [(key, _toml(value)) for key, value in values.items()] + _filters(plan)


def _filters(plan: Plan) -> list[tuple[str, str]]:
    """The filters that are on; a verifier by the name it had where the dataset was begun. Texts stand as they are."""
    on = {key: value for key, value in (plan.get("filters") or {}).items() if value not in (None, False)}
    named = {key: value["name"] if isinstance(value, Mapping) else value for key, value in on.items()}
    return [(f"filters.{key}", value if isinstance(value, str) else _toml(value)) for key, value in named.items()]


def _engine_words(engine: Mapping[str, str]) -> list[str]:
    values = {key: engine[key] for key in ("dtype", "head_dtype") if key in engine}
    if "code_sha256" in engine:
        values |= {"trust_remote_code": "true", "code_sha256": engine["code_sha256"]}
    return [word for key, value in values.items() for word in ("--set", f"engine.{key}={value}")]


def _toml(value: Any) -> str:
    """The value on one line of TOML, which knows no null: such a key is left out."""
    if isinstance(value, Mapping):
        inner = (f"{_text(key)} = {_toml(one)}" for key, one in value.items() if one is not None)
        return f"{{{', '.join(inner)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(one) for one in value)}]"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    """A TOML string of visible characters alone, so that a terminal shows it as it is."""
    characters = (one if one.isprintable() and one not in '"\\' else f"\\U{ord(one):08x}" for one in text)
    return f'"{"".join(characters)}"'
