"""Block-sparse attention on a GPU beside FlexAttention with the same blocks, and beside dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, size
from foveal.kernels.block_sparse.op import BlockIndex, block_sparse_attention


@comparison("block-sparse attention, bf16 an eighth of the tiles, B1 H16 N16384 D128, forward+backward", baseline="sdpa, dense", devices=("cuda",))
def top_blocks() -> Contestants:
    torch.manual_seed(0)
    heads, length, dim = size(16, 1), size(16_384, 256), size(128, 16)
    tiles = length // 64
    q, k, v = (torch.randn(1, heads, length, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    index = BlockIndex.from_topk(torch.rand(1, heads, tiles, tiles), max(1, tiles // 8), length, length)
    calls: dict[str, Callable[[], Tensor]] = {
        "foveal": lambda: block_sparse_attention(q, k, v, index),
        "sdpa, dense": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    if q.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        listed = index.to_mask()[..., ::64, ::64].expand(1, heads, tiles, tiles).contiguous()
        blocks = create_block_mask(lambda b, h, i, j: listed[b, h, i // 64, j // 64], 1, heads, length, length, device=str(q.device))
        calls["FlexAttention"] = lambda: cast(Tensor, compiled(q, k, v, block_mask=blocks))
    return {name: forward_and_backward(call, [q, k, v]) for name, call in calls.items()}
