"""Decoding on a GPU from a long cache, beside torch's SDPA and xformers where it is installed: what counts is how fast the cache is read."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foveal.kernels.bench import Contestants, comparison, size
from foveal.kernels.decode.op import decode_attention

_BATCH, _KV_HEADS, _LENGTH, _DIM = size(4, 1), size(8, 1), size(65_536, 70), size(128, 16)
#: Bytes of the keys and values in bfloat16.
_TRAFFIC = 2.0 * 2 * _BATCH * _KV_HEADS * _LENGTH * _DIM


@comparison("decoding one token, bf16 32 heads on 8 key heads, B4 N65536 D128", baseline="sdpa enable_gqa", devices=("cuda",), traffic=_TRAFFIC)
def long_cache() -> Contestants:
    torch.manual_seed(0)
    q = torch.randn(_BATCH, 4 * _KV_HEADS, 1, _DIM, dtype=torch.bfloat16)
    k, v = (torch.randn(_BATCH, _KV_HEADS, _LENGTH, _DIM, dtype=torch.bfloat16) for _ in range(2))
    return {
        "foveal": lambda: decode_attention(q, k, v),
        "sdpa enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "sdpa on repeated keys": lambda: F.scaled_dot_product_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)),
    }
