"""How fast are the CPU forms of the kernels beside what people use today?

python benchmarks/kernels_cpu.py [NAME ...] [--rounds 7] [--threads 1] writes benchmarks/results/kernels_cpu.json.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import Contestants, comparison, main
from torch import Tensor

from foveal.kernels import CSR, attention, segment_attention, segment_softmax, selective_scan


def forward_and_backward(operator: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    """A contestant that runs the operator and the gradients of its sum with fixed random weights."""
    weights = torch.randn_like(operator().detach())

    def call() -> None:
        torch.autograd.grad(operator(), leaves, weights)

    return call


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


@comparison("selective scan, B4 L1000 D256 N16, forward+backward", baseline="step by step in torch", promise=100.0, rounds=1)
def scan() -> Contestants:
    torch.manual_seed(0)
    u, delta, z = (torch.randn(4, 256, 1000, requires_grad=True) for _ in range(3))
    rate = (-torch.arange(1.0, 17.0).repeat(256, 1)).requires_grad_()
    b, c = (torch.randn(4, 16, 1000, requires_grad=True) for _ in range(2))
    skip, bias = (torch.randn(256, requires_grad=True) for _ in range(2))
    leaves = [u, delta, rate, b, c, skip, z, bias]

    def scanned(backend: str | None) -> Callable[[], None]:
        return forward_and_backward(lambda: selective_scan(*leaves, delta_softplus=True, backend=backend), leaves)

    return {"foveal": scanned(None), "torch form": scanned("torch"), "step by step in torch": scanned("reference")}


def scatter(src: Tensor, index: Tensor, nodes: int, reduce: str) -> Tensor:
    """What torch_geometric.utils.scatter does where torch_scatter is not installed."""
    place = index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    zeros = src.new_zeros(nodes, *src.shape[1:])
    return zeros.scatter_reduce_(0, place, src, "amax", include_self=False) if reduce == "max" else zeros.scatter_add_(0, place, src)


def scatter_softmax(src: Tensor, index: Tensor, nodes: int) -> Tensor:
    """The steps of torch_geometric.utils.softmax, in plain torch."""
    share = (src - scatter(src.detach(), index, nodes, "max").index_select(0, index)).exp()
    return share / (scatter(share, index, nodes, "sum") + 1e-16).index_select(0, index)


def scatter_attention(q: Tensor, k: Tensor, v: Tensor, edge_index: Tensor, bias: Tensor) -> Tensor:
    """The steps of torch_geometric's TransformerConv: gather, dot, softmax, weigh, scatter."""
    source, target = edge_index
    logits = (q.index_select(0, target) * k.index_select(0, source)).sum(-1) * q.shape[-1] ** -0.5 + bias
    messages = v.index_select(0, source) * scatter_softmax(logits, target, q.shape[0]).unsqueeze(-1)
    return scatter(messages, target, q.shape[0], "sum")


def graph(nodes: int, edges: int, heads: int, dim: int) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    tensors = [torch.randn(nodes, heads, dim, requires_grad=True) for _ in range(3)]
    return torch.randint(nodes, (2, edges)), [*tensors, torch.randn(edges, heads, requires_grad=True)]


@comparison("segment attention with edge bias, N5000 E100k H8 D16, forward", baseline="gather and scatter (PyG's steps)", promise=8.0)
def graph_attention() -> Contestants:
    edge_index, leaves = graph(5000, 100_000, 8, 16)
    q, k, v, bias = (tensor.detach() for tensor in leaves)
    edges = CSR.from_edge_index(edge_index, 5000)
    return {
        "foveal": lambda: segment_attention(q, k, v, edges, edge_bias=bias),
        "foveal, edges sorted in the call": lambda: segment_attention(q, k, v, edge_index, edge_bias=bias),
        "gather and scatter (PyG's steps)": lambda: scatter_attention(q, k, v, edge_index, bias),
    }


@comparison("segment attention with edge bias, N5000 E100k H8 D16, forward+backward", baseline="gather and scatter (PyG's steps)", promise=4.0)
def graph_attention_training() -> Contestants:
    edge_index, (q, k, v, bias) = graph(5000, 100_000, 8, 16)
    edges = CSR.from_edge_index(edge_index, 5000)
    leaves = [q, k, v, bias]
    return {
        "foveal": forward_and_backward(lambda: segment_attention(q, k, v, edges, edge_bias=bias), leaves),
        "gather and scatter (PyG's steps)": forward_and_backward(lambda: scatter_attention(q, k, v, edge_index, bias), leaves),
    }


@comparison("segment softmax, N5000 E100k H8, forward+backward", baseline="scatter (PyG's steps)")
def graph_softmax() -> Contestants:
    edge_index, (*_, logits) = graph(5000, 100_000, 8, 16)
    return {
        "foveal": forward_and_backward(lambda: segment_softmax(logits, edge_index[1], num_nodes=5000), [logits]),
        "scatter (PyG's steps)": forward_and_backward(lambda: scatter_softmax(logits, edge_index[1], 5000), [logits]),
    }


if __name__ == "__main__":
    main("kernels_cpu")
