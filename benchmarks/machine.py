"""What a figure was measured on."""

import os
import platform
from pathlib import Path
from typing import Any


def processor() -> dict[str, Any]:
    """Its name, as far as the system tells it, and its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": name, "cores": os.cpu_count()}
