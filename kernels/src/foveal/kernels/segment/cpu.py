"""The C kernels of segment.c on torch tensors: checks nothing, allocates the results, converts half precision to float and back.

Where no compiled library is there, `why_not` says so and the definition in reference.py serves.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from foveal.kernels import native

_SOURCE = str(Path(__file__).with_name("segment.c"))
_MODES = {"sum": 0, "max": 1, "min": 2}
#: Multiplications below which waking a second thread costs more than it saves.
_WORTH_A_THREAD = 100_000

_INTEGERS = ("rows", "heads", "dim", "value_dim", "keys_on_edges", "values_on_edges")
_POINTERS = (
    *("indptr", "column", "permutation", "q", "k", "v", "bias", "envelope", "gate", "out", "weights", "lse", "grad_out", "grad_weights"),
    *("grad_q", "grad_k", "grad_v", "grad_logits", "grad_envelope", "grad_gate", "edge_weights"),
)


class Problem(ctypes.Structure):
    """Arguments of the attention kernels, as segment.c declares them."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def why_not(*tensors: Tensor | None) -> str | None:
    """Reason why the C kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"it needs tensors on the CPU, these are on {tensor.device.type}"
    return _why_no_library()


@torch.compiler.assume_constant_result
def _why_no_library() -> str | None:
    return None if native.load(_SOURCE) is not None else native.explain(_SOURCE)


def _function(name: str) -> ctypes._NamedFuncPointer:
    library = native.load(_SOURCE)
    if library is None:
        raise RuntimeError(f"segment.c has no compiled library: {native.explain(_SOURCE)}")
    return library[name]


def _named(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    return _function(f"{name}_{'double' if dtype == torch.float64 else 'float'}")


def _wide(tensor: Tensor | None) -> Tensor | None:
    """In float or double, contiguous."""
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _integer(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _threads(work: int) -> ctypes.c_int:
    return ctypes.c_int(max(1, min(torch.get_num_threads(), work // _WORTH_A_THREAD)))


def _run_attention(
    name: str, dtype: torch.dtype, edges: int, scale: float, eps: float, sizes: dict[str, int], tensors: dict[str, Tensor | None]
) -> None:
    problem = Problem(**sizes, scale=scale, eps=eps, **{key: _address(tensor) for key, tensor in tensors.items()})
    work = edges * sizes["heads"] * (sizes["dim"] + sizes["value_dim"])
    if _named(name, dtype)(ctypes.byref(problem), _threads(work)):
        raise MemoryError(f"{name}: no memory for the logits of {sizes['heads']} heads")


def order(index: Tensor, size: int) -> tuple[Tensor, Tensor, bool]:
    """Row pointer and stable permutation of `index` by value, and whether every value is in range."""
    index = index.contiguous()
    indptr, permutation = index.new_empty(size + 1), torch.empty_like(index)
    sort = _function("segment_order")
    sort.restype = ctypes.c_int64
    bad = sort(_address(index), _integer(index.shape[0]), _integer(size), _address(indptr), _address(permutation))
    return indptr, permutation, bad < 0


def attention_forward(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    envelope: Tensor | None,
    gate: Tensor | None,
    indptr: Tensor,
    column: Tensor,
    permutation: Tensor,
    scale: float,
    eps: float,
    keys_on_edges: bool,
    values_on_edges: bool,
    return_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (nodes, heads, value_dim) in float or double, weights (edges, heads) or nothing, log-sum-exp (nodes, heads)."""
    rows, edges, heads, value_dim = indptr.shape[0] - 1, column.shape[0], v.shape[1], v.shape[2]
    values = _wide(v)
    assert values is not None
    out = values.new_empty(rows, heads, value_dim)
    lse = values.new_empty(rows, heads)
    weights = values.new_empty(edges if return_weights else 0, heads)
    sizes = {"rows": rows, "heads": heads, "dim": 0 if q is None else q.shape[2], "value_dim": value_dim}
    sizes |= {"keys_on_edges": int(keys_on_edges), "values_on_edges": int(values_on_edges)}
    tensors = {"q": _wide(q), "k": _wide(k), "v": values, "bias": _wide(bias), "envelope": _wide(envelope), "gate": _wide(gate)}
    tensors |= {
        "indptr": indptr,
        "column": column,
        "permutation": permutation,
        "out": out,
        "lse": lse,
        "weights": weights if return_weights else None,
    }
    _run_attention("segment_attention_forward", values.dtype, edges, scale, eps, sizes, tensors)
    return out, weights, lse


def attention_backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    envelope: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    weights: Tensor,
    lse: Tensor,
    indptr: Tensor,
    column: Tensor,
    permutation: Tensor,
    by_source: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
    eps: float,
    keys_on_edges: bool,
    values_on_edges: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of q, k, v, bias, envelope, gate; those not in `needs` have no elements."""
    rows, edges, heads, value_dim = indptr.shape[0] - 1, column.shape[0], v.shape[1], v.shape[2]
    need_q, need_k, need_v, need_bias, need_envelope, need_gate = needs
    inputs = {"q": _wide(q), "k": _wide(k), "v": _wide(v), "bias": _wide(bias), "envelope": _wide(envelope), "gate": _wide(gate)}
    outputs = {"out": _wide(out), "weights": weights, "lse": lse, "grad_out": _wide(grad_out), "grad_weights": _wide(grad_weights)}
    grads: dict[str, Tensor | None] = {
        "grad_q": lse.new_empty(q.shape) if q is not None and need_q else None,
        "grad_k": lse.new_empty(k.shape) if k is not None and need_k and keys_on_edges else None,
        "grad_v": lse.new_empty(v.shape) if need_v and values_on_edges else None,
        "grad_logits": lse.new_empty(edges, heads) if need_bias or (need_k and not keys_on_edges) else None,
        "grad_envelope": lse.new_empty(edges, heads) if need_envelope else None,
        "grad_gate": lse.new_empty(edges, heads) if need_gate else None,
        "edge_weights": lse.new_empty(edges, heads) if need_v and not values_on_edges else None,
    }
    sizes = {"rows": rows, "heads": heads, "dim": 0 if q is None else q.shape[2], "value_dim": value_dim}
    sizes |= {"keys_on_edges": int(keys_on_edges), "values_on_edges": int(values_on_edges)}
    graph = {"indptr": indptr, "column": column, "permutation": permutation}
    _run_attention("segment_attention_backward", lse.dtype, edges, scale, eps, sizes, {**graph, **inputs, **outputs, **grads})
    if grads["grad_k"] is None and need_k and inputs["q"] is not None and by_source is not None:
        assert grads["grad_logits"] is not None
        grads["grad_k"] = weighted_sum(grads["grad_logits"], inputs["q"], *by_source, scale)
    if grads["grad_v"] is None and need_v and by_source is not None:
        assert grads["edge_weights"] is not None
        assert outputs["grad_out"] is not None
        grads["grad_v"] = weighted_sum(grads["edge_weights"], outputs["grad_out"], *by_source, 1.0)
    wanted = [
        grads["grad_q"],
        grads["grad_k"],
        grads["grad_v"],
        grads["grad_logits"] if need_bias else None,
        grads["grad_envelope"],
        grads["grad_gate"],
    ]
    like = (q, k, v, bias, envelope, gate)
    return [lse.new_empty(0) if g is None or x is None else g.to(x.dtype) for g, x in zip(wanted, like, strict=True)]


def weighted_sum(weight: Tensor, x: Tensor, indptr: Tensor, column: Tensor, permutation: Tensor, factor: float) -> Tensor:
    """``out[i] = factor * sum_e weight[e] x[column(e)]`` per head."""
    weight_, x_ = _wide(weight), _wide(x)
    assert weight_ is not None
    assert x_ is not None
    rows, (heads, dim) = indptr.shape[0] - 1, x.shape[1:]
    out = x_.new_empty(rows, heads, dim)
    _named("segment_weighted_sum", x_.dtype)(
        *(_integer(rows), _integer(heads), _integer(dim), ctypes.c_double(factor)),
        *(_address(tensor) for tensor in (indptr, column, permutation, weight_, x_, out)),
        _threads(column.shape[0] * heads * dim),
    )
    return out.to(x.dtype)


def edge_dot(a: Tensor, b: Tensor, indptr: Tensor, column: Tensor, permutation: Tensor) -> Tensor:
    """``out[e] = a[target(e)] . b[column(e)]`` per head."""
    a_, b_ = _wide(a), _wide(b)
    assert a_ is not None
    assert b_ is not None
    rows, heads, dim = a.shape
    out = a_.new_empty(column.shape[0], heads)
    _named("segment_edge_dot", a_.dtype)(
        *(_integer(rows), _integer(heads), _integer(dim)),
        *(_address(tensor) for tensor in (indptr, column, permutation, a_, b_, out)),
        _threads(column.shape[0] * heads * dim),
    )
    return out


def reduce(src: Tensor, indptr: Tensor, permutation: Tensor | None, how: str) -> Tensor:
    """Sum, max or min of (edges, width) over rows."""
    x = _wide(src)
    assert x is not None
    rows, width = indptr.shape[0] - 1, src.shape[1]
    out = x.new_empty(rows, width)
    addresses = (_address(tensor) for tensor in (indptr, permutation, x, out))
    _named("segment_reduce", x.dtype)(_integer(rows), _integer(width), ctypes.c_int(_MODES[how]), *addresses, _threads(src.numel()))
    return out.to(src.dtype)


def gather(x: Tensor, indptr: Tensor, permutation: Tensor | None, edges: int) -> Tensor:
    """``out[e] = x[target(e)]`` for x of (nodes, width)."""
    x_ = _wide(x)
    assert x_ is not None
    out = x_.new_empty(edges, x.shape[1])
    addresses = (_address(tensor) for tensor in (indptr, permutation, x_, out))
    _named("segment_gather", x_.dtype)(_integer(x.shape[0]), _integer(x.shape[1]), *addresses, _threads(out.numel()))
    return out.to(x.dtype)


def softmax(src: Tensor, indptr: Tensor, permutation: Tensor | None) -> Tensor:
    """Softmax of (edges, width) over rows."""
    x = _wide(src)
    assert x is not None
    out = torch.empty_like(x)
    addresses = (_address(tensor) for tensor in (indptr, permutation, x, out))
    if _named("segment_softmax", x.dtype)(_integer(indptr.shape[0] - 1), _integer(x.shape[1]), *addresses, _threads(4 * x.numel())):
        raise MemoryError(f"segment_softmax: no memory for rows of {x.shape[1]} values")
    return out.to(src.dtype)
