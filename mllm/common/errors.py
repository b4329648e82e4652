"""The one error type for what a user can mend: a wrong path, row, key or combination of settings."""

import re

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, halves of pairs


class UserError(ValueError):
    """Says what was expected, what came and what to do. The command line prints it without a traceback.

    It may quote anything: what no terminal or file can take stands in it by its number.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class RowError(UserError):
    """One row of data that cannot be used. A mixture with `bad_rows: skip` may put another row in its place."""

    reason = "record"  # in a word or two: what bad rows are counted by


class TooLongError(RowError):
    """A row of more tokens than a sample may have."""

    reason = "too long"


def printable(text: str) -> str:
    r"""The text with control characters and halves of character pairs as `\x1b` and `\ud83d`; line breaks stay."""
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
