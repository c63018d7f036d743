"""Memory that the process freed and will want again."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed instead of giving large pieces back to the system one by one, for the rest of the process.

    A program that computes the same again and again, such as a step of molecular dynamics, else gets every large tensor as pages that the system
    must clear first, which can take as long as computing. The price is that the process holds what it needed at its peak, and somewhat more because
    large pieces leave gaps. For programs of our own, not for libraries: it is about the whole process.

    Returns:
        Whether the C library is one that can be told so (glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(tell(_MMAP_MAX, 0)) and bool(tell(_TRIM_THRESHOLD, 2**31 - 1))
