"""`lopd cache`: what can be done with datasets on any store; each verb lives in a file of its own."""

import click


@click.group()
def group() -> None:
    """Datasets on any store: list, watch, verify, copy and clean up.

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
