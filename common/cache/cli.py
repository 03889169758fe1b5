"""`lopd cache`: what can be done with datasets on any store; each verb lives in a file of its own."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.cache.arguments import LocalPath, complete_folder, json_flag, url_argument
from common.errors import DataError
from common.progress import size
from common.storage import Store
from common.terminal import say, say_json
from common.untrusted import one_line

if TYPE_CHECKING:
    from common.cache.export import Format


@click.group()
def group() -> None:
    """Datasets on any store: list, watch, look into, verify, copy, export and clean up.

    URL is s3://, gs://, a folder, or anything else that fsspec opens. With --json a command prints one JSON value to
    stdout; progress and logs go to stderr.

    \b
    Examples:
    lopd cache ls s3://bucket
    lopd cache status s3://bucket/run1/scored
    lopd cache verify s3://bucket/run1/scored
    lopd cache copy s3://bucket/run1/scored ./scored

    \b
    Exit codes: 64 usage, 65 data (also: verify found something), 74 storage, 75 try again.
    """


@group.command()
@url_argument
@json_flag
def ls(url: str, as_json: bool) -> None:
    """List the datasets under URL, at any depth, the unfinished and the broken ones too.

    One listing finds them; of each, its plan is read, and its manifest or some of its commits. Counts marked with ≈
    are projected from a sample of the commits.

    \b
    Examples:
    lopd cache ls s3://bucket/team
    lopd cache ls runs --json | jq '.datasets[] | select(.state == "damaged")'
    """
    from common.cache.find import find, show

    found = find(url)
    say_json({"datasets": [asdict(one) for one in found]}) if as_json else show(found, url)


@group.command()
@url_argument
@click.option("--full", is_flag=True, help="Read every commit for the counts, however many there are.")
@json_flag
def status(url: str, full: bool, as_json: bool) -> None:
    """How far the dataset at URL is: shards, rows, tokens, pace, time left, and the command that goes on with it.

    Shards are counted by a listing; a committed one whose object is gone makes the dataset damaged. The pace is told by
    when the store took the commits; silence is judged by this machine's clock.

    \b
    Examples:
    lopd cache status s3://bucket/run1/rollouts
    lopd cache status s3://bucket/run1/rollouts --json | jq .eta_s
    """
    from common.cache.status import show
    from common.cache.status import status as status_of

    found = status_of(url, full)
    say_json(asdict(found)) if as_json else show(found)


@group.command()
@url_argument
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=0), help="How many rows to show.")
@click.option("--row", "uid", metavar="UID", help="Show this row alone, and all of it.")
@click.option(
    "--html",
    "page",
    type=LocalPath(folder=False),
    help="Write a page with plots too; a report of that name is replaced.",
)
@click.option(
    "--tokenizer",
    type=LocalPath(folder=True),
    help="Folder of the tokenizer to read tokens with; the policy's own, if it is on this machine, unless given.",
)
@json_flag
def inspect(url: str, rows: int, uid: str | None, page: Path | None, tokenizer: Path | None, as_json: bool) -> None:
    """What the dataset at URL is: facts, statistics, lineage, and rows with every token coloured by its gap.

    The gap of a token is the teacher's log-prob minus the policy's. All rows are read, and verified. Of a model with
    provenance.json, which every export has, the lineage is shown.

    \b
    Examples:
    lopd cache inspect s3://bucket/run1/scored
    lopd cache inspect s3://bucket/run1/scored --html scored.html
    lopd cache inspect s3://bucket/run1/scored --json | jq .statistics.gap
    lopd cache inspect s3://bucket/opd-run/export
    """
    from common.cache import inspect_page, inspect_text
    from common.cache.inspect import inspect as inspect_url
    from common.report import require_plots

    if page is not None:
        require_plots()
        inspect_page.require_report_or_nothing(page)
    found = inspect_url(url, rows=rows, uid=uid, tokenizer=tokenizer)
    if page is not None:
        Store(str(page.parent)).put(page.name, inspect_page.page(found).encode())
    if as_json:
        say_json(inspect_text.as_json(found))
    else:
        inspect_text.show(found, whole=uid is not None)


@group.command()
@click.argument("source", metavar="FROM", shell_complete=complete_folder)
@click.argument("target", metavar="TO", shell_complete=complete_folder)
@click.option("--repair", is_flag=True, help="Hash what lies at TO as well, and write anew what was altered there.")
@json_flag
def copy(source: str, target: str, repair: bool, as_json: bool) -> None:
    """Copy a finished dataset to another place, byte for byte: FROM and TO are any two URLs.

    Every shard is verified by its hash as it is read; the manifest is written last, so a copy that is not whole is
    taken for a dataset by nobody. Run the same command again after an interruption: it copies what is not there.

    What lies at TO is told by names and sizes, its records by their seals. --repair reads its shards too, and needs the
    right to delete: a record that does not fit its seal is removed and written anew.

    \b
    Examples:
    lopd cache copy s3://bucket/run1/scored ./scored
    lopd cache copy ./scored s3://other-bucket/team/scored --repair
    """
    from common.cache.copying import copy as copy_dataset
    from common.cache.copying import show

    copied = copy_dataset(source, target, repair)
    say_json(asdict(copied)) if as_json else show(copied)


@group.command()
@url_argument
@click.option("--format", "layout", required=True, type=click.Choice(["jsonl", "trl", "verl", "slime"]))
@click.option("--output", required=True, metavar="FILE_OR_URL", help="Ends in .parquet, .jsonl or .jsonl.gz.")
@click.option("--overwrite", is_flag=True, help="Replace what lies there.")
@json_flag
def export(url: str, layout: "Format", output: str, overwrite: bool, as_json: bool) -> None:
    """Write the dataset at URL to one file that another trainer opens.

    jsonl: all columns, one row a line; .jsonl.gz is compressed. trl: SFTTrainer's tokenised columns for the answers of
    a teacher, those of a rollout_func for scored rollouts. verl: an RL dataset whose agent_loop_output can be replayed.
    slime: what the trainer of the Lightning OPD paper reads.

    Rows are verified, ids stay ids, and the file appears whole or not at all.

    \b
    Examples:
    lopd cache export s3://bucket/run1/scored --format slime --output scored-slime.parquet
    lopd cache export s3://bucket/run1/scored --format jsonl --output s3://bucket/run1/scored.jsonl.gz
    """
    from common.cache.export import export as export_url

    made = export_url(url, layout, output, overwrite=overwrite)
    if as_json:
        say_json(asdict(made))
        return
    if made.overrides:
        say(f"OVERRIDDEN: {one_line(', '.join(made.overrides))}", "bold red")
    say(f"{made.output}: {made.rows:,} rows, {made.tokens:,} completion tokens, {size(made.bytes)}")


@group.command()
@url_argument
@click.option("--older-than", default="24h", show_default=True, metavar="AGE", help="Least age: 90s, 30m, 24h, 7d, 2w.")
@click.option("--delete", is_flag=True, help="Delete what is found; without it nothing is deleted.")
@json_flag
@click.pass_context
def gc(ctx: click.Context, url: str, older_than: str, delete: bool, as_json: bool) -> None:
    """Find what killed workers left in the datasets at and under URL: shards that lost to another, half-written files.

    A shard's object goes only when its shard has a commit, and that names another object. Of a shard without a commit
    all objects are listed and left, however old: a worker may be about to commit one. Half-written files of a local
    folder go when they are an hour old at least. What a commit or a manifest names is never touched, nor any other
    file.

    Where a record cannot be read, nothing is deleted, and the exit code is that of the worst refusal: 74 of the store,
    65 of the data, 75 where another try may do. Age is told by the store's clock, for which a small object *.clock is
    written and removed. Parts of an upload that was cut off are not seen here: a rule of the bucket
    (AbortIncompleteMultipartUpload) removes those.

    \b
    Examples:
    lopd cache gc s3://bucket/run1
    lopd cache gc s3://bucket/run1 --older-than 7d --delete
    """
    from common.cache.collect import collect, exit_code, parse_age, show

    seconds = parse_age(older_than)
    collected = collect(url, seconds, delete)
    if as_json:
        say_json({"delete": delete, "older_than_s": seconds, "datasets": [asdict(one) for one in collected]})
    else:
        show(collected, delete, seconds)
    ctx.exit(exit_code(collected))


@group.command()
@url_argument
@click.option("--full/--fast", default=True, help="Download and check every row (default), or the records alone.")
@json_flag
@click.pass_context
def verify(ctx: click.Context, url: str, full: bool, as_json: bool) -> None:
    """Check that the dataset at URL is what its records say. Every finding is a line; with any the exit code is 65.

    --fast reads plan, manifest and commits (their seals, and each against the others) and compares the listing with
    them: names, sizes, the files that the card names. --full also downloads every shard: sha256, page checksums,
    schema, counts, sums, every row, uids over the whole dataset, whether teacher and rollout log-probs speak of the
    same tokens, and the top-k. Orphans and other files are noted and are no findings. What the store does not give
    says nothing about the dataset: it is listed apart, and the exit code is 74 or 75.

    \b
    Examples:
    lopd cache verify s3://bucket/run1/scored
    lopd cache verify s3://bucket/run1/scored --fast --json | jq .findings
    """
    from common.cache import verify as verification

    verdict = verification.verify(url, full)
    if as_json:
        say_json(verification.as_json(verdict))
    else:
        verification.show(verdict)
    if verdict.failure is not None:
        raise verdict.failure
    if verdict.findings:
        ctx.exit(DataError.exit_code)
