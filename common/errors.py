"""What a user sees when something is wrong: one line that says what, where and what to do next.

The exit codes are those of sysexits.h, so that a launcher can tell "mend your input" from "try again".
"""

from common.untrusted import one_line, visible

LONGEST = 2000
"""Characters of what is wrong, or of where, that are shown at most."""


class LopdError(Exception):
    """A mistake or failure that the user can act on; the command line prints it as one line, never a traceback.

    Args:
        what: what is wrong, in a few words.
        where: the file, row, key or URL.
        fix: what to do next, a sentence.
        detail: further lines below the first, such as a two-column comparison.
    """

    exit_code = 1
    shared = False
    """Whether every process of a job raises it, so that one may speak for all."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", detail: str = "") -> None:
        self.what, self.where, self.fix, self.detail = what, where, fix, detail
        super().__init__(what, where, fix, detail)

    def __str__(self) -> str:
        line = _quoted(self.what) + (f" ({_quoted(self.where)})" if self.where else "")
        line = f"{line}. {self.fix}" if self.fix else line
        return f"{line}\n{visible(self.detail)}" if self.detail else line

    def __reduce__(self) -> tuple[object, ...]:
        """So that it survives the way from one process to another, which would drop the keyword arguments."""
        return Exception.__new__, (type(self), *self.args), vars(self)


def _quoted(text: str) -> str:
    """Words that may be a stranger's: nothing in them is obeyed by a terminal, and they do not fill it."""
    return one_line(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")


class UsageError(LopdError):
    """The command, a flag or a config key is wrong."""

    exit_code = 64


class DataError(LopdError):
    """The input was readable, but is not what it must be."""

    exit_code = 65


class StorageError(LopdError):
    """A store refused or could not hold the data: credentials, a missing bucket, a full disk."""

    exit_code = 74


class RetryLater(LopdError):
    """A passing failure outlasted the retries; what is committed is safe, and the same command resumes."""

    exit_code = 75
