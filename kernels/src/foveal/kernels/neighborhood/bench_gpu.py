"""Neighbourhood attention on a GPU beside natten where it is installed, windows gathered into memory, and dense attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, peer, size
from foveal.kernels.neighborhood.bench import gathered
from foveal.kernels.neighborhood.op import neighborhood_attention_1d, neighborhood_attention_2d


def qkv(*shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def turned(leaves: list[Tensor]) -> list[Tensor]:
    """As natten takes them: heads last but one."""
    return [t.detach().movedim(1, -2).contiguous().requires_grad_() for t in leaves]


@comparison("neighborhood attention, bf16 7x7 on 56x56, B32 H4 D32, forward+backward", baseline="windows gathered", devices=("cuda",))
def image() -> Contestants:
    side = size(56, 9)
    q, k, v = leaves = qkv(size(32, 1), size(4, 1), side, side, 32)
    found = {
        "foveal": forward_and_backward(lambda: neighborhood_attention_2d(q, k, v, 7), leaves),
        "windows gathered": forward_and_backward(lambda: gathered(q, k, v, 7), leaves),
    }
    natten = peer("natten") if q.is_cuda else None
    if natten is not None:
        theirs = turned(leaves)
        found["natten"] = forward_and_backward(lambda: natten.na2d(*theirs, kernel_size=7), theirs)
    return found


@comparison("neighborhood attention, bf16 of 2049 on 32768, B1 H16 D64, forward+backward", baseline="sdpa, dense", devices=("cuda",), rounds=3)
def sequence() -> Contestants:
    length, kernel = size(32_768, 90), size(2049, 33)
    q, k, v = leaves = qkv(1, size(16, 1), length, 64)
    found = {
        "foveal": forward_and_backward(lambda: neighborhood_attention_1d(q, k, v, kernel), leaves),
        "sdpa, dense": forward_and_backward(lambda: F.scaled_dot_product_attention(q, k, v), leaves),
    }
    natten = peer("natten") if q.is_cuda else None
    if natten is not None:
        theirs = turned(leaves)
        found["natten"] = forward_and_backward(lambda: natten.na1d(*theirs, kernel_size=kernel), theirs)
    return found
