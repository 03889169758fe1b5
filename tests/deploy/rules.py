"""How AWS decides on a request of S3, for as much of its policy language as deploy/iam uses.

The test server does not know the condition keys that force create-only writes, so whether our own writers satisfy
them is judged here, on the requests they really send.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACTIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}
"""Operations of S3 and the permission that each asks for."""
CREATING = ("PutObject", "CompleteMultipartUpload")
"""Operations after which there is an object, by which `s3:ObjectCreationOperation` is true."""


@dataclass(frozen=True)
class Request:
    """What a policy sees of a request."""

    action: str
    resource: str
    keys: frozenset[tuple[str, str]] = frozenset()
    """Condition keys and their values."""


def request(operation: str, path: str, *, create_only: bool = False) -> Request:
    """The request of an operation on `bucket` or `bucket/key`, over TLS."""
    context = {"aws:SecureTransport": "true"}
    if ACTIONS[operation] == "s3:PutObject":
        context["s3:ObjectCreationOperation"] = str(operation in CREATING).lower()
    if create_only:
        context["s3:if-none-match"] = "*"
    return Request(ACTIONS[operation], f"arn:aws:s3:::{path}", frozenset(context.items()))


def allowed(policy: Mapping[str, Any], asked: Request) -> bool:
    """An explicit Deny wins; without an Allow nothing is allowed."""
    effects = {statement["Effect"] for statement in policy["Statement"] if _applies(statement, asked)}
    return effects == {"Allow"}


def as_list(value: str | Sequence[str]) -> list[str]:
    """Actions and resources may be written as one text or as several."""
    return [value] if isinstance(value, str) else list(value)


def _applies(statement: Mapping[str, Any], asked: Request) -> bool:
    return (
        any(_matches(pattern, asked.action) for pattern in as_list(statement["Action"]))
        and any(_matches(pattern, asked.resource) for pattern in as_list(statement["Resource"]))
        and all(
            _holds(operator, key, wanted, dict(asked.keys))
            for operator, keys in statement.get("Condition", {}).items()
            for key, wanted in keys.items()
        )
    )


def _matches(pattern: str, text: str) -> bool:
    """`*` stands for anything and `?` for any one character, slashes too."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text) is not None


def _holds(operator: str, key: str, wanted: str, context: Mapping[str, str]) -> bool:
    if operator == "Null":
        return (key not in context) == (wanted == "true")
    if operator == "Bool":
        return context.get(key) == wanted
    raise NotImplementedError(operator)
