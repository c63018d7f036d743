"""The error whose message is the user's one line."""

from __future__ import annotations

import re

#: How torch raises again, in this process, what a worker of a data loader has raised: with the worker's whole traceback for a message.
_OF_A_WORKER = re.compile(r"Caught \w+ in .+?\.\nOriginal Traceback .*\n[\w.]*\w+: (.+)\Z", re.DOTALL)


class UserError(Exception):
    """Something the user can mend: the message says in one line what was expected, what came, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        wrapped = _OF_A_WORKER.match(message.rstrip())
        super().__init__(" ".join((wrapped[1] if wrapped else message).split()))
