"""The public functions of rotary positions: `rotate` and its forms, their checks, and the registration with torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, has_triton, why_not_triton
from foveal.kernels.library import operator
from foveal.kernels.positions import cpu
from foveal.kernels.positions.frequencies import axial_frequencies, grid_positions, quaternion_frequencies, rotary_frequencies
from foveal.kernels.positions.reference import rotate_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Num

#: Most pairs that the Triton kernel turns at a time.
_MOST_PAIRS = 512

Rotated = Tensor | tuple[Tensor, Tensor]


def rotate(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch kv_heads length dim"] | None,
    positions: Num[Tensor, "length axes"] | Num[Tensor, "batch|1 length axes"],
    frequencies: Float[Tensor, "axes pairs"],
    *,
    interleaved: bool = False,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Any:
    r"""Turn pairs of channels of q and k by angles that are linear in the position, in one pass, with gradients of every order.

    .. math:: \theta_{n,p} = \sum_a x_{n,a} f_{a,p}, \quad (u, w) \to (u \cos\theta - w \sin\theta,\; w \cos\theta + u \sin\theta)

    for each position n and pair p. All rotary embeddings are this operator with some frequencies; `rotary`, `rotary_axial` and
    `rotary_quaternion` call it with the usual ones. Angles are computed in float32 (float64 for float64 inputs) whatever the dtype of q.

    Args:
        q: (batch, heads, length, dim).
        k: as q but for the number of heads and the head dim; None to turn q alone.
        positions: coordinates, (length, axes), or (batch, length, axes) where each sequence has its own; integers or floating.
        frequencies: radians per unit of position, (axes, pairs); 2 * pairs channels turn, the others pass as they are.
        interleaved: pairs are neighbours (2p, 2p + 1), as in RoFormer, GPT-J and the published Llama weights; otherwise p and p + pairs, as in
            GPT-NeoX and transformers.
        layout: "bhnd" as above, or "bnhd": (batch, length, heads, dim). Neither copies.
        backend: "triton", "cpu" (C, or torch in place where there is no library) or "reference"; by default the first that can. Only "reference"
            gives gradients of positions and frequencies; it is chosen where they are wanted.

    Returns:
        q turned, or with k the pair of both, in their dtypes and memory layouts.

    Raises:
        TypeError: q or k is not floating.
        ValueError: a shape does not fit, or `backend` cannot run the call.
    """
    q, k, positions, frequencies = _prepare(q, k, positions, frequencies, layout)
    chosen = choose("rotate", _candidates(q, k, positions, frequencies), backend)
    if chosen == "reference":
        out_q = rotate_reference(q, positions, frequencies, interleaved)
        out_k = None if k is None else rotate_reference(k, positions, frequencies, interleaved)
    else:
        out_q, out_k = _rotate(q, k, positions.detach(), frequencies.detach(), interleaved, chosen)
        out_k = None if k is None else out_k
    if layout == "bnhd":
        out_q, out_k = out_q.transpose(1, 2), None if out_k is None else out_k.transpose(1, 2)
    return out_q if out_k is None else (out_q, out_k)


def rotary(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch kv_heads length dim"] | None = None,
    *,
    positions: Num[Tensor, " length"] | Num[Tensor, "batch length"] | None = None,
    offset: int | Num[Tensor, " batch"] = 0,
    rotated_dims: int | None = None,
    base: float = 10_000.0,
    extension: float = 1.0,
    position_scale: float = 1.0,
    frequencies: Float[Tensor, " pairs"] | None = None,
    interleaved: bool = False,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Any:
    """Rotary position embedding in one dimension: scores of turned q and k depend on the difference of their positions.

    Args:
        q: (batch, heads, length, dim).
        k: as q but for the number of heads; None to turn q alone.
        positions: of each token; default 0, 1, 2, ...
        offset: added to the positions: how many tokens are already in the cache, for all sequences or for each.
        rotated_dims: channels that turn, the first ones of a head; default all.
        base: of the frequencies ``base ** (-2 i / rotated_dims)``.
        extension: how many times longer a context the base is stretched for (`rotary_frequencies`).
        position_scale: factor of the positions; 1 / 4 squeezes a context four times longer into the trained range (position interpolation).
        frequencies: the frequency of each pair, instead of `base` and `extension` (YaRN and other rules).
        interleaved: see `rotate`.
        layout: see `rotate`.
        backend: see `rotate`.

    Returns:
        q turned, or with k the pair of both.

    Raises:
        ValueError: a shape does not fit.

    References:
        Su et al., RoFormer, 2021; Chen et al., Extending Context Window by Positional Interpolation, 2023 (position_scale).
    """
    arguments = _one_axis(q, positions, offset, rotated_dims, base, extension, position_scale, frequencies, layout)
    return rotate(q, k, *arguments, interleaved=interleaved, layout=layout, backend=backend)


def rotary_axial(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch kv_heads length dim"] | None,
    positions: tuple[int, ...] | Num[Tensor, "length axes"] | Num[Tensor, "batch length axes"],
    *,
    rotated_dims: int | None = None,
    base: float = 100.0,
    interleaved: bool = False,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Any:
    """Rotary position embedding of images and volumes: an equal share of the pairs turns with each coordinate.

    Args:
        q: (batch, heads, length, dim).
        k: as q but for the number of heads; None to turn q alone.
        positions: sizes of a grid, such as (height, width), whose cells lie in order of the length, last axis fastest; or coordinates.
        rotated_dims: channels that turn, a multiple of 2 * axes; default: as many as dim allows.
        base: of each axis' frequencies.
        interleaved: see `rotate`.
        layout: see `rotate`.
        backend: see `rotate`.

    Returns:
        q turned, or with k the pair of both.

    Raises:
        ValueError: a shape does not fit, or `rotated_dims` does not divide among the axes.

    References:
        Heo et al., Rotary Position Embedding for Vision Transformer, 2024, section 3.2 ("RoPE-Axial").
    """
    places = grid_positions(positions, device=q.device) if isinstance(positions, tuple) else positions
    axes = places.shape[-1]
    rotated = _head_dim(q) // (2 * axes) * 2 * axes if rotated_dims is None else rotated_dims
    frequencies = axial_frequencies(rotated, axes, base, device=q.device)
    return rotate(q, k, places, frequencies, interleaved=interleaved, layout=layout, backend=backend)


def rotary_quaternion(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch kv_heads length dim"] | None,
    points: Float[Tensor, "length 3"] | Float[Tensor, "batch length 3"],
    *,
    rotated_dims: int | None = None,
    shortest: float = 0.5,
    longest: float = 20.0,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Any:
    """Each group of four channels, read as a quaternion, turned by unit quaternions of the token's point in space.

    Scores depend on the difference of two points alone, in all three coordinates and at several wavelengths: what QuatRoPE promises.
    What its released code computes instead is `quatrope_extension`.

    Args:
        q: (batch, heads, length, dim).
        k: as q but for the number of heads; None to turn q alone.
        points: coordinates, (length, 3) or (batch, length, 3).
        rotated_dims: channels that turn, a multiple of 4; default: as many as dim allows. 12 channels see each coordinate twice.
        shortest: shortest period, in the unit of the points.
        longest: longest period; larger scenes alias.
        layout: see `rotate`.
        backend: see `rotate`.

    Returns:
        q turned, or with k the pair of both.

    Raises:
        ValueError: a shape does not fit, or `rotated_dims` is no multiple of 4.

    References:
        QuatRoPE, CVPR 2026, arXiv 2603.24721, whose description it follows.
    """
    rotated = _head_dim(q) // 4 * 4 if rotated_dims is None else rotated_dims
    frequencies = quaternion_frequencies(rotated, shortest=shortest, longest=longest, device=q.device)
    return rotate(q, k, points, frequencies, interleaved=True, layout=layout, backend=backend)


def quatrope_extension(points: Float[Tensor, "batch length 3"], head_dim: int, *, base: float = 10_000.0) -> Float[Tensor, "batch length 3"]:
    """The three channels that QuatRoPE's released code appends to q and to k: ``(cos wy cos wz, cos wy sin wz, -sin wy)``.

    That is the first axis turned by angles w x, w y, w z about x, y and z, w = base ** (-3 / head_dim): x has no effect. Rows of zeros stand
    for tokens that are no objects; they get zeros before the first object and after the last, and (1, 0, 0) in between, as released.
    Append it to q and k of every head, leave v as it is, and give `attention` ``scale=(head_dim + 3) ** -0.5``.

    Args:
        points: box centres in metres, (batch, length, 3); zeros where the token is no object.
        head_dim: of q before anything is appended.
        base: of the rotary embedding beside it.

    Returns:
        (batch, length, 3), in the dtype of `points`; the same for every head.

    Raises:
        ValueError: another shape.

    References:
        QuatRoPE, CVPR 2026, arXiv 2603.24721; values of its released code.
    """
    if points.dim() != 3 or points.shape[-1] != 3:
        raise ValueError(f"points must have shape (batch, length, 3); got {tuple(points.shape)}")
    angle = points * base ** (-3 / head_dim)
    _, y, z = angle.unbind(-1)
    values = torch.stack((y.cos() * z.cos(), y.cos() * z.sin(), -y.sin()), -1)
    placed = (points != 0).any(-1)
    # inside the span of objects: one at or before the token, and one at or after it
    started, ended = placed.long().cumsum(-1) > 0, placed.long().flip(-1).cumsum(-1).flip(-1) > 0
    return values * (started & ended).unsqueeze(-1)


# --- arguments -----------------------------------------------------------------------------------------------------------------------


def _head_dim(q: Tensor) -> int:
    if not isinstance(q, Tensor) or q.dim() != 4:
        raise ValueError(f"q must have shape (batch, heads, length, dim); got {tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__}")
    return q.shape[3]


def _one_axis(
    q: Tensor,
    positions: Tensor | None,
    offset: int | Tensor,
    rotated_dims: int | None,
    base: float,
    extension: float,
    position_scale: float,
    frequencies: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Positions (batch|1, length, 1) and frequencies (1, pairs) of `rotary`."""
    _head_dim(q)
    length = q.shape[1 if layout == "bnhd" else 2]
    if frequencies is None:
        rotated = q.shape[-1] if rotated_dims is None else rotated_dims
        frequencies = rotary_frequencies(rotated, base, extension=extension, device=q.device)
    elif rotated_dims is not None and 2 * frequencies.shape[-1] != rotated_dims:
        raise ValueError(f"{frequencies.shape[-1]} frequencies turn {2 * frequencies.shape[-1]} channels, rotated_dims says {rotated_dims}")
    if positions is None:
        positions = torch.arange(length, device=q.device)
    if isinstance(offset, Tensor) and offset.dim() == 1:
        positions = positions + offset.unsqueeze(1)
    elif not isinstance(offset, int) or offset:
        positions = positions + offset
    places = positions.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if position_scale != 1.0:
        places = places * position_scale
    return places.unsqueeze(-1), frequencies.reshape(1, -1)


def _prepare(q: Tensor, k: Tensor | None, positions: Tensor, frequencies: Tensor, layout: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Checked, in (batch, heads, length, dim), positions with a batch axis, both in the dtype that angles are computed in."""
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd'; got {layout!r}")
    for name, x in (("q", q), ("k", k)):
        if x is None and name == "k":
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, batch, heads, length and dim; got {tuple(x.shape)}")
    if layout == "bnhd":
        q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
    if k is not None and (k.shape[0], k.shape[2], k.device) != (q.shape[0], q.shape[2], q.device):
        raise ValueError(f"q and k must share batch, length and device; got {tuple(q.shape)} on {q.device}, {tuple(k.shape)} on {k.device}")
    if frequencies.dim() != 2:
        raise ValueError(f"frequencies must have shape (axes, pairs); got {tuple(frequencies.shape)}")
    axes, pairs = frequencies.shape
    narrowest = min(x.shape[-1] for x in (q, k) if x is not None)
    if not 1 <= pairs <= narrowest // 2:
        raise ValueError(f"{pairs} pairs turn {2 * pairs} channels, expected 2 to {narrowest // 2 * 2}, the head dim being {narrowest}")
    places = positions.unsqueeze(0) if positions.dim() == 2 else positions
    if places.dim() != 3 or places.shape[0] not in (1, q.shape[0]) or places.shape[1:] != (q.shape[2], axes):
        raise ValueError(f"positions must have shape ({q.shape[2]}, {axes}) or ({q.shape[0]}, {q.shape[2]}, {axes}); got {tuple(positions.shape)}")
    if places.device != q.device or frequencies.device != q.device:
        raise ValueError(f"q is on {q.device}, positions on {places.device}, frequencies on {frequencies.device}: move them")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q, k, places.to(wide), frequencies.to(wide)


def _candidates(q: Tensor, k: Tensor | None, positions: Tensor, frequencies: Tensor) -> Candidates:
    learned = torch.is_grad_enabled() and (positions.requires_grad or frequencies.requires_grad)
    reason = "it gives no gradient of positions and frequencies, and one of them wants it" if learned else None
    triton = why_not_triton(q, k)
    if triton is None and frequencies.shape[1] > _MOST_PAIRS:
        triton = f"it turns at most {_MOST_PAIRS} pairs, these are {frequencies.shape[1]}"
    on_cpu = None if q.device.type == "cpu" else f"it needs tensors on the CPU, these are on {q.device.type}"
    return [("triton", triton or reason), ("cpu", on_cpu or reason), ("reference", None)]


def _rotate_candidates(
    q: Tensor, k: Tensor | None, positions: Tensor, frequencies: Tensor, *, interleaved: bool = False, layout: str = "bhnd"
) -> Any:
    return _candidates(*_prepare(q, k, positions, frequencies, layout))


def _rotary_candidates(
    q: Tensor,
    k: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    rotated_dims: int | None = None,
    base: float = 10_000.0,
    extension: float = 1.0,
    position_scale: float = 1.0,
    frequencies: Tensor | None = None,
    interleaved: bool = False,
    layout: str = "bhnd",
) -> Candidates:
    arguments = _one_axis(q, positions, offset, rotated_dims, base, extension, position_scale, frequencies, layout)
    return _candidates(*_prepare(q, k, *arguments, layout))


def _axial_candidates(q: Tensor, k: Tensor | None, positions: Any, **options: Any) -> Candidates:
    with torch.no_grad():
        places = grid_positions(positions, device=q.device) if isinstance(positions, tuple) else positions
    axes, layout = places.shape[-1], options.get("layout", "bhnd")
    frequencies = axial_frequencies(options.get("rotated_dims") or _head_dim(q) // (2 * axes) * 2 * axes, axes, device=q.device)
    return _candidates(*_prepare(q, k, places, frequencies, layout))


def _quaternion_candidates(q: Tensor, k: Tensor | None, points: Tensor, **options: Any) -> Candidates:
    frequencies = quaternion_frequencies(options.get("rotated_dims") or _head_dim(q) // 4 * 4, device=q.device)
    return _candidates(*_prepare(q, k, points, frequencies, options.get("layout", "bhnd")))


rotate.candidates = _rotate_candidates  # type: ignore[attr-defined]
rotary.candidates = _rotary_candidates  # type: ignore[attr-defined]
rotary_axial.candidates = _axial_candidates  # type: ignore[attr-defined]
rotary_quaternion.candidates = _quaternion_candidates  # type: ignore[attr-defined]


# --- registration --------------------------------------------------------------------------------------------------------------------


def _implementation(backend: str) -> Any:
    if backend == "triton" and has_triton():
        from foveal.kernels.positions import triton

        return triton
    return cpu


@operator("foveal::rotate", "(Tensor q, Tensor? k, Tensor positions, Tensor frequencies, bool interleaved, str backend) -> (Tensor, Tensor)")
def _rotate(q: Tensor, k: Tensor | None, positions: Tensor, frequencies: Tensor, interleaved: bool, backend: str) -> tuple[Tensor, Tensor]:
    outs = _implementation(backend).rotate([q] if k is None else [q, k], positions, frequencies, interleaved)
    return outs[0], q.new_empty(0) if k is None else outs[1]


@_rotate.register_fake
def _(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, positions, frequencies, ctx.interleaved, ctx.backend = inputs
    ctx.shapes = (q.shape, None if k is None else k.shape)
    ctx.save_for_backward(positions, frequencies)
    ctx.set_materialize_grads(False)


def _turn_back(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
    """The transpose of a rotation is the rotation by the opposite angle: the operator itself, so every order of gradient exists."""
    positions, frequencies = ctx.saved_tensors
    wanted = [grad if need else None for grad, need in zip((grad_q, grad_k), ctx.needs_input_grad[:2], strict=True)]
    present = [grad for grad in wanted if grad is not None]
    if not present:
        return (None,) * 6
    turned = iter(_rotate(present[0], present[1] if len(present) > 1 else None, positions, -frequencies, ctx.interleaved, ctx.backend))
    return *(None if grad is None else next(turned) for grad in wanted), None, None, None, None


_rotate.register_autograd(_turn_back, setup_context=_setup)


@_rotate.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    """Folded into the batch; mapped frequencies would be another rotation each, so they are applied one by one."""
    size = info.batch_size
    q, k, positions, frequencies, interleaved, backend = (
        value if dim is None or not isinstance(value, Tensor) else value.movedim(dim, 0) for value, dim in zip(arguments, in_dims, strict=True)
    )

    def each(value: Tensor | None, dim: int | None, index: int) -> Tensor | None:
        return value if dim is None or value is None else value[index]

    if in_dims[3] is not None:
        outs = [
            _rotate(
                each(q, in_dims[0], i), each(k, in_dims[1], i), each(positions, in_dims[2], i), each(frequencies, in_dims[3], i), interleaved, backend
            )
            for i in range(size)
        ]
        return (torch.stack([out for out, _ in outs]), torch.stack([out for _, out in outs])), (0, 0)

    def fold(value: Tensor, dim: int | None) -> Tensor:
        return (value.unsqueeze(0).expand(size, *value.shape) if dim is None else value).flatten(0, 1)

    batch = q.shape[0 if in_dims[0] is None else 1]
    if in_dims[2] is not None:
        positions = positions.expand(size, batch, *positions.shape[2:]).flatten(0, 1)
    elif positions.shape[0] > 1:
        positions = fold(positions, None)
    folded_k = None if k is None else fold(k, in_dims[1])
    out_q, out_k = _rotate(fold(q, in_dims[0]), folded_k, positions, frequencies, interleaved, backend)
    if k is None:
        return (out_q.unflatten(0, (size, -1)), out_k), (0, None)
    return (out_q.unflatten(0, (size, -1)), out_k.unflatten(0, (size, -1))), (0, 0)
