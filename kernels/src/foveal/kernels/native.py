"""C kernels without an extension module: plain C, compiled to a shared library, called through ctypes.

The wheel's build hook compiles every ``<family>/<name>.c`` to ``<name>.so`` beside it. Where that library is missing and a C compiler is
there, the first call compiles into the user's cache (half a second, once). Where neither is there, `load` gives None and the family uses
its torch form. No torch headers are involved, so one library serves every torch version.

This module imports neither torch nor its siblings: the build hook runs it in an empty environment.

Environment: ``FOVEAL_NATIVE=0`` switches the C kernels off; ``FOVEAL_CACHE`` moves the cache; ``CC`` names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"

#: The parts of -ffast-math that let sums and products vectorise. Not the flag itself: infinities are meaningful in masks, and gcc before
#: 13 links it with code that makes the whole process flush denormal numbers to zero as soon as the library is loaded.
FAST_MATH = ("-fassociative-math", "-freciprocal-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
FLAGS = ("-O3", *FAST_MATH, "-fPIC", "-shared", "-std=gnu11")
OPENMP = ("-fopenmp",)


#: What the C files of this package include.
HEADER = Path(__file__).with_name("native.h")


class CompileError(RuntimeError):
    """The compiler refused a C kernel; the message is the compiler's first line."""


def compiler() -> str | None:
    """Path of the C compiler (``$CC``, cc, gcc or clang), or None."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    return None


def compile_library(source: Path, target: Path) -> Path:
    """Compile `source` into the shared library `target` (written beside it, then renamed), with OpenMP where the compiler has it.

    Raises:
        CompileError: no compiler, or it refused the source.
    """
    cc = compiler()
    if cc is None:
        raise CompileError("no C compiler found (looked for $CC, cc, gcc, clang)")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=SUFFIX, dir=target.parent)
    os.close(handle)
    error = ""
    try:
        for extra in (OPENMP, ()):
            done = subprocess.run([cc, *FLAGS, *extra, str(source), "-o", name, "-lm"], capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode == 0:
                os.chmod(name, 0o755)
                os.replace(name, target)
                return target
            error = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"exit code {done.returncode}"
        raise CompileError(error)
    finally:
        Path(name).unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where libraries compiled at run time are kept."""
    return Path(os.environ.get("FOVEAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveal") / "native"


def cache_file(source: Path) -> Path:
    """Where the library of `source` is kept: another text, other flags or another processor family is another file."""
    build = " ".join((*FLAGS, sys.platform, platform.machine()))
    digest = hashlib.sha256(source.read_bytes() + HEADER.read_bytes() + build.encode()).hexdigest()[:16]
    return cache_folder() / f"{source.stem}-{digest}{SUFFIX}"


#: Seconds by which a source must be newer than its library to be another one: installers write the files of a wheel in any order.
INSTALLED_TOGETHER = 60.0


def _is_current(library: Path, source: Path) -> bool:
    texts = [text.stat().st_mtime for text in (source, HEADER) if text.exists()]
    return library.exists() and (not source.exists() or library.stat().st_mtime >= max(texts) - INSTALLED_TOGETHER)


@functools.cache
def load(source: str) -> ctypes.CDLL | None:
    """The library of the C file `source` (absolute path), or None where it is switched off, missing and cannot be compiled.

    A library older than its source is not used: an editable checkout recompiles into the cache instead.
    """
    if os.environ.get("FOVEAL_NATIVE", "1") == "0":
        return None
    path = Path(source)
    shipped = path.with_suffix(SUFFIX)
    if _is_current(shipped, path):
        try:
            return ctypes.CDLL(str(shipped))
        except OSError:
            pass  # built for another machine: compile for this one
    if not path.exists():
        return None
    library = cache_file(path)
    try:
        if library.exists():
            try:
                return ctypes.CDLL(str(library))
            except OSError:
                pass  # a cache that was copied or cut short: compile again
        return ctypes.CDLL(str(compile_library(path, library)))
    except (CompileError, OSError):
        return None


def explain(source: str) -> str:
    """One line for `doctor`: which library serves the C file, or why none does."""
    path = Path(source)
    if os.environ.get("FOVEAL_NATIVE", "1") == "0":
        return "switched off by FOVEAL_NATIVE=0"
    library = load(source)
    if library is not None:
        return f"compiled C ({'shipped' if Path(library._name) == path.with_suffix(SUFFIX) else 'compiled on this machine'})"
    return "torch form (no C compiler found)" if compiler() is None else "torch form (the C source did not compile)"
