"""The public functions `neighborhood_attention_1d`, `_2d` and `_3d`: their arguments and checks, and the registration with torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import differentiate_twice, operator
from foveal.kernels.neighborhood.reference import neighborhood_reference

if TYPE_CHECKING:
    from jaxtyping import Float

LARGEST_DIM = 256
AXES = ("x", "y", "z")


def neighborhood_attention_1d(
    q: Float[Tensor, "batch heads x dim"],
    k: Float[Tensor, "batch kv_heads x dim"],
    v: Float[Tensor, "batch kv_heads x value_dim"],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    rpb: Float[Tensor, "heads 2*kernel-1"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Neighbourhood attention along one axis: each query attends to its `kernel_size` nearest keys.

    Arguments, results, errors and references as in `neighborhood_attention_2d`, with one axis instead of two.
    """
    return _neighborhood(1, backend, return_lse, q, k, v, kernel_size, stride, dilation, causal, rpb, scale)


def neighborhood_attention_2d(
    q: Float[Tensor, "batch heads x y dim"],
    k: Float[Tensor, "batch kv_heads x y dim"],
    v: Float[Tensor, "batch kv_heads x y value_dim"],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    rpb: Float[Tensor, "heads 2*kernel-1 2*kernel-1"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Neighbourhood attention on a grid: each query attends to the kernel_size x kernel_size keys nearest to it.

    .. math:: o_i = \sum_{j \in \rho(i)} p_{ij} v_j, \quad p_{ij} \propto \exp(s\, q_i \cdot k_j + r_{j - i})

    At a border the window shifts inwards: every query sees exactly `kernel_size` keys along each axis, unless the axis is causal. The
    meaning of every option is NATTEN's. The backward pass has no atomics: it gives the same bits every time.

    Args:
        q: queries, (batch, heads, x, y, dim); dim from 1 to 256.
        k: keys, (batch, kv_heads, x, y, dim). heads must be a multiple of kv_heads; query head h reads key head h // (heads / kv_heads).
        v: values, (batch, kv_heads, x, y, value_dim).
        kernel_size: keys along each axis, one number or one per axis; odd windows are centred, even ones reach one further to the left.
            kernel_size * dilation must not exceed the axis.
        stride: that many neighbouring queries share the window of the one in their middle (last one on a causal axis); from 1 to kernel_size.
            stride == kernel_size gives blocked attention.
        dilation: distance of neighbouring keys; the axis falls apart into that many interleaved ones.
        causal: whether queries see no key after them, for all axes or per axis. Causal windows do not shift: they are shorter at the start.
        rpb: bias by relative position, (heads, 2 * kernel_size - 1, ...); entry kernel_size - 1 + (key - query) / dilation. Differentiable;
            -inf shuts an offset. Any floating dtype, float32 advised beside half precision.
        scale: s above; dim ** -0.5 by default.
        return_lse: also return the log-sum-exp; it is differentiable.
        backend: "triton", "cpu" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, x, y, value_dim) in q's dtype and, if asked for, the log-sum-exp (batch, heads, x, y): natural logarithm,
        float32 (float64 for float64 inputs). Under autocast q, k and v are cast, the table is not.

    Raises:
        ValueError: a shape, dtype, device or size does not fit, or `backend` cannot run the call.
        TypeError: q, k, v or rpb are not floating.

    References:
        Hassani et al., Neighborhood Attention Transformer, 2023. Hassani, Shi, Dilated Neighborhood Attention Transformer, 2022.
        Hassani et al., Generalized Neighborhood Attention, 2025 (stride).
    """
    return _neighborhood(2, backend, return_lse, q, k, v, kernel_size, stride, dilation, causal, rpb, scale)


def neighborhood_attention_3d(
    q: Float[Tensor, "batch heads x y z dim"],
    k: Float[Tensor, "batch kv_heads x y z dim"],
    v: Float[Tensor, "batch kv_heads x y z value_dim"],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    rpb: Float[Tensor, "heads 2*kernel-1 2*kernel-1 2*kernel-1"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Neighbourhood attention in a volume or a video: each query attends to the `kernel_size` keys nearest to it along each of three axes.

    Arguments, results, errors and references as in `neighborhood_attention_2d`, with three axes instead of two.
    """
    return _neighborhood(3, backend, return_lse, q, k, v, kernel_size, stride, dilation, causal, rpb, scale)


def _neighborhood(axes: int, backend: str | None, return_lse: bool, *arguments: Any) -> Any:
    prepared = _prepare(axes, *arguments)
    chosen = choose(f"neighborhood_attention_{axes}d", _candidates(*prepared[:4]), backend)
    out, lse = neighborhood_reference(*prepared) if chosen == "reference" else neighborhood_forward(*prepared, chosen)
    out, lse = out.flatten(2, 5 - axes), lse.flatten(2, 5 - axes)  # the axes of one token
    return (out, lse) if return_lse else out


def _candidates(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Candidates:
    cpu = None if q.device.type == "cpu" else f"it needs tensors on the CPU, these are on {q.device.type}"
    return [("triton", why_not_triton(q, k, v, rpb)), ("cpu", cpu), ("reference", None)]


_OPTIONS: dict[str, Any] = {"stride": 1, "dilation": 1, "causal": False, "rpb": None, "scale": None}


def _public_candidates(axes: int) -> Callable[..., Candidates]:
    def candidates(q: Tensor, k: Tensor, v: Tensor, kernel_size: int | Sequence[int], **options: Any) -> Candidates:
        options.pop("return_lse", None)
        arguments = [options.pop(name, default) for name, default in _OPTIONS.items()]
        if options:
            raise TypeError(f"neighborhood_attention_{axes}d has no argument {', '.join(map(repr, options))}")
        return _candidates(*_prepare(axes, q, k, v, kernel_size, *arguments)[:4])

    return candidates


for _axes, _function in enumerate((neighborhood_attention_1d, neighborhood_attention_2d, neighborhood_attention_3d), 1):
    _function.candidates = _public_candidates(_axes)  # type: ignore[attr-defined]


def _prepare(
    axes: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    causal: bool | Sequence[bool],
    rpb: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[int], list[int], list[int], list[bool], float]:
    """Check the arguments; give them with three axes (those missing are of one token, in front), key heads repeated."""
    names = ("batch", "heads", *AXES[:axes], "dim")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dim() != axes + 3:
            raise ValueError(f"{name} must have {axes + 3} dimensions ({', '.join(names)}); got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, heads, *shape, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    if k.shape != (batch, kv_heads, *shape, dim) or v.shape != (batch, kv_heads, *shape, value_dim):
        raise ValueError(
            f"k and v must have the batch and the axes of q, and k its head dimension; got shapes {tuple(q.shape)} for q, {tuple(k.shape)} "
            f"for k, {tuple(v.shape)} for v"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k and v; got {heads} and {kv_heads}")
    if not (1 <= dim <= LARGEST_DIM and 1 <= value_dim <= LARGEST_DIM):
        raise ValueError(f"head dimensions must be from 1 to {LARGEST_DIM}; got {dim} for q and k, {value_dim} for v")
    devices = {t.device for t in (q, k, v, rpb) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    kernel, strides, dilations = (
        _per_axis(name, value, axes) for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    for axis, length, size, step, spread in zip(AXES, shape, kernel, strides, dilations, strict=False):
        if size < 1 or spread < 1 or size * spread > length:
            raise ValueError(f"kernel_size * dilation must be from 1 to the length of axis {axis}, {length}; got {size} * {spread}")
        if not 1 <= step <= size:
            raise ValueError(f"stride must be from 1 to kernel_size, {size} along axis {axis}; got {step}")
    flags = [bool(flag) for flag in (causal if isinstance(causal, Sequence) else [causal] * axes)]
    if len(flags) != axes:
        raise ValueError(f"causal must be one bool, or {axes}, one per axis; got {len(flags)}")
    if rpb is not None:
        if not rpb.is_floating_point():
            raise TypeError(f"rpb must be floating point, it is added to the logits; got {rpb.dtype}")
        wanted = (heads, *(2 * size - 1 for size in kernel))
        if rpb.shape != wanted:
            raise ValueError(f"rpb must have shape (heads, 2 * kernel_size - 1, ...) = {wanted}; got {tuple(rpb.shape)}")
    if kv_heads != heads:
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    for _ in range(3 - axes):
        q, k, v = (t.unsqueeze(2) for t in (q, k, v))
        rpb = None if rpb is None else rpb.unsqueeze(1)
        kernel, strides, dilations, flags = [1, *kernel], [1, *strides], [1, *dilations], [False, *flags]
    return q, k, v, rpb, kernel, strides, dilations, flags, float(dim**-0.5 if scale is None else scale)


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * axes
    if len(values) != axes or not all(isinstance(each, int) and not isinstance(each, bool) for each in values):
        raise ValueError(f"{name} must be one int, or {axes}, one per axis; got {value!r}")
    return values


# --- registration --------------------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call: triton only where it runs."""
    return importlib.import_module(f"foveal.kernels.neighborhood.{backend}")


@operator("foveal::neighborhood_forward")
def neighborhood_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by one backend; arguments as `_prepare` gives them."""
    out = q.new_empty(*q.shape[:5], v.shape[5])
    lse = q.new_empty(q.shape[:5], dtype=_wide(q))
    with torch.autocast(q.device.type, enabled=False):
        _implementation(backend).forward(q, k, v, rpb, kernel, stride, dilation, causal, scale, out, lse)
    return out, lse


@neighborhood_forward.register_fake
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:5], v.shape[5]), q.new_empty(q.shape[:5], dtype=_wide(q))


@operator("foveal::neighborhood_backward")
def neighborhood_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[bool],
    scale: float,
    needs_drpb: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rpb (empty where not asked for) by one backend."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    drpb = rpb.new_empty(rpb.shape, dtype=_wide(rpb)) if rpb is not None and needs_drpb else None
    with torch.autocast(q.device.type, enabled=False):
        _implementation(backend).backward(dout, dlse, q, k, v, rpb, out, lse, kernel, stride, dilation, causal, scale, dq, dk, dv, drpb)
    return dq, dk, dv, q.new_empty(0) if rpb is None or drpb is None else drpb.to(rpb.dtype)


@neighborhood_backward.register_fake
def _fake_backward(dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs_drpb = rest[-2]
    drpb = rpb.new_empty(rpb.shape) if rpb is not None and needs_drpb else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), drpb


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rpb, *options = inputs
    ctx.save_for_backward(q, k, v, rpb, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, rpb, out, lse = ctx.saved_tensors
    *options, backend = ctx.options
    if dout is None:
        if dlse is None:
            return (None,) * 10
        dout = torch.zeros_like(out)
    needs_drpb = rpb is not None and ctx.needs_input_grad[3]
    dq, dk, dv, drpb = neighborhood_backward(dout, dlse, q, k, v, rpb, out, lse, *options, needs_drpb, backend)
    return dq, dk, dv, drpb if needs_drpb else None, *(None,) * 6


neighborhood_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dout, dlse, q, k, v, rpb, _, _, *options, _, _ = inputs
    ctx.save_for_backward(dout, dlse, q, k, v, rpb)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition: it holds (query, key) arrays."""
    dout, dlse, *inputs = ctx.saved_tensors

    def definition(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> tuple[Tensor, Tensor]:
        return neighborhood_reference(q, k, v, rpb, *ctx.options)

    return (*differentiate_twice(definition, (dout, dlse), inputs, second), *(None,) * 9)


neighborhood_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


def _fold(tensor: Tensor | None, dim: int | None, size: int, into: int) -> Tensor | None:
    """A vmapped argument with the mapped dimension folded into dimension `into`: as its slower part."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(into).expand(*tensor.shape[:into], size, *tensor.shape[into:]) if dim is None else tensor.movedim(dim, into)
    return tensor.flatten(into, into + 1)


def _map(function: Callable[..., tuple[Tensor, ...]], table: int) -> Callable[..., tuple[Any, Any]]:
    """Batching rule: calls with a table of their own are so many more heads, others so many more batches."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        into = 0 if arguments[table] is None else 1
        folded = [
            _fold(value, dim, info.batch_size, into if position != table else 0) if isinstance(value, Tensor) else value
            for position, (value, dim) in enumerate(zip(arguments, in_dims, strict=True))
        ]
        found = function(*folded)
        # the table's gradient starts with its heads; an empty one is the same for all
        places = [into if value.dim() > 4 else 0 for value in found]
        results = tuple(v if v.numel() == 0 and v.dim() == 1 else v.unflatten(p, (info.batch_size, -1)) for v, p in zip(found, places, strict=True))
        return results, tuple(None if v.numel() == 0 and v.dim() == 1 else p for v, p in zip(found, places, strict=True))

    return rule


neighborhood_forward.register_vmap(_map(neighborhood_forward, 3))
neighborhood_backward.register_vmap(_map(neighborhood_backward, 5))
