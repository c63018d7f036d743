"""Rotary embedding on a GPU beside the composition that models carry: what counts is how often q and k are read."""

from __future__ import annotations

import torch

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, size
from foveal.kernels.positions.bench import turned_halves
from foveal.kernels.positions.op import rotary

_BATCH, _HEADS, _LENGTH, _DIM = size(4, 1), size(16, 2), size(4096, 20), size(128, 16)
#: Bytes of q and k in bfloat16, read and written.
_TRAFFIC = 2.0 * 2 * 2 * _BATCH * _HEADS * _LENGTH * _DIM


@comparison(
    "rotary, bf16 q and k, B4 H16 N4096 D128, forward+backward",
    baseline="turned halves (transformers' steps)",
    devices=("cuda",),
    traffic=2 * _TRAFFIC,
)
def rotation() -> Contestants:
    torch.manual_seed(0)
    q, k = leaves = [torch.randn(_BATCH, _HEADS, _LENGTH, _DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    angle = torch.outer(torch.arange(float(_LENGTH)), 10_000 ** (-torch.arange(0, _DIM, 2) / _DIM))
    cos, sin = (torch.cat((table, table), -1).to(q.dtype) for table in (angle.cos(), angle.sin()))
    return {
        "foveal": forward_and_backward(lambda: torch.cat(rotary(q, k)), leaves),
        "turned halves (transformers' steps)": forward_and_backward(lambda: torch.cat([turned_halves(x, cos, sin) for x in leaves]), leaves),
    }
