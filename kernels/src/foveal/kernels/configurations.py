"""The tiling that a kernel is launched with: what `tune` measured on this GPU, or else the family's shipped table.

A launcher asks one question, `tiling(family, kernel, tensor, width, shipped)`; nothing is ever measured in a model's run. Tuned tilings
live in the user's cache, one file a family and GPU, named by the GPU, the triton version and the text of the family's kernels: a new
driver card, compiler or kernel starts from the shipped table again. ``FOVEAL_TUNED=0`` ignores them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Constexpr block sizes and launch options of one kernel, such as {"BLOCK_E": 16, "num_warps": 4}.
Tiling = dict[str, int]

#: What `trying` holds in force: kernel ("<family>.<kernel>") -> tiling.
_TRIED: dict[str, Tiling] = {}


def tiling(family: str, kernel: str, tensor: Tensor, width: int, shipped: Mapping[str, int]) -> Tiling:
    """Block sizes and launch options for one launch.

    Args:
        family: folder of foveal.kernels, such as "segment".
        kernel: name of the kernel in its family, such as "forward".
        tensor: an input; its device and dtype choose the entry.
        width: the size that tilings are chosen by (head dim, state, code dim), as the family defines it.
        shipped: the family's own choice. A tuned entry replaces the values it names and may name no others.
    """
    tried = _TRIED.get(f"{family}.{kernel}")
    if tried is not None:
        return {**shipped, **tried}
    tuned = _tuned(family, device_name(tensor.device)).get(entry(kernel, tensor.dtype, width))
    if tuned is None or not set(tuned) <= set(shipped):
        return dict(shipped)
    return {**shipped, **tuned}


def entry(kernel: str, dtype: torch.dtype, width: int) -> str:
    """Key of a tuned tiling in its file, such as ``forward bfloat16 64``."""
    return f"{kernel} {str(dtype).removeprefix('torch.')} {width}"


@contextmanager
def trying(family: str, kernel: str, candidate: Mapping[str, int]) -> Iterator[None]:
    """While active, `tiling` answers `candidate` for that kernel, whatever the file says."""
    name = f"{family}.{kernel}"
    before = _TRIED.get(name)
    _TRIED[name] = dict(candidate)
    try:
        yield
    finally:
        del _TRIED[name]
        if before is not None:
            _TRIED[name] = before


@functools.cache
def device_name(device: torch.device) -> str:
    """Name of a GPU as a file name; ``interpreter`` for tensors elsewhere, which only triton's interpreter takes."""
    if device.type != "cuda":
        return "interpreter"
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device)).strip("-")


@functools.cache
def triton_version() -> str:
    """Version of the installed triton, without importing it; "none" where it is not there."""
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "none"


@functools.cache
def _source_hash(family: str) -> str:
    """Of every file of the family that holds kernels: triton.py, and those that it imports them from."""
    sources = [path.read_bytes() for path in sorted((Path(__file__).parent / family).glob("*.py"))]
    return hashlib.sha256(b"".join(source for source in sources if b"import triton" in source)).hexdigest()[:12]


def tuned_file(family: str, device: str) -> Path:
    """Where the tuned tilings of a family on a GPU (`device_name`) are kept."""
    cache = Path(os.environ.get("FOVEAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveal")
    return cache / "tilings" / f"{family}-{device}-triton-{triton_version()}-{_source_hash(family)}.json"


@functools.cache
def _tuned(family: str, device: str) -> Mapping[str, Tiling]:
    if os.environ.get("FOVEAL_TUNED", "1") == "0":
        return {}
    try:
        tilings = json.loads(tuned_file(family, device).read_text(encoding="utf-8"))["tilings"]
        return {str(key): {str(name): int(value) for name, value in chosen.items()} for key, chosen in tilings.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # a file cut short or edited: the shipped table serves
        return {}


def forget() -> None:
    """Read the files anew at the next launch: after tuning, or where ``FOVEAL_CACHE`` moved."""
    _tuned.cache_clear()


def save(family: str, device: str, tilings: Mapping[str, Mapping[str, int]]) -> Path:
    """Write tuned tilings beside those already there (beside the file, then renamed), for every later launch."""
    path = tuned_file(family, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    forget()
    merged = {**_tuned(family, device), **{key: dict(chosen) for key, chosen in tilings.items()}}
    text: dict[str, Any] = {"family": family, "device": device, "triton": triton_version(), "source": _source_hash(family)}
    text["tilings"] = dict(sorted(merged.items()))
    handle, name = tempfile.mkstemp(suffix=".json", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(text, indent=1) + "\n")
    os.replace(name, path)
    forget()
    return path
