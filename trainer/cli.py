"""The commands of the trainer: `sft`, `opd` and `eval`."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import torch
from torch.distributed import is_torchelastic_launched
from torch.distributed.distributed_c10d import get_node_local_rank
from transformers.utils import logging as transformers_logging

from common.cli import guard
from common.config import Frozen, load_section
from common.dataset import open_dataset
from common.errors import LopdError, RetryLater, UsageError
from common.progress import Progress
from trainer.config import EvalConfig, OpdConfig, SftConfig, TrainConfig
from trainer.evaluate import evaluate
from trainer.launch import end_with_launcher, launch
from trainer.loop import Stopped, train
from trainer.memory_plan.dry_run import dry_run, plannable
from trainer.memory_plan.host import elsewhere
from trainer.watch.report import PAGE, report_run, write_report
from trainer.world import is_lost_rank, joined, kind_of

Model = TypeVar("Model", bound=Frozen)
DRY_RUN = "--dry-run"
ALONE = ("eval", "report")
"""Commands of one process."""
FIRST_SPEAKS_S = 3.0
"""An error that all ranks share is told by rank 0; the launcher ends the others within this time, and only one that is
still alive after it has something of its own to say."""
CAUSE_SPEAKS_S = 40.0
"""The same for a rank that has only lost another: the one that failed, or the launcher, tells why, and the launcher
gives those it ends 30 s."""


class LostRank(RetryLater):
    """Another rank is gone, and this one cannot go on alone."""


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
    if is_torchelastic_launched():
        end_with_launcher()
    ctx.obj = int(os.environ["WORLD_SIZE"]) if is_torchelastic_launched() else ranks or 1
    if ranks and ranks > 1 and ctx.invoked_subcommand in ALONE:
        raise UsageError(f"{ctx.invoked_subcommand} runs in one process", where="--ranks", fix="Leave --ranks out")


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


def _plannable(command: Callable) -> Callable:
    """The options of a command that can say what it would take, of this machine or of another one."""
    options = [
        click.option(DRY_RUN, "dry", is_flag=True, help="Print the memory plan, refuse what cannot fit, end."),
        click.option("--device-memory", "device", metavar="80GiB", help="Plan for GPUs of this size."),
        click.option("--host-memory", "host", metavar="1TiB", help="Plan for a machine with this much RAM."),
    ]
    for option in reversed(options):
        command = option(command)
    return click.pass_obj(command)


@group.command()
@_words(SftConfig)
@_plannable
def sft(ranks: int, words: Sequence[str], **plan: Any) -> int:
    """Fine-tune a model on its teacher's answers; section [sft].

    \b
    python -m trainer sft model=ORG/BASE data=runs/sft-data output=runs/sft
    """
    return _plan_or_train(SftConfig, "sft", words, ranks, **plan)


@group.command()
@_words(OpdConfig)
@_plannable
def opd(ranks: int, words: Sequence[str], **plan: Any) -> int:
    """Distil the teacher into the model that sampled the rollouts; section [opd].

    \b
    python -m trainer --ranks 2 opd model=runs/sft/export data=s3://bucket/scored output=runs/opd
    """
    return _plan_or_train(OpdConfig, "opd", words, ranks, **plan)


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


@group.command()
@click.argument("outputs", nargs=-1, required=True, metavar="OUTPUT...")
@click.option("--to", "target", help="File or URL of the page.  [default: OUTPUT/report.html; for several, here]")
def report(outputs: Sequence[str], target: str | None) -> None:
    """Write one HTML page of curves, figures and lineage about a run, or about several side by side.

    \b
    python -m trainer report runs/opd
    python -m trainer report runs/paper runs/importance --to compare.html
    """
    place = target or (f"{outputs[0].rstrip('/')}/{PAGE}" if len(outputs) == 1 else PAGE)
    click.echo(write_report(outputs, place))


def main() -> None:
    """Entry point of `python -m trainer`; our errors become one line on stderr and their exit code."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    sys.exit(guard(_as_one_voice))


def _as_one_voice() -> int | None:
    try:
        return group.main(standalone_mode=False, prog_name="python -m trainer")
    except LostRank:
        time.sleep(CAUSE_SPEAKS_S)
        raise
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


def _plan_or_train(
    model: type[TrainConfig], section: str, words: Sequence[str], ranks: int, dry: bool, **memory: str | None
) -> int:
    """Returns the exit code. Ranks are started once the words are understood, so that a wrong one is told once."""
    launched = is_torchelastic_launched()
    if dry:
        if not launched or os.environ["RANK"] == "0":
            dry_run(settings_from(plannable(model), section, words), ranks, elsewhere(**memory))
        return 0
    if any(memory.values()):
        raise UsageError("--device-memory and --host-memory are for --dry-run", fix=f"Give {DRY_RUN} too")
    config = settings_from(model, section, words)
    if ranks > 1 and not launched:
        return launch(ranks, sys.argv[1:])
    _train(config)
    return 0


def _train(config: TrainConfig) -> None:
    with joined(config.device, config.replicas) as world:
        try:
            train(config, world, _tell)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"out of GPU memory: {str(error).partition('.')[0]}",
                fix="Lower token_budget or logits_chunk, or set activation_checkpointing=true",
            ) from None
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            fix = "The same command resumes from the last checkpoint"
            raise LostRank(f"rank {world.rank} lost another rank and ends", fix=fix) from None
        if world.is_first:
            report_run(config.output, _tell)


def _tell(line: str) -> None:
    click.echo(line, err=True)
