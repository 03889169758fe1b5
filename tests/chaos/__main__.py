"""`python -m tests.chaos`: run, print the table, exit 0 when no data was lost, duplicated or corrupt."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from tests.chaos.audit import Tally, audit
from tests.chaos.crew import Aims, Crew
from tests.chaos.member import WRITERS
from tests.chaos.report import details, table
from tests.chaos.weather import weather
from tests.common.fault_proxy import fault_proxy
from tests.s3_server import BUCKET, run_server


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kills", default=100, show_default=True, help="At least so many workers die by SIGKILL.")
@click.option("--interrupts", default=0.2, show_default=True, help="Share of blows that are Ctrl-C instead of SIGKILL.")
@click.option("--requests-per-blow", default=25, show_default=True, help="Mean number of requests between two blows.")
@click.option("--faults", default=500, show_default=True, help="At least so many requests go wrong.")
@click.option("--workers", default=4, show_default=True, help="Processes that write one dataset at a time together.")
@click.option("--readers", default=2, show_default=True, help="Processes that read what is finished, all the while.")
@click.option("--shards", default=200, show_default=True, help="At least so many shards are written.")
@click.option("--shards-per-dataset", "shards_per_round", default=12, show_default=True, help="On average.")
@click.option("--pace", default=0.4, show_default=True, help="Seconds of work that a shard stands for.")
@click.option("--writer", default="ours", show_default=True, type=click.Choice(list(WRITERS)))
@click.option("--seed", default=0, show_default=True, help="Of faults, blows and rows; the timing stays the machine's.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Leave the server's data and all logs in this new folder."
)
@click.option("--must-lose", is_flag=True, help="Turn the exit code over: this writer is here to be caught.")
def main(keep: Path | None, must_lose: bool, **given: Any) -> None:
    """Kill workers and fail requests while datasets are written and read, then audit what lies on the server."""
    aims = Aims(**given)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        if keep:
            keep.mkdir(parents=True)
        crew, tally, seconds = run(aims, keep or Path(folder))
        click.echo(f"writer: {aims.writer}, {aims.workers} workers, {aims.readers} readers, seed {aims.seed}")
        click.echo(table(crew, tally, seconds) + details(crew, tally))
    sound = tally.clean and not (aims.writer == "ours" and (crew.ends["crashed"] or crew.ends["hung"]))
    if must_lose and tally.clean:
        click.echo("error: this writer came out clean, so the run proves nothing", err=True)
    sys.exit(tally.clean if must_lose else not sound)


def run(aims: Aims, folder: Path) -> tuple[Crew, Tally, float]:
    """One run on a server of its own; returns the crew, what the audit found, and how many seconds the work took."""
    faults = weather(aims.seed)
    for name in ("server", "crew"):
        (folder / name).mkdir()
    with run_server(folder / "server") as server, fault_proxy(server.endpoint, faults) as endpoint:
        os.environ.update(server.environment() | {"LOPD_CACHE_DIR": str(folder / "cache")})
        environment = {**server.environment(), "AWS_ENDPOINT_URL": endpoint}
        crew = Crew(aims, f"s3://{BUCKET}/chaos", environment, folder / "crew", faults)
        started = time.monotonic()
        crew.work()
        seconds = time.monotonic() - started
        return crew, audit(aims.writer, crew.rounds, server.endpoint, folder / "crew"), seconds


if __name__ == "__main__":
    main()
