"""Multi-scale selective attention: the three operators that gate features of one resolution by features of another.

They are what TIGER's MSA and F3A modules (Xu et al., ICLR 2025, section 3.3) are made of besides matrix products: a depthwise convolution with a
norm over the whole sequence, the gated injection of a coarser sequence into a finer one, and a PReLU with a norm over groups of channels.
On a CPU in float32 each runs in one C call with a C backward that recomputes instead of storing; elsewhere the torch definition runs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose
from foveal.kernels.library import operator
from foveal.kernels.multiscale import cpu, reference

if TYPE_CHECKING:
    from jaxtyping import Float


def _candidates(x: Tensor, *others: Tensor | None) -> Candidates:
    if x.device.type != "cpu":
        reason: str | None = f"it needs tensors on the CPU, these are on {x.device.type}"
    elif any(tensor is not None and tensor.dtype != torch.float32 for tensor in (x, *others)):
        reason = f"it is float32 only; got {x.dtype}"
    elif x.numel() == 0:
        reason = "there is nothing to compute"
    elif not torch.compiler.is_compiling() and cpu.library() is None:
        reason = "no compiled C library: no compiler was found, or FOVEAL_NATIVE=0"
    else:
        reason = None
    return [("cpu", reason), ("torch", None)]


def _channels(name: str, x: Tensor) -> int:
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"{name} must be (sequences, length, channels); got {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}")
    return x.shape[2]


# Cached tensors are made outside inference mode: one made inside could not take part in training later on.
@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _nearest_index(source: int, target: int, device: torch.device) -> Tensor:
    # asked of torch itself, so that its rounding is ours
    positions = torch.arange(source, dtype=torch.float32)[None, None]
    return F.interpolate(positions, size=target, mode="nearest")[0, 0].long().to(device)


# ---------------------------------------------------------------------------------------------------------------- depthwise_norm


def _depthwise_norm_candidates(
    x: Tensor,
    taps: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor | None = None,
    *,
    stride: int = 1,
    eps: float = 1e-8,
) -> Candidates:
    return _candidates(x, taps, bias, scale, shift, slope)


def depthwise_norm(
    x: Float[Tensor, "sequences length channels"],
    taps: Float[Tensor, "channels kernel"] | None,
    bias: Float[Tensor, " channels"] | None,
    scale: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"],
    slope: Float[Tensor, 1] | None = None,
    *,
    stride: int = 1,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Float[Tensor, "sequences shorter channels"]:
    """Depthwise convolution along each sequence, global layer norm, optional PReLU, in one pass over the data.

    Args:
        x: channels last.
        taps: odd kernel, zero padding of kernel // 2 on both sides; None for no convolution.
        bias: of the convolution; None for none.
        scale: of the norm over length and channels of one sequence.
        shift: of the norm.
        slope: of a PReLU after the norm; None for none.
        stride: of the convolution.
        eps: added to the variance.
        backend: "cpu" or "torch"; None takes the first that can.

    Returns:
        (sequences, ceil(length / stride), channels) in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an even kernel, or a backend that cannot run the call.

    References:
        Xu, Li, Chen, Hu, TIGER, ICLR 2025 (its multi-scale selective attention).
    """
    channels = _channels("x", x)
    if scale.shape != (channels,) or shift.shape != (channels,):
        raise ValueError(f"x must be (sequences, length, channels), scale and shift (channels,); got {_shapes(x, scale, shift)}")
    if taps is not None and (taps.ndim != 2 or taps.shape[0] != channels or taps.shape[1] % 2 == 0):
        raise ValueError(f"taps must be ({channels}, kernel) with an odd kernel; got {tuple(taps.shape)}")
    if taps is None and (bias is not None or stride != 1):
        raise ValueError("bias and stride belong to the convolution; pass taps with them")
    if choose("depthwise_norm", _depthwise_norm_candidates(x, taps, bias, scale, shift, slope), backend) == "torch":
        return reference.depthwise_norm(x, taps, bias, scale, shift, slope, stride, eps)
    return _depthwise_norm_forward(x, taps, bias, scale, shift, slope, stride, eps)[0]


depthwise_norm.candidates = _depthwise_norm_candidates  # type: ignore[attr-defined]


@operator("foveal::depthwise_norm_forward")
def _depthwise_norm_forward(
    x: Tensor, taps: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, slope: Tensor | None, stride: int, eps: float
) -> tuple[Tensor, Tensor]:
    rows = None if taps is None else taps.t().contiguous()
    return cpu.depthwise_norm_forward(x.contiguous(), rows, _dense(bias), scale.contiguous(), shift.contiguous(), _dense(slope), stride, eps)


@_depthwise_norm_forward.register_fake
def _(x, taps, bias, scale, shift, slope, stride, eps):
    kernel = 1 if taps is None else taps.shape[1]
    return x.new_empty(x.shape[0], (x.shape[1] + 2 * (kernel // 2) - kernel) // stride + 1, x.shape[2]), x.new_empty(x.shape[0], 2)


@operator("foveal::depthwise_norm_backward")
def _depthwise_norm_backward(
    grad: Tensor,
    x: Tensor,
    taps: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor | None,
    stats: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor]:
    rows = None if taps is None else taps.t().contiguous()
    return cpu.depthwise_norm_backward(
        grad.contiguous(), x.contiguous(), rows, _dense(bias), scale.contiguous(), shift.contiguous(), _dense(slope), stats, stride
    )


@_depthwise_norm_backward.register_fake
def _(grad, x, taps, bias, scale, shift, slope, stats, stride):
    kernel = 1 if taps is None else taps.shape[1]
    return torch.empty_like(x), x.new_empty((kernel + 3) * x.shape[2] + 1)


def _depthwise_norm_setup(ctx, inputs, output):
    x, taps, bias, scale, shift, slope, ctx.stride, _ = inputs
    ctx.save_for_backward(x, taps, bias, scale, shift, slope, output[1])


def _depthwise_norm_autograd(ctx, grad, _):
    x, taps, bias, scale, shift, slope, stats = ctx.saved_tensors
    dx, parameters = _depthwise_norm_backward(grad, x, taps, bias, scale, shift, slope, stats, ctx.stride)
    channels = x.shape[2]
    rows = parameters[:-1].view(-1, channels)
    return (
        dx,
        None if taps is None else rows[:-3].t(),
        None if bias is None else rows[-3],
        rows[-2],
        rows[-1],
        None if slope is None else parameters[-1:],
        None,
        None,
    )


_depthwise_norm_forward.register_autograd(_depthwise_norm_autograd, setup_context=_depthwise_norm_setup)


# --------------------------------------------------------------------------------------------------------------- gated_injection


def _gated_injection_candidates(local: Tensor, other: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-8) -> Candidates:
    return _candidates(local, other, taps, scale, shift)


def gated_injection(
    local: Float[Tensor, "sequences length channels"],
    other: Float[Tensor, "sequences other_length channels"],
    taps: Float[Tensor, "3 channels kernel"],
    scale: Float[Tensor, "3 channels"],
    shift: Float[Tensor, "3 channels"],
    *,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Float[Tensor, "sequences length channels"]:
    """Local features, gated and shifted by features of another resolution.

    With n_i(x) a depthwise convolution and a global layer norm with the i-th parameters, and up() nearest-neighbour interpolation to `length`
    (which also shrinks), the result is n_0(local) * up(sigmoid(n_1(other))) + up(n_2(other)).

    Args:
        local: channels last.
        other: the same sequences at another length.
        taps: odd kernels of the local, gate and shift convolutions.
        scale: of the three norms.
        shift: of the three norms.
        eps: added to the variances.
        backend: "cpu" or "torch"; None takes the first that can.

    Returns:
        (sequences, length, channels) in the dtype of `local`.

    Raises:
        ValueError: shapes that do not fit, an even kernel, or a backend that cannot run the call.

    References:
        Xu, Li, Chen, Hu, TIGER, ICLR 2025 (its selective attention between scales).
    """
    channels = _channels("local", local)
    if other.ndim != 3 or other.shape[::2] != local.shape[::2]:
        raise ValueError(f"local and other must be (sequences, length, channels) and differ in length only; got {_shapes(local, other)}")
    if taps.ndim != 3 or taps.shape[:2] != (3, channels) or taps.shape[2] % 2 == 0 or scale.shape != (3, channels) or shift.shape != (3, channels):
        raise ValueError(f"taps must be (3, {channels}, odd kernel), scale and shift (3, {channels}); got {_shapes(taps, scale, shift)}")
    index = _nearest_index(other.shape[1], local.shape[1], local.device)
    if choose("gated_injection", _gated_injection_candidates(local, other, taps, scale, shift), backend) == "torch":
        return reference.gated_injection(local, other, taps, scale, shift, index, eps)
    return _gated_injection_forward(local, other, taps, scale, shift, index, eps)[0]


gated_injection.candidates = _gated_injection_candidates  # type: ignore[attr-defined]


@operator("foveal::gated_injection_forward")
def _gated_injection_forward(
    local: Tensor, other: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, index: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    rows = taps.transpose(1, 2).contiguous()
    return cpu.gated_injection_forward(local.contiguous(), other.contiguous(), rows, scale.contiguous(), shift.contiguous(), index, eps)


@_gated_injection_forward.register_fake
def _(local, other, taps, scale, shift, index, eps):
    return torch.empty_like(local, memory_format=torch.contiguous_format), local.new_empty(local.shape[0], 6)


@operator("foveal::gated_injection_backward")
def _gated_injection_backward(
    grad: Tensor, local: Tensor, other: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, index: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = taps.transpose(1, 2).contiguous()
    return cpu.gated_injection_backward(
        grad.contiguous(), local.contiguous(), other.contiguous(), rows, scale.contiguous(), shift.contiguous(), index, stats
    )


@_gated_injection_backward.register_fake
def _(grad, local, other, taps, scale, shift, index, stats):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(local, memory_format=contiguous),
        torch.empty_like(other, memory_format=contiguous),
        taps.new_empty(3, taps.shape[2] + 2, taps.shape[1]),
    )


def _gated_injection_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[1])


def _gated_injection_autograd(ctx, grad, _):
    dlocal, dother, parameters = _gated_injection_backward(grad, *ctx.saved_tensors)
    return dlocal, dother, parameters[:, :-2].transpose(1, 2), parameters[:, -2], parameters[:, -1], None, None


_gated_injection_forward.register_autograd(_gated_injection_autograd, setup_context=_gated_injection_setup)


# ------------------------------------------------------------------------------------------------------------------ channel_norm


def _channel_norm_candidates(x: Tensor, slope: Tensor, scale: Tensor, shift: Tensor, sizes: tuple[int, ...], *, eps: float = 1e-5) -> Candidates:
    return _candidates(x, slope, scale, shift)


def channel_norm(
    x: Float[Tensor, "*position channels"],
    slope: Float[Tensor, " groups"],
    scale: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"],
    sizes: tuple[int, ...],
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Float[Tensor, "*position channels"]:
    """PReLU, then layer norm over each group of neighbouring channels, then one scale and shift a channel.

    Args:
        x: channels last.
        slope: of the PReLU, one a group.
        scale: of the norms.
        shift: of the norms.
        sizes: channels of each group, in order; they add up to `channels`.
        eps: added to the variances.
        backend: "cpu" or "torch"; None takes the first that can.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run the call.
    """
    if x.ndim == 0:
        raise ValueError("x must be (..., channels), channels last; got a number")
    channels = x.shape[-1]
    if sum(sizes) != channels or slope.shape != (len(sizes),) or scale.shape != (channels,) or shift.shape != (channels,):
        raise ValueError(
            f"sizes must add up to the {channels} channels of x, with a slope a group and a scale and shift a channel; "
            f"got sizes {sizes} and {_shapes(slope, scale, shift)}"
        )
    if choose("channel_norm", _channel_norm_candidates(x, slope, scale, shift, sizes), backend) == "torch":
        return reference.channel_norm(x, slope, scale, shift, sizes, eps)
    expanded = slope.repeat_interleave(_sizes(sizes, slope.device), output_size=channels)
    return _channel_norm_forward(x.reshape(-1, channels), expanded, scale, shift, _sizes(sizes, x.device), eps).view(x.shape)


channel_norm.candidates = _channel_norm_candidates  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _sizes(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device)


@operator("foveal::channel_norm_forward")
def _channel_norm_forward(x: Tensor, slope: Tensor, scale: Tensor, shift: Tensor, sizes: Tensor, eps: float) -> Tensor:
    return cpu.channel_norm_forward(x.contiguous(), slope.contiguous(), scale.contiguous(), shift.contiguous(), sizes, eps)


@_channel_norm_forward.register_fake
def _(x, slope, scale, shift, sizes, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("foveal::channel_norm_backward")
def _channel_norm_backward(grad: Tensor, x: Tensor, slope: Tensor, scale: Tensor, sizes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cpu.channel_norm_backward(grad.contiguous(), x.contiguous(), slope.contiguous(), scale.contiguous(), sizes, eps)


@_channel_norm_backward.register_fake
def _(grad, x, slope, scale, sizes, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(3, x.shape[1])


def _channel_norm_setup(ctx, inputs, output):
    x, slope, scale, _, sizes, ctx.eps = inputs
    ctx.save_for_backward(x, slope, scale, sizes)


def _channel_norm_autograd(ctx, grad):
    x, slope, scale, sizes = ctx.saved_tensors
    dx, parameters = _channel_norm_backward(grad, x, slope, scale, sizes, ctx.eps)
    return dx, parameters[0], parameters[1], parameters[2], None, None


_channel_norm_forward.register_autograd(_channel_norm_autograd, setup_context=_channel_norm_setup)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
