"""Linear attention on a GPU at long sequences, beside flash-linear-attention where it is installed, and beside softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, peer, size
from foveal.kernels.linear.op import linear_attention

_BATCH, _HEADS, _LENGTH, _DIM = size(4, 1), size(16, 1), size(8192, 70), size(128, 16)
#: Bytes of q, k, v and the output in bfloat16.
_TRAFFIC = 4.0 * 2 * _BATCH * _HEADS * _LENGTH * _DIM


def contestants(backward: bool) -> Contestants:
    torch.manual_seed(0)
    q, k, v = (torch.randn(_BATCH, _HEADS, _LENGTH, _DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    decay = (-0.1 * torch.rand(_BATCH, _HEADS, _LENGTH)).requires_grad_()
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "foveal": (lambda: cast(Tensor, linear_attention(q, k, v, decay=decay)), [q, k, v, decay]),
        "sdpa, causal": (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]),
    }
    fla = peer("fla.ops.simple_gla") if q.is_cuda else None
    if fla is not None:
        turned = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v, decay)]
        calls["fla"] = (lambda: fla.chunk_simple_gla(*turned[:3], g=turned[3])[0], turned)
    if backward:
        return {name: forward_and_backward(call, leaves) for name, (call, leaves) in calls.items()}
    return {name: torch.no_grad()(call) for name, (call, _) in calls.items()}


@comparison("linear attention, bf16 decay per token, B4 H16 N8192 D128, forward", baseline="sdpa, causal", devices=("cuda",), traffic=_TRAFFIC)
def inference() -> Contestants:
    return contestants(backward=False)


@comparison(
    "linear attention, bf16 decay per token, B4 H16 N8192 D128, forward+backward", baseline="sdpa, causal", devices=("cuda",), traffic=3 * _TRAFFIC
)
def training() -> Contestants:
    return contestants(backward=True)
