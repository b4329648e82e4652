"""The one error type for what a user can mend: a wrong path, row, key or combination of settings."""


class UserError(ValueError):
    """Says what was expected, what came and what to do. The command line prints it without a traceback."""
