"""Our side of the comparison, in a process of its own: `python -m benchmarks.trainer.ours JOB.json`.

It runs what the command `python -m trainer` runs, watched.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.trainer.probes import CLOCKS, resident_bytes, watched
from trainer.config import OpdConfig, SftConfig
from trainer.loop import train
from trainer.world import joined


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job` says; what was measured."""
    settings = {
        "model": job["model"],
        "data": job["data"],
        "output": job["output"],
        "device": job["device"],
        "token_budget": job["length"],
        "rows_per_step": 1,
        "max_steps": job["steps"],
        **job["settings"],
    }
    config = (OpdConfig if job["kind"] == "opd" else SftConfig)(**settings)
    imported = resident_bytes()
    with joined(config.device) as world, watched(CLOCKS[job["clock"]]) as watch:
        train(config, world, lambda line: print(line, file=sys.stderr))
    return {"imported_bytes": imported, "steps": watch.steps}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["found"]).write_text(json.dumps(run(job)))
