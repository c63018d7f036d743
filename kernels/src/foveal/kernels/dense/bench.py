"""Attention beside what people use today: torch's SDPA, its mask and bias paths, and the plain composition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward
from foveal.kernels.dense.op import attention, attention_varlen
from foveal.kernels.dense.relative import RelativeBias


def qkv(batch: int, heads: int, length: int, dim: int, kv_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, heads, length, dim, requires_grad=True)
    k, v = (torch.randn(batch, kv_heads or heads, length, dim, requires_grad=True) for _ in range(2))
    return q, k, v


@comparison("attention, bias with gradient, B8 H8 N1024 D64, forward+backward", baseline="sdpa (math path)", promise=1.0)
def biased_attention() -> Contestants:
    q, k, v = qkv(8, 8, 1024, 64)
    bias = torch.randn(1, 8, 1024, 1024, requires_grad=True)
    leaves = [q, k, v, bias]
    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, bias=bias), leaves),
        "sdpa (math path)": forward_and_backward(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias), leaves),
    }


@comparison("attention, window of 64 each side, B4 H8 N1024 D64, forward+backward", baseline="sdpa with a dense mask", promise=2.0)
def windowed_attention() -> Contestants:
    q, k, v = qkv(4, 8, 1024, 64)
    place = torch.arange(1024)
    mask = (place[:, None] - place[None, :]).abs() <= 64
    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, window=(64, 64)), [q, k, v]),
        "sdpa with a dense mask": forward_and_backward(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), [q, k, v]),
    }


@comparison("attention, 8 heads on 2 key heads, B4 N1024 D64, forward+backward", baseline="sdpa on repeated keys")
def grouped_attention() -> Contestants:
    q, k, v = qkv(4, 8, 1024, 64, kv_heads=2)

    def repeated() -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1))

    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v), [q, k, v]),
        "sdpa on repeated keys": forward_and_backward(repeated, [q, k, v]),
        "sdpa enable_gqa": forward_and_backward(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), [q, k, v]),
    }


@comparison("attention, windows of 49 with bias gradient, B1024 H4 D32, forward+backward", baseline="matmul, softmax, matmul")
def short_attention() -> Contestants:
    q, k, v = qkv(1024, 4, 49, 32)
    bias = torch.randn(1, 4, 49, 49, requires_grad=True)
    leaves = [q, k, v, bias]
    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, bias=bias), leaves),
        "matmul, softmax, matmul": forward_and_backward(lambda: torch.softmax(q @ k.mT * 32**-0.5 + bias, -1) @ v, leaves),
        "sdpa (math path)": forward_and_backward(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias), leaves),
    }


@comparison("attention_varlen, 16 sequences of 4502 tokens, H8 D64, forward", baseline="sdpa on nested tensors", promise=5.0)
def sequences_of_different_lengths() -> Contestants:
    lengths = [481, 402, 390, 377, 361, 340, 322, 300, 287, 270, 251, 230, 201, 160, 90, 40]
    torch.manual_seed(0)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), 8, 64) for _ in range(3))
    nested_q, nested_k, nested_v = (torch.nested.nested_tensor_from_jagged(t, cu.long()).transpose(1, 2) for t in (q, k, v))
    padded_q, padded_k, padded_v = (torch.nn.utils.rnn.pad_sequence(list(t.split(lengths)), batch_first=True).transpose(1, 2) for t in (q, k, v))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def one_by_one() -> Tensor:
        """Each sequence alone, the results joined again: what every other contestant returns."""
        apart = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in parts))[0].transpose(0, 1) for parts in apart])

    return {
        "foveal": lambda: attention_varlen(q, k, v, cu, cu, max(lengths), max(lengths)),
        "sdpa on nested tensors": lambda: F.scaled_dot_product_attention(nested_q, nested_k, nested_v),
        "sdpa on padded tensors": lambda: F.scaled_dot_product_attention(padded_q, padded_k, padded_v, attn_mask=mask[:, None, None]),
        "a loop of sdpa": one_by_one,
    }


@comparison("attention, sigmoid score, B4 H8 N1024 D64, forward+backward", baseline="eager")
def sigmoid_attention() -> Contestants:
    q, k, v = qkv(4, 8, 1024, 64)
    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, score="sigmoid", score_bias=-7.0), [q, k, v]),
        "eager": forward_and_backward(lambda: torch.sigmoid(q @ k.mT * 64**-0.5 - 7.0) @ v, [q, k, v]),
    }


@comparison("attention, gate a channel, B4 H8 N1024 D64, forward+backward", baseline="sdpa, then the gate")
def gated_attention() -> Contestants:
    q, k, v = qkv(4, 8, 1024, 64)
    gate = torch.randn(4, 8, 1024, 64, requires_grad=True)
    leaves = [q, k, v, gate]
    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, gate=gate), leaves),
        "sdpa, then the gate": forward_and_backward(lambda: F.scaled_dot_product_attention(q, k, v) * torch.sigmoid(gate), leaves),
    }


@comparison("attention, table of 257 distances with gradient, B4 H8 N1024 D64, forward+backward", baseline="sdpa on the gathered bias")
def table_attention() -> Contestants:
    q, k, v = qkv(4, 8, 1024, 64)
    table = torch.randn(8, 257, requires_grad=True)
    place = torch.arange(1024)
    index = (place[None, :] - place[:, None]).clamp(-128, 128) + 128
    leaves = [q, k, v, table]
    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, rel_bias=RelativeBias.clipped(table)), leaves),
        "sdpa on the gathered bias": forward_and_backward(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=table[:, index]), leaves),
    }


@comparison("attention, Swin windows of 7x7 with table gradient, B1024 H4 D32, forward+backward", baseline="gathered bias, matmul, softmax, matmul")
def swin_windows() -> Contestants:
    q, k, v = qkv(1024, 4, 49, 32)
    table = torch.randn(4, 13, 13, requires_grad=True)
    row, column = torch.arange(49) // 7, torch.arange(49) % 7
    index = (row[:, None] - row[None, :] + 6) * 13 + column[:, None] - column[None, :] + 6
    leaves = [q, k, v, table]

    def gathered() -> Tensor:
        bias = table.flatten(1)[:, index.flatten()].view(4, 49, 49)
        return torch.softmax(q @ k.mT * 32**-0.5 + bias, -1) @ v

    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, rel_bias=RelativeBias.grid(table, 7, 7)), leaves),
        "gathered bias, matmul, softmax, matmul": forward_and_backward(gathered, leaves),
    }


@comparison("attention, dropout 0.1, B2 H8 N512 D64, forward+backward", baseline="eager")
def dropped_attention() -> Contestants:
    q, k, v = qkv(2, 8, 512, 64)

    def eager() -> Tensor:
        return F.dropout(torch.softmax(q @ k.mT * 64**-0.5, -1), 0.1) @ v

    return {
        "foveal": forward_and_backward(lambda: attention(q, k, v, dropout_p=0.1), [q, k, v]),
        "eager": forward_and_backward(eager, [q, k, v]),
    }
