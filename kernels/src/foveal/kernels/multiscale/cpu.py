"""The multi-scale operators in C: one call an operator, one thread a sequence (see multiscale.c). float32 only."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from foveal.kernels import native

SOURCE = str(Path(__file__).with_name("multiscale.c"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled multiscale.c with its argument types, or None."""
    lib = native.load(SOURCE)
    if lib is None:
        return None
    pointer, integer, real, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for name, signature in {
        "depthwise_norm_forward": [pointer] * 8 + [integer] * 5 + [real, count],
        "depthwise_norm_backward": [pointer] * 10 + [integer] * 5 + [count],
        "gated_injection_forward": [pointer] * 8 + [integer] * 5 + [real, count],
        "gated_injection_backward": [pointer] * 11 + [integer] * 5 + [count],
        "channel_norm_forward": [pointer] * 6 + [integer] * 3 + [real, count],
        "channel_norm_backward": [pointer] * 7 + [integer] * 3 + [real, count],
    }.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = signature, None
    return lib


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    function = getattr(library(), name)
    function(*(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments), torch.get_num_threads())


def _zeros_for_threads(like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros(torch.get_num_threads(), *shape)


def depthwise_norm_forward(
    x: Tensor, taps: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, slope: Tensor | None, stride: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Output, and (sequences, 2) mean and reciprocal standard deviation. All contiguous; taps (kernel, channels)."""
    sequences, length, channels = x.shape
    kernel = 1 if taps is None else taps.shape[0]
    out = x.new_empty(sequences, (length + 2 * (kernel // 2) - kernel) // stride + 1, channels)
    stats = x.new_empty(sequences, 2)
    _call("depthwise_norm_forward", x, taps, bias, scale, shift, slope, out, stats, sequences, length, channels, kernel, stride, eps)
    return out, stats


def depthwise_norm_backward(
    grad: Tensor, x: Tensor, taps: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, slope: Tensor | None, stats: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and ((kernel + 3) * channels + 1,) of taps, bias, scale, shift, slope one after the other."""
    sequences, length, channels = x.shape
    kernel = 1 if taps is None else taps.shape[0]
    dx, parameters = torch.empty_like(x), _zeros_for_threads(x, (kernel + 3) * channels + 1)
    _call("depthwise_norm_backward", x, taps, bias, scale, shift, slope, stats, grad, dx, parameters, sequences, length, channels, kernel, stride)
    return dx, parameters.sum(0)


def gated_injection_forward(
    local: Tensor, other: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Output, and (sequences, 6) means and reciprocal standard deviations. All contiguous; taps (3, kernel, channels)."""
    sequences, length, channels = local.shape
    out, stats = torch.empty_like(local), local.new_empty(sequences, 6)
    _call(
        "gated_injection_forward", local, other, taps, scale, shift, index, out, stats,
        sequences, length, other.shape[1], channels, taps.shape[1], eps,
    )  # fmt: skip
    return out, stats


def gated_injection_backward(
    grad: Tensor, local: Tensor, other: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, index: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of local and other, and (3, kernel + 2, channels): of taps, scale and shift for each of the three parts."""
    sequences, length, channels = local.shape
    kernel = taps.shape[1]
    dlocal, dother, parameters = torch.empty_like(local), torch.empty_like(other), _zeros_for_threads(local, 3, kernel + 2, channels)
    _call(
        "gated_injection_backward", local, other, taps, scale, shift, index, stats, grad, dlocal, dother, parameters,
        sequences, length, other.shape[1], channels, kernel,
    )  # fmt: skip
    return dlocal, dother, parameters.sum(0)


def channel_norm_forward(x: Tensor, slope: Tensor, scale: Tensor, shift: Tensor, sizes: Tensor, eps: float) -> Tensor:
    """Output (rows, channels); slope a channel."""
    out = torch.empty_like(x)
    _call("channel_norm_forward", x, slope, scale, shift, sizes, out, x.shape[0], x.shape[1], sizes.numel(), eps)
    return out


def channel_norm_backward(grad: Tensor, x: Tensor, slope: Tensor, scale: Tensor, sizes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradient of x, and (3, channels): of slope, scale and shift, each a channel."""
    dx, parameters = torch.empty_like(x), _zeros_for_threads(x, 3, x.shape[1])
    _call("channel_norm_backward", x, grad, slope, scale, sizes, dx, parameters, x.shape[0], x.shape[1], sizes.numel(), eps)
    return dx, parameters.sum(0)
