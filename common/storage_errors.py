"""Failures of stores, sorted: what a library raised becomes an error of ours that says where and what to do next."""

import errno

from common.errors import LopdError, RetryLater, StorageError, UsageError

TRANSIENT_CODES = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException",
    "ConditionalRequestConflict", "OperationAborted", "500", "502", "503", "504",
    "BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
}  # fmt: skip
"""The last five: the bytes that arrived are not those that were sent, and are refused; they are sent again."""
UNKNOWN_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
DENIED_CODES = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled"}
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestTimeTooSkewed", "TokenRefreshRequired"}
BAD_ENDPOINT = "Invalid endpoint"
"""What botocore says of an AWS_ENDPOINT_URL that is no URL."""
NETWORK_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "aiohappyeyeballs", "httpx2", "httpcore")
"""Their exceptions are outages, unless their code says otherwise."""


class AlreadyExists(LopdError):
    """`put_new` found other bytes under the key."""

    exit_code = 74


class NotFound(LopdError):
    """There is no such object."""

    exit_code = 65


def error_code(error: BaseException) -> str:
    """The store's own error code (`SlowDown`, `AccessDenied`), which s3fs hides in the exception's cause."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        seen = seen.__cause__
    return ""


def explain(error: Exception, verb: str, where: str) -> LopdError | None:
    """`error` of a storage library as one of ours; None for what is no storage failure."""
    if isinstance(error, LopdError):
        return error
    code, kind = error_code(error), type(error).__name__
    if code == "PreconditionFailed":
        raise FileExistsError(where) from error
    if BAD_ENDPOINT in str(error):
        return UsageError("the S3 endpoint is no URL", where=where, fix="Set AWS_ENDPOINT_URL=http://host:port")
    if kind == "ParamValidationError":
        return UsageError("no bucket or key can have this name", where=where, fix="Mend the URL")
    if code == "NoSuchBucket":
        return StorageError("the bucket does not exist", where=where, fix="Create it, or mend the URL")
    if code in EXPIRED_CODES:  # before the next, because s3fs makes a PermissionError of them
        return RetryLater(f"the credentials or the clock are off ({code})", where=where, fix="Renew, then run again")
    if isinstance(error, PermissionError) and error.filename is not None:  # set by the operating system alone
        return StorageError(f"no permission to {verb}", where=where, fix=f"Check who owns {error.filename}")
    if code in UNKNOWN_CODES:
        return StorageError(
            f"the store does not know these credentials ({code})", where=where, fix="Check the key and its secret"
        )
    if code in DENIED_CODES or isinstance(error, PermissionError):
        return StorageError(f"no permission to {verb}", where=where, fix="Check the credentials and the bucket policy")
    if kind == "ProfileNotFound":
        return StorageError(f"no S3 credentials: {error}", where=where, fix="Mend AWS_PROFILE, or add the profile")
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(
            "no S3 credentials", where=where, fix="Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret"
        )
    if kind == "OfflineModeIsEnabled":
        return StorageError("the Hub is switched off", where=where, fix="Unset HF_HUB_OFFLINE, or give a local copy")
    if isinstance(error, FileNotFoundError) and verb in ("write", "create"):  # /proc and the like
        return StorageError(f"cannot {verb} here", where=where, fix="Choose another folder")
    if isinstance(error, FileNotFoundError):
        return NotFound("no such object", where=where)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError("no space left", where=where, fix="Free some, then run the same command: it resumes")
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return StorageError(f"cannot {verb}: {error.strerror}", where=where)
    if code in TRANSIENT_CODES or isinstance(error, (TimeoutError, ConnectionError)) or _is_network(error):
        return RetryLater(f"cannot {verb}: {code or kind}", where=where, fix="Run the same command again: it resumes")
    if isinstance(error, OSError):
        return StorageError(f"cannot {verb}: {error}", where=where)
    if isinstance(error, NotImplementedError):
        return UsageError(f"one cannot {verb} in this kind of store", where=where, fix="Use s3://, gs:// or a folder")
    return None


def _is_network(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in NETWORK_LIBRARIES
