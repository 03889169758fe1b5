"""What a worker could not go on for, told as if it had been met here."""

from common.errors import DataError, LopdError, RetryLater, StorageError, UsageError
from precompute.fleet.messages import Failed

ERRORS = {error.exit_code: error for error in (UsageError, DataError, StorageError, RetryLater)}


def as_error(failure: Failed, words: str) -> LopdError:
    """The error that ended a worker; `words` are the last that it wrote."""
    first, _, rest = failure.text.partition("\n")
    known = ERRORS.get(failure.exit_code)
    if known is not None:
        return known(first, detail=rest)
    return RetryLater(f"a worker broke: {first}", where=last_line(words), fix="The same command resumes")


def last_line(words: str) -> str:
    """The last line of what somebody wrote."""
    return words.rpartition("\n")[2]
