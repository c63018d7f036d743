"""The gated delta rule and Titans on a GPU at long sequences, beside flash-linear-attention where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, peer, size
from foveal.kernels.delta.op import gated_delta_rule, titans


def inputs(rates: int, dim: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k (of norm 1) and v in bfloat16, and rates from 0 to 1."""
    torch.manual_seed(0)
    shape = (size(4, 1), size(16, 1), size(4096, 33), size(dim, 16))
    q, k, v = (torch.randn(shape) for _ in range(3))
    signals = [t.bfloat16().requires_grad_() for t in (q, F.normalize(k, dim=-1), v)]
    return signals, [torch.rand(shape[:3]).requires_grad_() for _ in range(rates)]


@comparison("gated delta rule, bf16 B4 H16 N4096 D128, forward+backward", baseline="torch form", devices=("cuda",))
def gated() -> Contestants:
    (q, k, v), (beta, keep) = inputs(2, 128)
    g = (-0.1 * keep.detach()).requires_grad_()
    leaves = [q, k, v, beta, g]

    def ours(backend: str | None) -> Callable[[], None]:
        return forward_and_backward(lambda: cast(Tensor, gated_delta_rule(q, k, v, beta, g, backend=backend)), leaves)

    found = {"foveal": ours(None), "torch form": ours("torch")}
    fla = peer("fla.ops.gated_delta_rule") if q.is_cuda else None
    if fla is not None:
        turned = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in leaves]
        found["fla"] = forward_and_backward(lambda: fla.chunk_gated_delta_rule(*turned[:3], g=turned[4], beta=turned[3])[0], turned)
    return found


@comparison("Titans, bf16 B4 H16 N4096 D64, forward+backward", baseline="torch form", devices=("cuda",))
def momentum() -> Contestants:
    signals, rates = inputs(3, 64)
    leaves = [*signals, *rates]

    def ours(backend: str | None) -> Callable[[], None]:
        return forward_and_backward(lambda: cast(Tensor, titans(*leaves, backend=backend)), leaves)

    return {"foveal": ours(None), "torch form": ours("torch")}
