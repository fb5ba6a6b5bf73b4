"""Errors that the user can fix. The command line prints them as one line and exits with code 2."""


class UserError(Exception):
    """One line that says what is wrong, where, and what to do."""
