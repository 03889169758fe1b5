"""`lopd precompute audit`."""

from typing import Any

import click

from common.errors import DataError
from common.terminal import say_json


@click.command()
@click.argument("url")
@click.option("--model", "models", multiple=True, help="Hub id, folder or URL of a copy of its model; may be repeated.")
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Rows to draw at random.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draw.")
@click.option(
    "--which", type=click.Choice(["teacher", "rollout", "both"]),
    help="Log-probs to audit. Default: the teacher's, and the rollout's if its policy is at hand.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="Of the audit's own forward pass.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--mean-difference", "mean", type=click.FloatRange(min=0), help="Limit of mean |d|; by the dtype unless given."
)
@click.option("--max-difference", "largest", type=click.FloatRange(min=0), help="Limit of the largest |d|.")
@click.option("--worst", type=click.IntRange(min=0), default=0, help="List so many of the worst rows.")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout instead of text.")
@click.pass_context
def audit(ctx: click.Context, url: str, worst: int, as_json: bool, **flags: Any) -> None:
    """Score some rows of the finished dataset at URL again, without vLLM, and compare with what is stored.

    The forward pass is that of transformers, in float32, and needs PyTorch alone, on a CPU or a GPU. Exit code 65: the
    stored log-probs are not what they claim to be, or too few could be compared to tell.

    \b
    Example: lopd precompute audit s3://bucket/run1/scored --rows 32 --worst 5
    """
    from transformers.utils import logging as transformers_logging

    from precompute.audit.run import Settings
    from precompute.audit.run import audit as run_audit
    from precompute.audit.text import show

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    result = run_audit(url, Settings(**flags))
    if as_json:
        say_json(result.as_record())
    else:
        show(result, worst)
    if not result.passed:
        ctx.exit(DataError.exit_code)
