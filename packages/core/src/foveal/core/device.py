"""The ``--device`` option."""

from __future__ import annotations

import re

import torch

from foveal.core.errors import UserError


def resolve_device(name: str = "auto") -> torch.device:
    """Device that `name` means: ``auto`` (the first GPU, or the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    ROCm's devices are called cuda too, as in torch.

    Raises:
        UserError: another name, no GPU, or fewer of them.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"expected --device auto, cpu, cuda or cuda:N; got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(match[1] or 0)
    if index >= count:
        raise UserError(f"expected --device {name} to exist; torch sees {count} GPUs here; use --device auto or cpu")
    return torch.device("cuda", index)
