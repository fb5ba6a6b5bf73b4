"""Errors the user can mend: shown as one line, exit code 2."""


class UserError(Exception):
    """What is wrong, where, and what to do, in one line."""
