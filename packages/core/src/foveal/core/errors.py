"""The error whose message is the user's one line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message says in one line what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
