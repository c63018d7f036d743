"""Which backend runs a call, and why the others cannot.

Every public operator lists its backends in order of preference, each with the reason why it cannot take the call at hand (None: it can).
`choose` takes the first that can, or the one asked for; `explain` shows the whole list for a call without running it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: (backend, reason why it cannot run this call; None where it can), the preferred first.
Candidates = Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Explanation:
    """Answer of `explain`: the backend that a call would use, and for every other one why it would not."""

    operator: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator} runs on backend {self.backend!r}"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.reasons.items()])


#: Asked of the file system once, here: torch.compile traces through `has_triton` and would not follow the question.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether triton is installed; imports nothing."""
    return _TRITON_IS_INSTALLED


def interpreting() -> bool:
    """Whether triton runs its kernels in its interpreter, on any device (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(*tensors: torch.Tensor | None) -> str | None:
    """Reason why a Triton kernel cannot take these tensors, or None."""
    if not has_triton():
        return "triton is not installed"
    present = [tensor for tensor in tensors if tensor is not None]
    if not interpreting() and any(not tensor.is_cuda for tensor in present):
        return f"it needs tensors on a GPU, these are on {present[0].device.type}"
    if any(tensor.dtype == torch.float64 for tensor in present):
        return "float64 is for the definition and the CPU forms"
    return None


def choose(operator: str, candidates: Candidates, requested: str | None = None) -> str:
    """Name of the backend that runs the call.

    Raises:
        ValueError: `requested` does not exist for this operator, or cannot run the call; the message says why and names one that can.
    """
    able = [name for name, reason in candidates if reason is None]
    if requested is None:
        if not able:
            raise ValueError(f"{operator}: no backend can run this call: " + "; ".join(f"{name}: {reason}" for name, reason in candidates))
        return able[0]
    reasons = dict(candidates)
    if requested not in reasons:
        raise ValueError(f"{operator} has no backend {requested!r}; it has {', '.join(map(repr, reasons))}")
    if reasons[requested] is not None:
        instead = f"; backend {able[0]!r} can" if able else ""
        raise ValueError(f"{operator}: backend {requested!r} cannot run this call: {reasons[requested]}{instead}")
    return requested


def explain(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `operator(*args, **kwargs)` would use, and why the others would not. Nothing is computed.

    An operator that is a few lines of torch, such as one step of a recurrence, has one backend, "torch", on every device.

    Raises:
        TypeError: `operator` is not one of this package's public operators, or lacks an argument.
        ValueError: the arguments are not valid for it.
    """
    candidates = getattr(operator, "candidates", None)
    if candidates is None:
        face = importlib.import_module("foveal.kernels")
        if operator is explain or not inspect.isfunction(operator) or getattr(face, operator.__name__, None) is not operator:
            raise TypeError(f"explain takes an operator of foveal.kernels, such as foveal.kernels.attention; got {operator!r}")
        inspect.signature(operator).bind(*args, **kwargs)
        return Explanation(operator.__name__, "torch", {})
    requested = kwargs.pop("backend", None)
    listed: Candidates = candidates(*args, **kwargs)
    backend = choose(operator.__name__, listed, requested)
    return Explanation(operator.__name__, backend, {name: reason or "it can, but ranks lower" for name, reason in listed if name != backend})
