"""Attention on a GPU beside SDPA, FlexAttention, xformers and flash-attn, at the sizes of the FlashAttention papers: 16k tokens, bfloat16.

heads x dim is 2048, batch x length 16384. Operations counted as there: 4 length^2 dim a head forward, 3.5 times that with the backward pass.
Beside these the shapes that models of this project and their like send: windows, image patches, areas, frames of audio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, peer, size
from foveal.kernels.dense.op import attention
from foveal.kernels.dense.relative import RelativeBias

_TOKENS, _WIDTH = size(16_384, 64), size(2048, 32)


def tensors(length: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    dim, length = min(dim, _WIDTH), min(length, _TOKENS)
    return qkv(_TOKENS // length, _WIDTH // dim, length, dim)


def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    return q, k, v


def flex() -> Callable[..., Any] | None:
    """FlexAttention, compiled; None on a CPU, where it has no backward pass."""
    if torch.get_default_device().type != "cuda":
        return None
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def trained(calls: dict[str, Callable[[], Tensor] | None], leaves: list[Tensor]) -> Contestants:
    """Forward and backward of those contestants that are there."""
    return {name: forward_and_backward(call, leaves) for name, call in calls.items() if call is not None}


def others(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Plain attention of those peers that are installed; they take (batch, length, heads, dim)."""
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    found: dict[str, Callable[[], Tensor]] = {}
    xformers, flash = peer("xformers.ops"), peer("flash_attn")
    if xformers is not None:
        found["xformers"] = lambda: xformers.memory_efficient_attention(*turned)
    if flash is not None:
        found["flash-attn"] = lambda: flash.flash_attn_func(*turned)
    return found


def plain(dim: int, backward: bool) -> Contestants:
    q, k, v = tensors(4096, dim)
    compiled = flex()
    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "FlexAttention": None if compiled is None else lambda: compiled(q, k, v),
        **others(q, k, v),
    }
    if backward:
        return trained(calls, [q, k, v])
    return {name: torch.no_grad()(call) for name, call in calls.items() if call is not None}


_FLOPS = 4.0 * _TOKENS * size(4096, 64) * _WIDTH


@comparison("attention, bf16 N4096 D64, forward", baseline="sdpa", devices=("cuda",), flops=_FLOPS)
def forward_of_64() -> Contestants:
    return plain(64, backward=False)


@comparison("attention, bf16 N4096 D128, forward", baseline="sdpa", devices=("cuda",), flops=_FLOPS)
def forward_of_128() -> Contestants:
    return plain(128, backward=False)


@comparison("attention, bf16 N4096 D64, forward+backward", baseline="sdpa", devices=("cuda",), flops=3.5 * _FLOPS)
def training_of_64() -> Contestants:
    return plain(64, backward=True)


@comparison("attention, bf16 N4096 D128, forward+backward", baseline="sdpa", devices=("cuda",), flops=3.5 * _FLOPS)
def training_of_128() -> Contestants:
    return plain(128, backward=True)


@comparison("attention, bf16 N1024 D64 with a bias and its gradient, forward+backward", baseline="sdpa (math path)", devices=("cuda",))
def biased() -> Contestants:
    q, k, v = tensors(1024, 64)
    bias = torch.randn(q.shape[1], q.shape[2], q.shape[2], requires_grad=True)
    compiled = flex()

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v, bias=bias),
        "FlexAttention": None if compiled is None else lambda: compiled(q, k, v, score_mod=add),
        "sdpa (math path)": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)),
    }
    return trained(calls, [q, k, v, bias])


@comparison("attention, bf16 N4096 D64 in a window of 256 each side, forward+backward", baseline="sdpa, dense", devices=("cuda",))
def windowed() -> Contestants:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = tensors(4096, 64)
    length = q.shape[2]
    compiled = flex()
    blocks = None
    if compiled is not None:
        blocks = create_block_mask(lambda batch, head, query, key: (query - key).abs() <= 256, None, None, length, length, device=str(q.device))
    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v, window=(256, 256)),
        "FlexAttention": None if compiled is None else lambda: compiled(q, k, v, block_mask=blocks),
        "sdpa, dense": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    return trained(calls, [q, k, v])


@comparison("attention, bf16 N16384 D128 causal, forward+backward", baseline="sdpa", devices=("cuda",), flops=7.0 * _TOKENS * _TOKENS * _WIDTH)
def long_causal() -> Contestants:
    q, k, v = tensors(16_384, 128)
    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v, causal=True),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    return trained(calls, [q, k, v])


@comparison("attention, bf16 sigmoid score N1024 D64, forward+backward", baseline="eager", devices=("cuda",))
def sigmoid() -> Contestants:
    q, k, v = tensors(1024, 64)
    scale = q.shape[3] ** -0.5
    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v, score="sigmoid", score_bias=-7.0),
        "eager": lambda: torch.sigmoid(q @ k.mT * scale - 7.0) @ v,
    }
    return trained(calls, [q, k, v])


@comparison("attention, bf16 gate a channel N4096 D64, forward+backward", baseline="sdpa, then the gate", devices=("cuda",))
def gated() -> Contestants:
    q, k, v = tensors(4096, 64)
    gate = torch.randn_like(q, requires_grad=True)
    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v, gate=gate),
        "sdpa, then the gate": lambda: F.scaled_dot_product_attention(q, k, v) * torch.sigmoid(gate),
    }
    return trained(calls, [q, k, v, gate])


@comparison(
    "attention, bf16 Swin windows of 7x7 with table gradient, B4096 H4 D32, forward+backward", baseline="sdpa on the gathered bias", devices=("cuda",)
)
def swin() -> Contestants:
    q, k, v = qkv(size(4096, 2), 4, 49, 32)
    table = torch.randn(4, 13, 13, requires_grad=True)
    row, column = torch.arange(49) // 7, torch.arange(49) % 7
    index = (row[:, None] - row[None, :] + 6) * 13 + column[:, None] - column[None, :] + 6

    def gathered() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=table.flatten(1)[:, index.flatten()].view(4, 49, 49).to(q.dtype))

    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v, rel_bias=RelativeBias.grid(table, 7, 7)),
        "sdpa on the gathered bias": gathered,
    }
    return trained(calls, [q, k, v, table])


def shaped(*shape: int) -> Contestants:
    q, k, v = qkv(*shape)
    calls: dict[str, Callable[[], Tensor] | None] = {
        "foveal": lambda: attention(q, k, v),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        **others(q, k, v),
    }
    return trained(calls, [q, k, v])


@comparison("attention, bf16 patches of an image, B64 H12 N577 D64, forward+backward", baseline="sdpa", devices=("cuda",))
def patches() -> Contestants:
    return shaped(size(64, 1), size(12, 1), size(577, 65), 64)


@comparison("attention, bf16 areas of a feature map, B256 H8 N400 D32, forward+backward", baseline="sdpa", devices=("cuda",))
def areas() -> Contestants:
    return shaped(size(256, 1), size(8, 1), size(400, 50), 32)


@comparison("attention, bf16 frames of audio, B1000 H4 N500 D16, forward+backward", baseline="sdpa", devices=("cuda",))
def frames() -> Contestants:
    return shaped(size(1000, 1), size(4, 1), size(500, 50), 16)
