"""Parts of attention over disjoint sets of keys, put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def merge_attention(
    outs: Sequence[Float[Tensor, "*rows dim"]] | Float[Tensor, "parts *rows dim"],
    lses: Sequence[Float[Tensor, "*rows"]] | Float[Tensor, "parts *rows"],
) -> tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows"]]:
    r"""Attention over a union of disjoint sets of keys, from the attention over each.

    .. math:: \mathrm{lse} = \log \sum_p e^{\mathrm{lse}_p}, \quad o = \sum_p e^{\mathrm{lse}_p - \mathrm{lse}}\, o_p

    It is exact, in any order, as often as wanted: parts of a cache, of a ring of devices, a window and a few global tokens. Differentiable
    as often as wanted; a composition of torch's own operators.

    Args:
        outs: outputs of the parts, (..., dim) each; a sequence, or one tensor with the parts in front.
        lses: their log-sum-exps (natural logarithm), (...) each. -inf is a part without keys: its output is not read.

    Returns:
        Output in the dtype of `outs`, and log-sum-exp in float32 (float64 for float64). Rows without keys in any part give 0 and -inf.

    Raises:
        ValueError: no parts, or the shapes of outputs and log-sum-exps do not fit.

    References:
        Milakov, Gimelshein, Online normalizer calculation for softmax, 2018. Dao et al., Flash-Decoding, 2023.
    """
    counts = [len(parts) if not isinstance(parts, Tensor) or parts.dim() else 0 for parts in (outs, lses)]
    if counts[0] == 0 or counts[0] != counts[1]:
        raise ValueError(f"outs and lses must hold the same number of parts, at least one; got {counts[0]} and {counts[1]}")
    shapes = [(tuple(out.shape), tuple(lse.shape)) for out, lse in zip(outs, lses, strict=True)]
    if any(out[:-1] != lse or (out, lse) != shapes[0] for out, lse in shapes):
        raise ValueError(f"each part must be an output (..., dim) and a log-sum-exp (...), all of one shape; got {shapes}")
    parts = outs if isinstance(outs, Tensor) else torch.stack(list(outs))
    sums = lses if isinstance(lses, Tensor) else torch.stack(list(lses))
    sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
    top = sums.detach().amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(sums - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, float("-inf"))
    share = (weights / total).unsqueeze(-1)
    read = parts.to(sums.dtype).masked_fill(share == 0, 0.0)
    return (share * read).sum(0).to(parts.dtype), lse
