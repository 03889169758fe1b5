"""Commands as a user of the S3 server runs them: alone, or all those of a page of the documentation."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` with these variables and nothing else of ours that could help it."""
    bare = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env={**bare, **environment}, cwd=folder, capture_output=True, text=True, timeout=1800
    )


def blocks(page: str) -> Iterator[str]:
    """The fenced commands of a page as lines of bash; Python becomes a script on the standard input of `python`."""
    for language, text in re.findall(r"^```(bash|python)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        yield text if language == "bash" else f"python - <<'END OF PYTHON'\n{text}END OF PYTHON\n"


def run_page(page: str, environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run all commands of a page in one shell, which stops at the first that fails and says which it was."""
    (folder / "deploy").symlink_to(ROOT / "deploy")
    stop = "set -eEuo pipefail\ntrap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n"
    return run(["bash", "-c", stop + "".join(blocks(page))], environment, folder)
