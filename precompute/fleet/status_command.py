"""`lopd precompute status`."""

import click

from common.errors import UsageError
from common.terminal import say_json


@click.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout instead of text.")
@click.option("--prometheus", "as_metrics", is_flag=True, help="Metrics in Prometheus' text format instead of text.")
def status(url: str, as_json: bool, as_metrics: bool) -> None:
    """How far the dataset at URL is, who works on it, who has gone silent, the time left, and the cost of all boxes.

    Every box at work writes status/<host>-<process>.json beside the dataset twice a minute; reading is all that this
    command does, so whoever may read the dataset may watch it from anywhere. Silence is told by when the store took a
    status, against this machine's clock.

    \b
    Examples:
    lopd precompute status s3://bucket/run1/scored
    lopd precompute status s3://bucket/run1/scored --json | jq .eta_s
    lopd precompute status s3://bucket/run1/scored --prometheus > /var/lib/node_exporter/lopd.prom
    """
    from precompute.fleet.overview import overview

    if as_json and as_metrics:
        raise UsageError("--json and --prometheus are two answers", fix="Give one of them")
    found = overview(url)
    if as_json:
        say_json(found.model_dump(mode="json"))
    elif as_metrics:
        from precompute.fleet.prometheus import exposition

        click.echo(exposition(found), nl=False)
    else:
        from precompute.fleet.overview_text import show

        show(found)
