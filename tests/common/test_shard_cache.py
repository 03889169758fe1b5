import os
from pathlib import Path

import pytest

from common.canonical import sha256
from common.errors import UsageError
from common.shard_cache import cached_shard, keep_shard


def kept(folder: Path) -> set[str]:
    return {file.stem for file in (folder / "shards").glob("*.parquet")}


def age(folder: Path, digest: str, seconds: int) -> None:
    file = folder / "shards" / f"{digest}.parquet"
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime - seconds))


def test_a_kept_shard_is_found_and_an_altered_one_is_not(own_cache: Path) -> None:
    digest = sha256(b"shard")
    assert cached_shard(digest) is None
    keep_shard(digest, b"shard")
    assert cached_shard(digest) == b"shard"

    (own_cache / "shards" / f"{digest}.parquet").write_bytes(b"Shard")
    assert cached_shard(digest) is None


def test_the_least_recently_used_go_when_there_are_too_many_bytes(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPD_CACHE_GB", "0.000003")  # three thousand bytes
    digests = []
    for index in range(3):
        data = bytes([index]) * 1000
        digests.append(sha256(data))
        keep_shard(digests[-1], data)
        age(own_cache, digests[-1], 100 - index)
    cached_shard(digests[0])  # used just now, though it came first
    keep_shard(sha256(b"x" * 1000), b"x" * 1000)

    assert kept(own_cache) == {digests[0], digests[2], sha256(b"x" * 1000)}


def test_a_limit_that_is_no_number_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPD_CACHE_GB", "much")
    with pytest.raises(UsageError, match="LOPD_CACHE_GB=much is no number"):
        keep_shard(sha256(b"x"), b"x")
