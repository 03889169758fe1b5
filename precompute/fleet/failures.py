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
    """The last error in what somebody wrote, else the last line: what clears up after a process may write too."""
    lines = words.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]
