"""Features of atoms into the frames of their edges, and messages out of them and summed: the two steps in which graph transformers wait for memory.

Both are products of matrices with something gathered or weighted, and what is gathered or weighted is as large as all edges' features. It is made
anew in the backward instead of being kept, which leaves a layer's features of edges in memory once. Gradients of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveal.kernels import segment_reduce


def into_frames(
    frames: Float[Tensor, "edges kept coefficients"],
    x: Float[Tensor, "atoms coefficients channels"],
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    indptr: Int[Tensor, "atoms+1"],
) -> Float[Tensor, "edges kept twice"]:
    """What both atoms of each edge know, the sender's channels first, turned into the frame of the edge.

    Args:
        frames: Wigner matrices.
        x: features of atoms.
        source: atom that sends.
        target: atom that receives, ascending.
        indptr: where the edges of each target begin.
    """
    return _IntoFrames.apply(_narrowed(frames), _narrowed(x), source, target, indptr)


def sum_out_of_frames(
    frames: Float[Tensor, "edges kept coefficients"],
    messages: Float[Tensor, "edges kept channels"],
    shares: Float[Tensor, "edges heads"],
    target: Int[Tensor, " edges"],
    indptr: Int[Tensor, "atoms+1"],
) -> Float[Tensor, "atoms coefficients channels"]:
    """Messages times their share of the attention, turned back and summed at the atom that receives.

    Args:
        frames: Wigner matrices.
        messages: head after head.
        shares: of each head.
        target: atom that receives, ascending.
        indptr: where the edges of each target begin.
    """
    messages = _narrowed(messages)
    return _SumOutOfFrames.apply(frames.to(messages.dtype), messages, shares.to(messages.dtype), target, indptr)


def _narrowed(tensor: Tensor) -> Tensor:
    """In autocast's dtype, as its matrix products would have it; the backward then sees one dtype alone."""
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


class _Rows(torch.autograd.Function):
    """Rows of a table, by index; the gradient is a sum without atomics."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return segment_reduce(grad, ctx.saved_tensors[0], num_nodes=ctx.rows), None


def _pair(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return torch.cat((_Rows.apply(x, source), _Rows.apply(x, target)), 2)


class _IntoFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, x: Tensor, source: Tensor, target: Tensor, indptr: Tensor) -> Tensor:
        ctx.save_for_backward(frames, x, source, target, indptr)
        return torch.bmm(frames, _pair(x, source, target))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, x, source, target, indptr = ctx.saved_tensors
        to_frames = to_x = None
        if ctx.needs_input_grad[0]:
            to_frames = torch.bmm(grad, _pair(x, source, target).transpose(1, 2))
        if ctx.needs_input_grad[1]:
            turned = frames.transpose(1, 2)
            sent, received = (torch.bmm(turned, half) for half in grad.chunk(2, 2))
            to_x = segment_reduce(sent, source, num_nodes=len(x)) + segment_reduce(received, ptr=indptr)
        return to_frames, to_x, None, None, None


def _weighted(messages: Tensor, shares: Tensor) -> Tensor:
    return (messages.unflatten(2, (shares.shape[1], -1)) * shares[:, None, :, None]).flatten(2)


class _SumOutOfFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, messages: Tensor, shares: Tensor, target: Tensor, indptr: Tensor) -> Tensor:
        ctx.save_for_backward(frames, messages, shares, target, indptr)
        return segment_reduce(torch.bmm(frames.transpose(1, 2), _weighted(messages, shares)), ptr=indptr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, messages, shares, target, _ = ctx.saved_tensors
        arriving = _Rows.apply(grad, target)
        to_frames = to_messages = to_shares = None
        if ctx.needs_input_grad[0]:
            to_frames = torch.bmm(_weighted(messages, shares), arriving.transpose(1, 2))
        if any(ctx.needs_input_grad[1:3]):
            turned = torch.bmm(frames, arriving)
            to_messages = _weighted(turned, shares)
            to_shares = (turned * messages).unflatten(2, (shares.shape[1], -1)).sum((1, 3))
        return to_frames, to_messages, to_shares, None, None
