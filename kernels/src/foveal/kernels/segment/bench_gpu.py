"""Graph attention on a GPU at the sizes of large graphs, beside torch_geometric where it is installed, and beside its steps."""

from __future__ import annotations

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, peer, size
from foveal.kernels.segment import CSR, segment_attention, segment_softmax
from foveal.kernels.segment.bench import graph, scatter_attention, scatter_softmax

_NODES, _EDGES, _HEADS = size(50_000, 20), size(1_000_000, 60), size(8, 2)
#: Bytes of a key and a value for every edge, of q and the output for every node, and of the bias: the least that an unfused walk reads.
_TRAFFIC = 4.0 * _HEADS * (_EDGES * (2 * 16 + 1) + 2 * _NODES * 16)


@comparison(
    "segment attention with edge bias, N50k E1M H8 D16, forward", baseline="gather and scatter (PyG's steps)", devices=("cuda",), traffic=_TRAFFIC
)
def inference() -> Contestants:
    edge_index, leaves = graph(_NODES, _EDGES, _HEADS, 16)
    q, k, v, bias = (tensor.detach() for tensor in leaves)
    edges = CSR.from_edge_index(edge_index, _NODES)
    return {
        "foveal": lambda: segment_attention(q, k, v, edges, edge_bias=bias),
        "gather and scatter (PyG's steps)": lambda: scatter_attention(q, k, v, edge_index, bias),
    }


@comparison("segment attention with edge bias, N50k E1M H8 D16, forward+backward", baseline="gather and scatter (PyG's steps)", devices=("cuda",))
def training() -> Contestants:
    edge_index, leaves = graph(_NODES, _EDGES, _HEADS, 16)
    q, k, v, bias = leaves
    edges = CSR.from_edge_index(edge_index, _NODES)
    return {
        "foveal": forward_and_backward(lambda: segment_attention(q, k, v, edges, edge_bias=bias), leaves),
        "gather and scatter (PyG's steps)": forward_and_backward(lambda: scatter_attention(q, k, v, edge_index, bias), leaves),
    }


@comparison("segment softmax, N50k E1M H8, forward+backward", baseline="scatter (PyG's steps)", devices=("cuda",))
def softmax() -> Contestants:
    edge_index, (*_, logits) = graph(_NODES, _EDGES, _HEADS, 16)
    target = edge_index[1]
    found = {
        "foveal": forward_and_backward(lambda: segment_softmax(logits, target, num_nodes=_NODES), [logits]),
        "scatter (PyG's steps)": forward_and_backward(lambda: scatter_softmax(logits, target, _NODES), [logits]),
    }
    pyg = peer("torch_geometric.utils") if logits.is_cuda else None
    if pyg is not None:
        found["torch_geometric"] = forward_and_backward(lambda: pyg.softmax(logits, target, num_nodes=_NODES), [logits])
    return found
