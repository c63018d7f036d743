"""Three-way attention on a GPU beside its torch form, which makes the same tiles in separate launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, size
from foveal.kernels.kronecker.op import kronecker_attention

_BATCH, _HEADS, _LENGTH, _DIM = size(1, 1), size(8, 1), size(256, 6), size(64, 16)
#: Two products of every triple and channel forward, and five times that with the backward pass, which makes the logits three times more.
_FLOPS = 4.0 * _BATCH * _HEADS * _LENGTH**3 * _DIM


@comparison("three-way attention, bf16 B1 H8 N256 D64, forward+backward", baseline="torch form", devices=("cuda",), flops=5 * _FLOPS, rounds=3)
def cube() -> Contestants:
    torch.manual_seed(0)
    tensors = [torch.randn(_BATCH, _HEADS, _LENGTH, _DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(5)]

    def ours(backend: str | None) -> Callable[[], None]:
        return forward_and_backward(lambda: cast(Tensor, kronecker_attention(*tensors, backend=backend)), tensors)

    return {"foveal": ours(None), "torch form": ours("torch")}
