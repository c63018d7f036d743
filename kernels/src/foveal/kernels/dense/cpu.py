"""Attention on the CPU without a (query, key) array: which form runs a call, and what surrounds it.

Softmax in float32, plain or with a bias, is one call of C (`cpu_native`), sequences of different lengths included. What is left has three
forms: torch's flash kernels (`cpu_flash`) where they can serve, blocks of logits in the cache (`cpu_tiles`) where they cannot or where a
gradient is wanted that they lack, and for short sequences (up to 64) one batched product, which is a block of many heads: there the flash
kernel's set-up costs more than the product. Sequences of different lengths run one after another then, those of one length together.

Sink and gate are outside of all that: a sink is one more term of a row's sum, so it rescales the row's output; a gate scales it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from foveal.kernels.dense import cpu_flash, cpu_native, cpu_tiles
from foveal.kernels.dense.call import Call
from foveal.kernels.dense.reference import bounds_of_sequences, finite_above

if TYPE_CHECKING:
    from jaxtyping import Float

#: Longest sequence for which a batched matmul beats the flash kernel.
SHORT = 64
BLOCK = cpu_tiles.BLOCK
#: Optional inputs whose gradient torch's flash backward cannot give.
_BEYOND_FLASH = ("bias", "score_bias", "temperature", "alibi", "table")


def forward(call: Call, out: Float[Tensor, "batch heads query value_dim"], lse: Float[Tensor, "batch heads query"]) -> None:
    """Fill `out` and `lse`."""
    natively = cpu_native.serves(call)
    if call.cu_queries is not None and not natively:
        for bucket in _buckets(call):
            part = bucket.call(call)
            part_out, part_lse = bucket.queries_of(out), bucket.queries_of(lse)
            forward(part, part_out, part_lse)
            bucket.put_queries(out, part_out)
            bucket.put_queries(lse, part_lse)
        return
    call = _bounded(call)
    if natively:
        cpu_native.forward(call, out, lse)
    else:
        _in_torch(call, out, lse)
    if call.sinks is not None:
        total = torch.logaddexp(lse, call.sinks[..., None])
        out.mul_((lse - total).exp_()[..., None])
        lse.copy_(total)
    if call.gate is not None:
        out.mul_(call.gate.to(call.wide).sigmoid())


def _in_torch(call: Call, out: Tensor, lse: Tensor) -> None:
    empty = 0 in (*call.q.shape, *call.k.shape)
    if empty or call.left >= 0 or call.right >= 0:  # rows that see no key are in no block
        out.zero_()
    lse.fill_(float("-inf") if call.normalize == "sum" else cpu_tiles.log_divisor(call))
    if not empty:
        by_flash = _flash_serves(call) and max(call.q.shape[2], call.k.shape[2]) > SHORT
        (cpu_flash if by_flash else cpu_tiles).forward(call, out, lse)


def backward(
    call: Call,
    dout: Float[Tensor, "batch heads query value_dim"],
    dlse: Float[Tensor, "batch heads query"] | None,
    out: Float[Tensor, "batch heads query value_dim"],
    lse: Float[Tensor, "batch heads query"],
    gradients: dict[str, Tensor],
) -> None:
    """Fill `gradients`: of q, k and v, and of the optional inputs that it names."""
    natively = cpu_native.differentiates(call, gradients)
    if call.cu_queries is not None and not natively:
        _backward_by_bucket(call, dout, dlse, out, lse, gradients)
        return
    for name, gradient in gradients.items():
        if name not in ("q", "k", "v"):
            gradient.zero_()
    given, call = call, _bounded(call)
    empty = 0 in (*call.q.shape, *call.k.shape)
    by_flash = not natively and dlse is None and _flash_serves(call) and not any(name in gradients for name in _BEYOND_FLASH)
    by_flash = by_flash and max(call.q.shape[2], call.k.shape[2]) > SHORT
    delta = None
    if not by_flash or "sinks" in gradients:  # torch's flash backward makes its own
        delta = (dout.to(call.wide) * out.to(call.wide)).sum(-1)
        delta = delta if dlse is None else delta - dlse
    if "sinks" in gradients and call.sinks is not None and delta is not None:
        share = (call.sinks[..., None] - lse).exp_()
        gradients["sinks"].copy_(-(share * delta).sum(-1).sum_to_size(call.sinks.shape))
    if call.gate is not None:
        opening = call.gate.to(call.wide).sigmoid()
        if "gate" in gradients:
            # out is the gated one: dout * ungated * opening * (1 - opening) = dout * out * (1 - opening)
            moved = dout.to(call.wide) * out.to(call.wide)
            moved = moved.sum(-1, keepdim=True) if call.gate.shape[3] == 1 else moved
            gradients["gate"].copy_((moved * (1 - opening)).sum_to_size(call.gate.shape))
        dout = (dout * opening).to(call.q.dtype)
        if by_flash:
            out = (out / opening.clamp_min_(torch.finfo(call.wide).tiny)).to(call.q.dtype)
    if empty:
        for name in ("q", "k", "v"):
            gradients[name].zero_()
        return
    if natively and delta is not None:
        cpu_native.backward(call, dout, delta, lse, gradients)
    elif delta is None or by_flash:
        cpu_flash.backward(call, dout, out, lse, gradients)
    else:
        cpu_tiles.backward(call, dout, delta, lse, gradients)
    if "bias" in gradients and given.bias is not None and call.bias is not given.bias:
        gradients["bias"].masked_fill_(given.bias.isposinf(), 0.0)


def _bounded(call: Call) -> Call:
    """The bias without +inf; copied only where it holds one."""
    if call.bias is not None and call.bias.numel() and call.bias.amax() == float("inf"):
        return call.replace(bias=finite_above(call.bias))
    return call


def _flash_serves(call: Call) -> bool:
    folded = call.temperature is None or call.q.dtype == call.wide  # it divides q, which half precision would round again
    return call.score == "softmax" and not call.softcap and not call.dropout and folded


# --- sequences of different lengths --------------------------------------------------------------------------------------------------


class _Bucket(NamedTuple):
    """Sequences of one length of queries and one of keys: their rows, as a slice where there is one sequence, as indices where more."""

    members: int
    first: int
    queries: int
    keys: int
    query_rows: slice | Tensor
    key_rows: slice | Tensor

    def queries_of(self, tensor: Tensor) -> Tensor:
        """(1, heads, total, ...) cut to the bucket: (members, heads, query, ...); a view where the bucket is one sequence."""
        return self._of(tensor, self.query_rows, self.queries)

    def keys_of(self, tensor: Tensor) -> Tensor:
        """As `queries_of`, for keys."""
        return self._of(tensor, self.key_rows, self.keys)

    def _of(self, tensor: Tensor, rows: slice | Tensor, length: int) -> Tensor:
        if isinstance(rows, slice):
            return tensor[:, :, rows]
        return tensor[0].index_select(1, rows).unflatten(1, (self.members, length)).transpose(0, 1)

    def put_queries(self, target: Tensor, part: Tensor) -> None:
        """Write what `queries_of` gave, changed, back where it came from."""
        self._put(target, self.query_rows, part)

    def put_keys(self, target: Tensor, part: Tensor) -> None:
        """As `put_queries`, for keys."""
        self._put(target, self.key_rows, part)

    def _put(self, target: Tensor, rows: slice | Tensor, part: Tensor) -> None:
        if not isinstance(rows, slice):
            target[0].index_copy_(1, rows, part.transpose(0, 1).flatten(1, 2))

    def call(self, call: Call) -> Call:
        """The bucket's own call, a batch of its members."""
        changes = {"q": self.queries_of(call.q), "k": self.keys_of(call.k), "v": self.keys_of(call.v)}
        for name in ("temperature", "gate", "table"):
            tensor = getattr(call, name)
            if tensor is not None and tensor.shape[2] > 1:
                changes[name] = self.queries_of(tensor)
        if call.query_code is not None and call.key_code is not None:
            changes |= {"query_code": call.query_code[: self.queries] + (self.keys - self.queries), "key_code": call.key_code[: self.keys]}
        lengths = {"longest_query": self.queries, "longest_key": self.keys, "first_sequence": self.first}
        return call.replace(**changes, **lengths, cu_queries=None, cu_keys=None)


def _buckets(call: Call) -> Iterator[_Bucket]:
    by_length: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for index, (first, last, first_key, last_key) in enumerate(bounds_of_sequences(call)):
        alone = (index,) if call.dropout else ()  # its random numbers count sequences
        by_length.setdefault((last - first, last_key - first_key, *alone), []).append((index, first, first_key))
    for (queries, keys, *_), members in by_length.items():
        if queries == 0 and keys == 0:
            continue
        index, first, first_key = members[0]
        if len(members) == 1:
            yield _Bucket(1, index, queries, keys, slice(first, first + queries), slice(first_key, first_key + keys))
            continue
        starts = torch.tensor([(first, first_key) for _, first, first_key in members])
        rows = [(start[:, None] + torch.arange(length)).flatten() for start, length in zip(starts.unbind(1), (queries, keys), strict=True)]
        yield _Bucket(len(members), index, queries, keys, rows[0], rows[1])


def _backward_by_bucket(call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, gradients: dict[str, Tensor]) -> None:
    for gradient in gradients.values():
        gradient.zero_()
    for bucket in _buckets(call):
        part = bucket.call(call)
        dlse_part = None if dlse is None else bucket.queries_of(dlse)
        own = {name: torch.empty_like(getattr(part, name), dtype=gradient.dtype) for name, gradient in gradients.items()}
        backward(part, bucket.queries_of(dout), dlse_part, bucket.queries_of(out), bucket.queries_of(lse), own)
        for name, gradient in own.items():
            whole = gradients[name]
            if name in ("k", "v"):
                rows = bucket.key_rows
            elif name == "q" or (name in ("temperature", "gate", "table") and whole.shape[2] > 1):
                rows = bucket.query_rows
            else:  # shared by all sequences
                whole += gradient
                continue
            if isinstance(rows, slice):
                whole[:, :, rows] = gradient
            else:
                whole[0].index_copy_(1, rows, gradient.transpose(0, 1).flatten(1, 2))
