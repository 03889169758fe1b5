"""`lopd precompute`: sample, score, or both in one go."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from common.config import load_section
from common.errors import UsageError
from common.prompts import PromptSet, load_prompts
from common.terminal import say_json, say_table
from precompute.audit.command import audit
from precompute.config import Generate, Score
from precompute.fleet.status_command import status
from precompute.summary import summary

if TYPE_CHECKING:
    from precompute.phases import Outcome

Command = Callable[..., Any]
SAMPLING_FLAGS = ("samples", "max_tokens", "seed", "temperature", "top_p")
FLEET_FLAGS = ("replicas", "worker_index", "worker_count", "on", "price_per_hour", "grace_s", "status_file")
"""Flags that are settings of these tables of a phase."""


@click.group()
def group() -> None:
    """On the GPU box: sample rollouts and score them with the teacher.

    \b
    Example: lopd precompute run --model s3://bucket/sft-model --prompts p.jsonl --cache s3://bucket/run1

    \b
    Exit codes: 64 usage, 65 data, 74 storage, 75 try again, 130 and 143 stopped by Ctrl-C and SIGTERM. After the last
    three the same command resumes: what is committed is kept.
    """


group.add_command(audit)
group.add_command(status)


def _generation_flags(command: Command) -> Command:
    flags = [
        click.option("--model", help="Who samples: Hub id, folder or URL."),
        click.option("--prompts", help=".jsonl, .parquet, a folder of them, or hf://datasets/ORG/NAME; any URL."),
        click.option("--prompt-column", help="Column of the prompt, when it is not a usual one."),
        click.option("--limit", type=int, help="Only the first so many prompts."),
        click.option("--samples", type=int, help="Completions a prompt."),
        click.option("--max-tokens", type=int, help="Longest completion."),
        click.option("--temperature", type=float, help="1 for the model's own distribution."),
        click.option("--top-p", type=float, help="Sample from the likeliest tokens of this share alone; 1 for all."),
        click.option("--seed", type=int, help="Seed of the sampling plan."),
    ]
    return _with_flags(command, flags)


def _with_flags(command: Command, flags: Sequence[Callable[[Command], Command]]) -> Command:
    for flag in reversed(flags):
        command = flag(command)
    return command


def _teacher_flags(command: Command) -> Command:
    flags = [
        click.option("--teacher", help="Hub id, folder or URL; the SFT teacher in the student's lineage unless given."),
        click.option("--topk", type=int, help="Teacher's most likely tokens to store at each position."),
        click.option(
            "--allow-teacher-mismatch",
            is_flag=True,
            default=None,
            help="Another teacher; stamped into all that follows.",
        ),
    ]
    return _with_flags(command, flags)


def _fleet_flags(command: Command) -> Command:
    flags = [
        click.option("--replicas", type=int, help="Engines at once; as many as the GPUs allow unless given."),
        click.option("--worker-index", type=int, help="Of several boxes on one dataset, which this is, from 0."),
        click.option("--worker-count", type=int, help="How many boxes there are. A hint: any number may come and go."),
        click.option("--on", type=click.Choice(["box", "ray"]), help="This box, or the Ray cluster that is running."),
        click.option("--price-per-hour", type=float, help="Of this box; the cost so far is shown."),
        click.option("--status", "status_file", help="Local file that always holds how it stands, as JSON."),
        click.option("--grace", "grace_s", type=float, help="Seconds that shards in flight have after SIGTERM."),
    ]
    return _with_flags(command, flags)


def _common_flags(command: Command) -> Command:
    flags = [
        click.option("--config", type=click.Path(), help="Recipe (TOML); flags go over it."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting, as in a recipe."
        ),
    ]
    return _with_flags(command, flags)


@group.command("sft-data")
@_generation_flags
@click.option("--cache", help="URL of the dataset to make.")
@_fleet_flags
@_common_flags
def sft_data(config: str | None, settings: tuple[str, ...], **flags: Any) -> None:
    """Sample the teacher's answers, on which the student is then fine-tuned.

    By default every answer is kept. Filters (--set filters.KEY=VALUE, or [sft_data.filters] in a recipe):
    drop_truncated, min_tokens, max_tokens, drop_loops, max_repetition, drop_duplicates, per_prompt; and a verifier,
    `math-verify` or a function of yours of (completion, meta) -> bool, whose verdict stands in every row's meta and,
    with keep=correct, decides.

    \b
    Examples:
      lopd precompute sft-data --model Qwen/Qwen3-8B --prompts p.jsonl --cache s3://bucket/run1/sft
    Four answers a prompt, cooler; of those found correct, two at most:
      lopd precompute sft-data --model Qwen/Qwen3-8B --prompts p.jsonl --cache s3://bucket/run1/sft \\
        --samples 4 --temperature 0.6 --top-p 0.95 --set filters.drop_truncated=true \\
        --set filters.verifier=math-verify --set filters.keep=correct --set filters.per_prompt=2
    Judged by a function of yours:
      lopd precompute sft-data --model Qwen/Qwen3-8B --prompts p.jsonl --cache s3://bucket/run1/sft \\
        --set filters.verifier=checks/mine.py:is_right
    """
    _generate("sft", "sft_data", config, settings, flags)


@group.command()
@_generation_flags
@click.option("--cache", help="URL of the dataset to make.")
@_fleet_flags
@_common_flags
def rollouts(config: str | None, settings: tuple[str, ...], **flags: Any) -> None:
    """Sample the student's rollouts.

    \b
    Example: lopd precompute rollouts --model s3://bucket/sft-model --prompts p.jsonl --cache s3://bucket/run1/rollouts
    """
    _generate("rollouts", "rollouts", config, settings, flags)


@group.command()
@click.option("--rollouts", help="URL of the dataset of rollouts.")
@_teacher_flags
@click.option("--cache", help="URL of the scored dataset to make.")
@_fleet_flags
@_common_flags
def score(config: str | None, settings: tuple[str, ...], **flags: Any) -> None:
    """Score rollouts: the teacher's log-prob of every sampled token.

    \b
    Example: lopd precompute score --rollouts s3://bucket/run1/rollouts --cache s3://bucket/run1/scored
    """
    from precompute.phases import make_scores

    _report(make_scores(load_section(Score, config, "score", [*settings, *_as_settings(flags)])))


@group.command()
@_generation_flags
@_teacher_flags
@click.option("--cache", help="URL under which both datasets go: <cache>/rollouts and <cache>/scored.")
@_fleet_flags
@_common_flags
def run(
    config: str | None,
    settings: tuple[str, ...],
    teacher: str | None,
    topk: int | None,
    allow_teacher_mismatch: bool | None,
    cache: str | None,
    **flags: Any,
) -> None:
    """Both phases, one after the other: sample the student's rollouts, then have the teacher score them.

    A setting of one phase is given as --set rollouts.KEY=VALUE or --set score.KEY=VALUE. Run again to resume.

    \b
    Example: lopd precompute run --model s3://bucket/sft-model --prompts p.jsonl --cache s3://bucket/run1
    """
    generate, score = _both_sections(config, settings, teacher, topk, allow_teacher_mismatch, cache, flags)
    from precompute.phases import make_rollouts, make_scores

    prompts = load_prompts(generate.prompts, generate.prompt_column, generate.limit)
    _report(make_rollouts("rollouts", generate, prompts, scoring=score))
    _report(make_scores(score, patience_s=score.fleet.storage_patience_s))


@group.command()
@_generation_flags
@_teacher_flags
@click.option("--cache", help="URL under which both datasets would go: <cache>/rollouts and <cache>/scored.")
@_fleet_flags
@click.option("--pilot", type=click.IntRange(min=0), default=16, show_default=True, help="Prompts to try; 0 for none.")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout instead of text.")
@_common_flags
def plan(
    config: str | None,
    settings: tuple[str, ...],
    teacher: str | None,
    topk: int | None,
    allow_teacher_mismatch: bool | None,
    cache: str | None,
    pilot: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """What `run` would take with the same flags, before it takes it: shards, tokens, bytes, hours and money.

    Whatever would be refused is refused here. Then a pilot of some prompts, drawn at random, goes through both models
    on one replica, into a folder that is removed. Low and high are what the pilot leaves open.

    \b
    Example: lopd precompute plan --model s3://bucket/sft-model --prompts p.jsonl --cache s3://bucket/run1 \\
               --pilot 32 --price-per-hour 2.5
    """
    from precompute.forecast.forecast import forecast
    from precompute.forecast.text import show

    generate, score = _both_sections(config, settings, teacher, topk, allow_teacher_mismatch, cache, flags)
    prompts = load_prompts(generate.prompts, generate.prompt_column, generate.limit)
    result = forecast(generate, score, prompts, pilot, tell=lambda line: click.echo(line, err=True))
    if as_json:
        say_json(result.model_dump(mode="json"))
    else:
        show(result)


def _both_sections(
    config: str | None,
    settings: Sequence[str],
    teacher: str | None,
    topk: int | None,
    allow_teacher_mismatch: bool | None,
    cache: str | None,
    flags: dict[str, Any],
) -> tuple[Generate, Score]:
    """The settings of both phases, of which the first makes what the second reads."""
    if not flags["model"] and not config:
        raise UsageError("MODEL (--model) is not given", fix="See `lopd precompute run --help`")
    if not cache:
        raise UsageError("CACHE (--cache) is not given", fix="See `lopd precompute run --help`")
    base = cache.rstrip("/")
    shared = {name: flags.pop(name) for name in FLEET_FLAGS}
    generation = [*_settings_of("rollouts", settings), *_as_settings({**flags, **shared, "cache": f"{base}/rollouts"})]
    scoring = {"teacher": teacher, "topk": topk, "allow_teacher_mismatch": allow_teacher_mismatch}
    places = {"rollouts": f"{base}/rollouts", "cache": f"{base}/scored"}
    return (
        load_section(Generate, config, "rollouts", generation),
        load_section(
            Score, config, "score", [*_settings_of("score", settings), *_as_settings({**scoring, **shared, **places})]
        ),
    )


def _generate(kind: str, section: str, config: str | None, settings: Sequence[str], flags: dict[str, Any]) -> None:
    from precompute.phases import make_rollouts

    parsed = load_section(Generate, config, section, [*settings, *_as_settings(flags)])
    prompts: PromptSet = load_prompts(parsed.prompts, parsed.prompt_column, parsed.limit)
    _report(make_rollouts(kind, parsed, prompts))


def _as_settings(flags: dict[str, Any]) -> list[str]:
    """Flags as `key=value` settings; a flag that was not given is none."""
    nested = {name: f"sampling.{name}" for name in SAMPLING_FLAGS} | {name: f"fleet.{name}" for name in FLEET_FLAGS}
    return [f"{nested.get(key, key)}={_word(value)}" for key, value in flags.items() if value is not None]


def _word(value: str | float | bool) -> str:
    """The value as a setting holds it: texts as they stand, numbers and booleans as in TOML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settings_of(section: str, settings: Sequence[str]) -> list[str]:
    known = ("rollouts.", "score.")
    for setting in settings:
        if not setting.startswith(known):
            raise UsageError(
                f"--set {setting} names no phase", fix="Write --set rollouts.KEY=VALUE or --set score.KEY=VALUE"
            )
    return [setting.removeprefix(f"{section}.") for setting in settings if setting.startswith(f"{section}.")]


def _report(outcome: "Outcome") -> None:
    dataset, state = outcome.dataset, "already complete" if outcome.skipped else "complete"
    if dataset.plan["overrides"]:
        click.echo(f"warning: overridden checks: {', '.join(dataset.plan['overrides'])}", err=True)
    say_table(summary(dataset.plan, dataset.shards))
    click.echo(f"{dataset.url}: {state}, {dataset.num_rows:,} rows, {dataset.num_tokens:,} completion tokens")
