"""URLs and paths: what names one place, and holds nothing secret."""

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from common.errors import UsageError

BUCKETS = ("s3", "s3a", "gs", "gcs")
"""Schemes whose host is a bucket. What looks like one with a port is a secret with a slash in it."""


def is_url(text: str) -> bool:
    """Whether `text` is a URL (`s3://...`) rather than a path or a Hub id."""
    return "://" in text


def clean_url(url: str) -> str:
    """`url` without user, password and trailing slash, and fit to be written into an artifact.

    A path is made absolute, and a `file://` URL becomes the path it names: `file:///a%20b` is `/a b`.

    Raises:
        UsageError: it has one slash after its scheme; or what is left would not name the place: a URL within a URL
            (`::`), or `?` or `#`, which is a query and may be a secret, or part of a key, which nobody can tell.
    """
    if not is_url(url):
        if (scheme := url.partition(":/")[0]) in (*BUCKETS, "http", "https", "hf", "file"):
            raise UsageError("a URL has two slashes after its colon", fix=f"Write {scheme}://...")
        return str(Path(url).expanduser().absolute())
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"this is no URL: {error}", fix="Write s3://bucket/prefix") from None
    clean = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    if parts.scheme in BUCKETS and ":" in parts.netloc.rpartition("@")[2]:
        raise UsageError("a bucket's name has no colon", fix="Write s3://bucket/prefix, and the credentials elsewhere")
    if "::" in url:
        raise UsageError("URLs within URLs are not opened", fix="Give the plain URL")
    if "?" in url or "#" in url:
        raise UsageError("a URL with ? or # is not opened", where=clean, fix="Give the URL of a place without them")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UsageError("a file URL names no folder of this machine", where=clean, fix="Write file:///the/folder")
        return str(Path(url2pathname(parts.path)).absolute())
    return clean


def split_key(url: str) -> tuple[str, str]:
    """The store and the key of one object, given by its URL or path."""
    folder, slash, key = url.rpartition("/")
    return folder or slash or ".", key
