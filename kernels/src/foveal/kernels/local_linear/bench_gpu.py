"""Local linear attention on a GPU beside its torch form, which walks the same conjugate gradients in separate launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, size
from foveal.kernels.local_linear.op import local_linear_attention


@comparison("local linear attention, bf16 causal B4 H8 N1024 D64, forward+backward", baseline="torch form", devices=("cuda",), rounds=3)
def sequence() -> Contestants:
    torch.manual_seed(0)
    shape = (size(4, 1), size(8, 1), size(1024, 20), size(64, 16))
    q, k, v = leaves = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def ours(backend: str | None) -> Callable[[], None]:
        return forward_and_backward(lambda: local_linear_attention(q, k, v, ridge=1.0, backend=backend), leaves)

    return {"foveal": ours(None), "torch form": ours("torch")}
