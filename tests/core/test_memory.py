"""Freed memory that is kept is handed out again without the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Page faults of a second time that the same is allocated and written; in a process of its own, which it concerns as a whole.
FAULTS = """
import resource, sys
from foveal.core.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("not glibc")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill = lambda: [bytearray(b"x") * size for size in (80_000_000, 50_000_000)]
fill()
before = faults()
fill()
print(faults() - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    if "not glibc" in done.stderr:
        pytest.skip("the C library cannot be told")
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_memory_that_was_freed_needs_no_new_pages():
    assert faults("keep") < 100 < 10_000 < faults("give back")
