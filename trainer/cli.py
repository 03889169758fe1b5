"""The commands of the trainer: `sft`, `opd` and `eval`."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import click
import torch
from torch.distributed import is_torchelastic_launched
from torch.distributed.distributed_c10d import get_node_local_rank
from transformers.utils import logging as transformers_logging

from common.cli import guard
from common.config import Frozen, load_section
from common.dataset import open_dataset
from common.errors import LopdError, UsageError
from common.progress import Progress
from trainer.config import EvalConfig, OpdConfig, SftConfig, TrainConfig
from trainer.evaluate import evaluate
from trainer.launch import launch
from trainer.loop import Stopped, train
from trainer.world import joined, kind_of

Model = TypeVar("Model", bound=Frozen)
FIRST_SPEAKS_S = 3.0
"""An error that all ranks share is told by rank 0; the launcher ends the others within this time, and only one that is
still alive after it has something of its own to say."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--ranks", type=click.IntRange(min=1), help="Processes on this machine, one a GPU.  [default: 1]")
@click.pass_context
def group(ctx: click.Context, ranks: int | None) -> None:
    """Train a student from a finished dataset. No teacher runs.

    \b
    python -m trainer --ranks 8 sft recipes/qwen3-4b.toml model=Qwen/Qwen3-4B-Base data=s3://b/sft output=s3://b/sft-run
    python -m trainer --ranks 8 opd recipes/qwen3-4b.toml model=s3://b/sft-run/export data=s3://b/scored output=s3://b/opd
    python -m trainer eval model=s3://b/opd/export teacher=Qwen/Qwen3-8B data=s3://b/held-out output=kl.json

    Over several machines torchrun starts the ranks: `torchrun --nnodes 2 --nproc-per-node 8 -m trainer opd ...`.

    Settings come from the recipe's section, then LOPD_<SECTION>__<KEY> variables, then key=value words.
    `python -m trainer sft --settings` lists them. Exit codes: 64 usage, 65 data, 74 storage, 75 try again, 143 SIGTERM.
    """
    if ranks is None or is_torchelastic_launched():
        return
    if ranks > 1 and ctx.invoked_subcommand == "eval":
        raise UsageError("eval runs in one process", where="--ranks", fix="Leave --ranks out")
    if ranks > 1:
        ctx.exit(launch(ranks, sys.argv[1:]))


def _show_settings(model: type[Frozen]) -> Callable[[click.Context, click.Parameter, bool], None]:
    def show(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
        if wanted:
            for name, field in model.model_fields.items():
                default = "required" if field.is_required() else f"default {field.default!r}"
                click.echo(f"{name}  ({default})\n    {' '.join((field.description or '').split())}")
            ctx.exit()

    return show


def _words(model: type[Frozen]) -> Callable[[Callable], Callable]:
    """The arguments every command takes: [RECIPE.toml] [KEY=VALUE]..."""
    argument = click.argument("words", nargs=-1, metavar="[RECIPE.toml] [KEY=VALUE]...")
    flag = click.option(
        "--settings", is_flag=True, is_eager=True, expose_value=False, callback=_show_settings(model), help="List them."
    )
    return lambda command: argument(flag(command))


@group.command()
@_words(SftConfig)
def sft(words: Sequence[str]) -> None:
    """Fine-tune a model on its teacher's answers; section [sft].

    \b
    python -m trainer sft model=ORG/BASE data=runs/sft-data output=runs/sft
    """
    _train(settings_from(SftConfig, "sft", words))


@group.command()
@_words(OpdConfig)
def opd(words: Sequence[str]) -> None:
    """Distil the teacher into the model that sampled the rollouts; section [opd].

    \b
    python -m trainer --ranks 2 opd model=runs/sft/export data=s3://bucket/scored output=runs/opd
    """
    _train(settings_from(OpdConfig, "opd", words))


@group.command("eval")
@_words(EvalConfig)
def evaluation(words: Sequence[str]) -> None:
    """Measure the exact reverse KL to a teacher at states of fresh rollouts; section [eval]. One process.

    \b
    python -m trainer eval model=runs/opd/export teacher=ORG/TEACHER data=runs/held-out output=kl.json
    """
    config = settings_from(EvalConfig, "eval", words)
    device = torch.device(kind_of(config.device))
    with Progress("reverse KL", open_dataset(config.data).num_rows, "tok") as progress:
        result = evaluate(config, device, progress.advance)
    if result["overrides"]:
        click.echo(f"warning: overridden checks: {', '.join(result['overrides'])}", err=True)
    click.echo(json.dumps(result["reverse_kl"]))


def main() -> None:
    """Entry point of `python -m trainer`; our errors become one line on stderr and their exit code."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    sys.exit(guard(_as_one_voice))


def _as_one_voice() -> int | None:
    try:
        return group.main(standalone_mode=False, prog_name="python -m trainer")
    except LopdError as error:
        if get_node_local_rank(fallback_rank=0) == 0:
            raise
        if isinstance(error, Stopped):  # all ranks stop together, and nobody ends those that are silent
            return error.exit_code
        time.sleep(FIRST_SPEAKS_S)
        if error.shared:
            return error.exit_code
        raise


def settings_from(model: type[Model], section: str, words: Sequence[str]) -> Model:
    """The settings of a section from the words of the command line: an optional recipe, then key=value."""
    recipe = words[0] if words and "=" not in words[0] else None
    return load_section(model, recipe, section, words[1:] if recipe else words)


def _train(config: TrainConfig) -> None:
    with joined(config.device) as world:
        try:
            train(config, world, lambda line: click.echo(line, err=True))
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"out of GPU memory: {str(error).partition('.')[0]}",
                fix="Lower token_budget or logits_chunk, or set activation_checkpointing=true",
            ) from None
