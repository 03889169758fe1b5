"""Where this machine keeps what it fetched: models, shards, fingerprints."""

import os
from pathlib import Path

from common.errors import UsageError


def cache_dir() -> Path:
    """Where fetched models and shards are kept: `$LOPD_CACHE_DIR`, else `~/.cache/lightning-opd`."""
    return Path(os.environ.get("LOPD_CACHE_DIR", "~/.cache/lightning-opd")).expanduser()


def cache_limit() -> int:
    """Bytes of shards kept there at most: `$LOPD_CACHE_GB` (decimal), else 100 GB."""
    said = os.environ.get("LOPD_CACHE_GB", "100")
    try:
        return int(float(said) * 1e9)
    except (ValueError, OverflowError):
        raise UsageError(
            f"LOPD_CACHE_GB={said} is no number", fix="Give gigabytes, for instance LOPD_CACHE_GB=50"
        ) from None
