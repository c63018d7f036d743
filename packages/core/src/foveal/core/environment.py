"""What a figure was measured on: machine, versions, commit. Benchmarks store it beside their results and ``foveal doctor`` prints it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

#: Distributions whose version changes results or speed.
DISTRIBUTIONS = (
    *("foveal", "foveal-kernels", "foveal-core"),
    *("foveal-audio", "foveal-detection", "foveal-eeg", "foveal-graphs3d", "foveal-medical", "foveal-memes"),
    *("torch", "triton", "lightning", "numpy", "safetensors", "wandb"),
)


def describe() -> dict[str, Any]:
    """Machine, versions and commit as plain values, ready for JSON."""
    import torch

    return {
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory(),
            "threads": torch.get_num_threads(),
            "gpus": [_gpu(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())],
            "system": platform.platform(terse=True),
        },
        "python": platform.python_version(),
        "versions": versions(),
        "accelerator": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "none",
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Version of each of `DISTRIBUTIONS` that is installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout this file lies in, ending in ``+`` with uncommitted changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        name = subprocess.run(["git", "-C", here, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        # An installed wheel may lie inside somebody else's checkout.
        tracked = subprocess.run(["git", "-C", here, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if name.returncode or tracked.returncode:
            return None
        dirty = subprocess.run(["git", "-C", here, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return name.stdout.strip() + ("+" if dirty else "")


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu(properties: Any) -> dict[str, Any]:
    capability = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
    return {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "architecture": capability}
