"""`lopd`: one command, a group for each room; a room is imported only when its group is used."""

import errno
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import get_completion_class

from common.errors import LopdError, StorageError, UsageError
from common.lineage import (
    PROVENANCE,
    ModelIdentity,
    Provenance,
    identify,
    read_provenance,
    same_model,
    two_columns,
    write_provenance,
)
from common.logs import show_logs
from common.models import hub_repo, reference, resolve
from common.terminal import say_json
from common.urls import clean_url, is_url

ROOMS = {"cache": "common.cache.cli", "precompute": "precompute.cli"}
"""Groups with a module of their own; one in another room is named here and nowhere imported by `common`."""
SHELLS = ("bash", "zsh", "fish")


class Rooms(click.Group):
    """A group whose rooms are imported on demand, so that `lopd attest` works where vLLM is not installed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *ROOMS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ROOMS:
            return importlib.import_module(ROOMS[cmd_name]).group
        return super().get_command(ctx, cmd_name)


@click.group(cls=Rooms, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lightning-opd")
@click.option("-v", "--verbose", count=True, help="Log to stderr; -vv logs more. Never any credential.")
def group(verbose: int) -> None:
    """Lightning OPD: offline on-policy distillation.

    \b
    Examples:
    lopd precompute run --model STUDENT --prompts prompts.jsonl --cache s3://bucket/run1
    python -m trainer --ranks 8 opd model=s3://bucket/sft-run/export data=s3://bucket/run1/scored output=s3://bucket/out
    lopd cache ls s3://bucket
    lopd -v cache verify s3://bucket/run1/scored
    """
    show_logs(verbose)


@group.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script by which SHELL completes commands and options of `lopd`.

    \b
    To install it:
    bash: echo 'eval "$(lopd completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(lopd completion zsh)"' >> ~/.zshrc
    fish: lopd completion fish > ~/.config/fish/completions/lopd.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows all of SHELLS"
    click.echo(kind(group, {}, "lopd", "_LOPD_COMPLETE").source())


@group.command()
@click.argument("model")
@click.option("--teacher", required=True, help="Hub id, folder or URL of the teacher whose answers MODEL was tuned on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
def attest(model: str, teacher: str, as_json: bool) -> None:
    """Record a claim: MODEL was fine-tuned elsewhere on answers of TEACHER.

    The claim is written to MODEL/provenance.json and marked as attested, not verified. The same claim may be made
    again; another one is refused.

    \b
    Examples:
    lopd attest ./my-sft-model --teacher Qwen/Qwen3-8B
    lopd attest s3://bucket/my-sft-model --teacher s3://bucket/my-teacher --json
    """
    if not is_url(model) and hub_repo(model):
        raise UsageError(
            "a claim cannot be written to the Hub", where=model, fix="Give a folder or URL that holds your copy of it"
        )
    folder, teacher_folder = resolve(model), resolve(teacher)
    known, claimed = read_provenance(folder), identify(teacher_folder, reference(teacher))
    if known is not None:
        _require_same_claim(known, claimed, reference(model))
    place = clean_url(model) if is_url(model) else str(folder)
    is_new = known is None or known.teacher != claimed
    if is_new:
        write_provenance(folder, Provenance(role="attested", teacher=claimed), place)
    if as_json:
        written = {"provenance": f"{place}/{PROVENANCE}", "role": "attested", "teacher": claimed.name}
        say_json({"model": place, "new": is_new, **written})
    else:
        click.echo(f"{place}/{PROVENANCE}: fine-tuned on {claimed.name} (attested{'' if is_new else ' before'})")


def _require_same_claim(known: Provenance, claimed: ModelIdentity, model: str) -> None:
    """A claim may be made again, but not silently turned into another one; what a training recorded is no claim."""
    if known.role != "attested":
        raise UsageError(
            "the model's teacher is already recorded by its training",
            where=model,
            fix=f"It needs no claim; {PROVENANCE} there says what it was fine-tuned on",
        )
    if known.teacher is not None and not same_model(known.teacher, claimed):
        raise UsageError(
            f"another claim is recorded: fine-tuned on {known.teacher.name}",
            where=model,
            fix=f"If it is wrong, remove {PROVENANCE} there and attest again",
            detail=two_columns("recorded", known.teacher, "this claim", claimed),
        )


def main() -> None:
    """Entry point of `lopd`."""
    run(group)


def run(command: click.Command, arguments: list[str] | None = None) -> None:
    """Run a click command; our errors become one line on stderr and their exit code."""
    sys.exit(guard(lambda: command.main(args=arguments, standalone_mode=False)))


def guard(action: Callable[[], Any]) -> int:
    """Exit code of `action`: 0, an error's own, 64 for click's usage errors, 130 for Ctrl-C."""
    try:
        result = action()
    except LopdError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return UsageError.exit_code
    except click.ClickException as error:
        click.echo(f"error: {error.format_message().rstrip('.')}{_see_help(error)}", err=True)
        return UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what is committed is safe, the same command resumes or begins again", err=True)
        return 130
    except BrokenPipeError:
        _stop_writing()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _stop_writing()
        click.echo("error: no space left for the output. Free some, then run the same command again", err=True)
        return StorageError.exit_code
    return result if isinstance(result, int) else 0


def _stop_writing() -> None:
    """Have what is still in the buffer of stdout go nowhere, for Python flushes it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _see_help(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f". See `{context.command_path} --help`" if context is not None else ""


if __name__ == "__main__":
    main()
