"""Uninitialised memory made visible: `torch.empty` filled with NaN while a kernel runs.

Fresh memory is often zero, so a kernel that forgets to write a row passes its tests and fails in training. With every allocation of the
package poisoned, what is not written is NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

_ALLOCATIONS = ("empty", "empty_like", "empty_strided")


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def _poisoning(allocate: Callable[..., torch.Tensor], package: str) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        inside = caller == package or caller.startswith(package + ".")
        return _fill(tensor) if inside and type(tensor) is torch.Tensor and tensor.device.type != "meta" else tensor

    return poisoned


@contextmanager
def poisoned_empty(package: str = "foveal.kernels") -> Iterator[None]:
    """While active, what modules of `package` allocate without initialising is NaN (integers: the largest value); others are left alone.

    Covers `torch.empty`, `torch.empty_like`, `torch.empty_strided` and `Tensor.new_empty`.
    """
    with ExitStack() as stack:
        for name in _ALLOCATIONS:
            stack.enter_context(mock.patch.object(torch, name, _poisoning(getattr(torch, name), package)))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty, package)))
        yield
