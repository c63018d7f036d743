"""Block-sparse attention as Triton kernels: the list walked forward and for the queries' gradient, its transpose for the keys'. No atomics.

A program owns a tile of one block of queries (or keys) and walks over the blocks listed for it, each in tiles of its own; the tile sizes
come from the table, not from the list's blocks. Tiles that lie wholly outside the window or after the queries are skipped, masks of
partial tiles are read where there are any.

The bias's gradient: `query_gradients` writes the gradients of the listed tiles, (listed tiles, block, block) in float32, which are then
added to the bias's own tiles in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.block_sparse.cpu import Bias
from foveal.kernels.gathered import (
    LOG2E,
    absorb,
    candidates,
    compile_case,
    constants,
    finish,
    launch,
    load_rows,
    load_sums,
    row_sums,
    store_rows,
    tiling,
)  # fmt: skip
from foveal.kernels.gpu import width
from foveal.kernels.testing.compile import CompileCase
from foveal.kernels.tune import Tunable


@triton.jit
def pair_logits(
    logits, query, key, first, start, queries, keys, bias, bias_query, bias_key, mask, masked, query_in_block, key_in_block,
    mask_tile, mask_query, mask_key,
    left, right, HAS_BIAS: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 with bias, the tile's own mask, window and the sequences' ends.

    `query` and `key` count from the tile's corner (first, start) and broadcast against each other in either order.
    """
    seen = (query < queries - first) & (key < keys - start)
    if HAS_BIAS:
        corner = bias + first.to(tl.int64) * bias_query + start.to(tl.int64) * bias_key
        logits += tl.load(corner + query * bias_query + key * bias_key, mask=seen, other=0.0).to(tl.float32) * LOG2E
    if HAS_MASKS:
        own = mask + masked.to(tl.int64) * mask_tile
        inner = (query_in_block + query) * mask_query + (key_in_block + key) * mask_key
        seen = seen & (tl.load(own + inner, mask=seen & (masked >= 0), other=1) != 0)
    distance = (key - query) + (start - first - (keys - queries))
    if HAS_LEFT:
        seen = seen & (distance >= -left)
    if HAS_RIGHT:
        seen = seen & (distance <= right)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def meets(
    first, start, queries, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Whether a tile holds a pair of the window."""
    query = first + (keys - queries)
    met = start < keys
    if HAS_LEFT:
        met = met & (start + KEYS - 1 - query >= -left)
    if HAS_RIGHT:
        met = met & (start - (query + QUERIES - 1) <= right)
    return met


@triton.jit
def own_queries(heads, query_blocks, BLOCK_Q: tl.constexpr, QUERIES: tl.constexpr):
    """Of a program that owns queries: its (batch, head) plane, batch, head, block, and its first query, in the block and in the sequence."""
    per_block = BLOCK_Q // QUERIES
    plane = (tl.program_id(0) // (query_blocks * per_block)).to(tl.int64)
    block = tl.program_id(0) % (query_blocks * per_block) // per_block
    within = tl.program_id(0) % per_block * QUERIES
    return plane, plane // heads, plane % heads, block, within, block * BLOCK_Q + within


@triton.jit
def listed_tile(step, steps, columns, tile, HAS_MASKS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Of a step through a list whose blocks are walked in `steps` parts: the entry, the part's place in the block and in the sequence, its mask."""
    entry = step // steps
    inner = step % steps * PART
    masked = -1
    if HAS_MASKS:
        masked = tl.load(tile + entry)
    return entry, inner, tl.load(columns + entry) * BLOCK + inner, masked


@triton.jit
def forward_kernel(
    q, k, v, bias, row_start, columns, tile, tiles, out, lse,
    bias_batch, bias_head, bias_query, bias_key, list_batch, list_head, mask_tile, mask_query, mask_key,
    heads, group, queries, keys, query_blocks, left, right, scale,
    HAS_BIAS: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of QUERIES queries of one block."""
    plane, batch, head, block, within, first = own_queries(heads, query_blocks, BLOCK_Q, QUERIES)
    own = (batch * (heads // group) + head // group) * keys
    row = first + tl.arange(0, QUERIES)
    there = row < queries
    if HAS_BIAS:
        bias += batch * bias_batch + head * bias_head
    queries_tile = load_rows(q + plane * queries * DIM, row, there, DIM, DIM, WIDTH, UPCAST)
    accumulated = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    listed = row_start + batch * list_batch + head * list_head + block
    steps: tl.constexpr = BLOCK_K // KEYS
    for step in range(tl.load(listed) * steps, tl.load(listed + 1) * steps):
        _entry, inner, start, masked = listed_tile(step, steps, columns, tile, HAS_MASKS, BLOCK_K, KEYS)
        wanted = True
        if HAS_LEFT or HAS_RIGHT:
            wanted = meets(first, start, queries, keys, left, right, HAS_LEFT, HAS_RIGHT, QUERIES, KEYS)
        if wanted:
            key = start + tl.arange(0, KEYS)
            keys_tile = load_rows(k + own * DIM, key, key < keys, DIM, DIM, WIDTH, UPCAST)
            logits = tl.dot(queries_tile, tl.trans(keys_tile), input_precision=PRECISION) * (scale * LOG2E)
            logits = pair_logits(
                logits, tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :], first, start, queries, keys, bias, bias_query, bias_key,
                tiles, masked, within, inner, mask_tile, mask_query, mask_key, left, right,
                HAS_BIAS, HAS_MASKS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            values_tile = load_rows(v + own * VALUE_DIM, key, key < keys, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
            accumulated, largest, total = absorb(accumulated, largest, total, logits, values_tile, DOT, PRECISION)
    found, sums = finish(accumulated, largest, total)
    store_rows(out + plane * queries * VALUE_DIM, found, row, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH)
    tl.store(lse + plane * queries + row, sums, mask=there)


@triton.jit
def key_gradients_kernel(
    q, k, v, bias, row_start, columns, tile, tiles, dout, lse, delta, dk, dv,
    bias_batch, bias_head, bias_query, bias_key, list_batch, list_head, mask_tile, mask_query, mask_key,
    heads, group, queries, keys, key_blocks, left, right, scale,
    HAS_BIAS: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of KEYS keys and values of one block, over every head of its group and the query blocks that list it.

    The list is the transposed one, logits stand (key, query).
    """
    per_block = BLOCK_K // KEYS
    plane = (tl.program_id(0) // (key_blocks * per_block)).to(tl.int64)
    block = tl.program_id(0) % (key_blocks * per_block) // per_block
    within = tl.program_id(0) % per_block * KEYS
    start = block * BLOCK_K + within
    kv_heads = heads // group
    batch = plane // kv_heads
    shared = plane % kv_heads
    key = start + tl.arange(0, KEYS)
    there = key < keys
    keys_tile = load_rows(k + plane * keys * DIM, key, there, DIM, DIM, WIDTH, UPCAST)
    values_tile = load_rows(v + plane * keys * VALUE_DIM, key, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
    key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    value_sum = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    for member in range(0, group):
        head = shared * group + member
        own = (batch * heads + head) * queries
        bias_base = bias
        if HAS_BIAS:
            bias_base = bias + batch * bias_batch + head * bias_head
        listed = row_start + batch * list_batch + head * list_head + block
        steps: tl.constexpr = BLOCK_Q // QUERIES
        for step in range(tl.load(listed) * steps, tl.load(listed + 1) * steps):
            _entry, inner, first, masked = listed_tile(step, steps, columns, tile, HAS_MASKS, BLOCK_Q, QUERIES)
            wanted = True
            if HAS_LEFT or HAS_RIGHT:
                wanted = meets(first, start, queries, keys, left, right, HAS_LEFT, HAS_RIGHT, QUERIES, KEYS)
            if wanted:
                row = first + tl.arange(0, QUERIES)
                present = row < queries
                queries_tile = load_rows(q + own * DIM, row, present, DIM, DIM, WIDTH, UPCAST)
                gradient = load_rows(dout + own * VALUE_DIM, row, present, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
                sums, taken = load_sums(lse + own, delta + own, row, present)
                logits = tl.dot(keys_tile, tl.trans(queries_tile), input_precision=PRECISION) * (scale * LOG2E)
                logits = pair_logits(
                    logits, tl.arange(0, QUERIES)[None, :], tl.arange(0, KEYS)[:, None], first, start, queries, keys,
                    bias_base, bias_query, bias_key, tiles, masked, inner, within, mask_tile,
                    mask_query, mask_key, left, right, HAS_BIAS, HAS_MASKS, HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
                weights = tl.exp2(logits - sums[None, :])
                value_sum = tl.dot(weights.to(DOT), gradient, value_sum, input_precision=PRECISION)
                dweights = tl.dot(values_tile, tl.trans(gradient), input_precision=PRECISION)
                dlogits = weights * (dweights - taken[None, :])
                key_sum = tl.dot(dlogits.to(DOT), queries_tile, key_sum, input_precision=PRECISION)
    store_rows(dk + plane * keys * DIM, key_sum * scale, key, there, DIM, DIM, WIDTH)
    store_rows(dv + plane * keys * VALUE_DIM, value_sum, key, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH)


@triton.jit
def query_gradients_kernel(
    q, k, v, bias, row_start, columns, tile, tiles, dout, lse, delta, dq, scratch,
    bias_batch, bias_head, bias_query, bias_key, list_batch, list_head, mask_tile, mask_query, mask_key, scratch_batch, scratch_head,
    heads, group, queries, keys, query_blocks, left, right, scale,
    HAS_BIAS: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, WRITE_LOGITS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of QUERIES queries of one block; with WRITE_LOGITS also those of the listed tiles (zeroed before: what is skipped is not written)."""
    plane, batch, head, block, within, first = own_queries(heads, query_blocks, BLOCK_Q, QUERIES)
    own = (batch * (heads // group) + head // group) * keys
    row = first + tl.arange(0, QUERIES)
    there = row < queries
    if HAS_BIAS:
        bias += batch * bias_batch + head * bias_head
    queries_tile = load_rows(q + plane * queries * DIM, row, there, DIM, DIM, WIDTH, UPCAST)
    gradient = load_rows(dout + plane * queries * VALUE_DIM, row, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
    sums, taken = load_sums(lse + plane * queries, delta + plane * queries, row, there)
    query_sum = tl.zeros([QUERIES, WIDTH], tl.float32)
    listed = row_start + batch * list_batch + head * list_head + block
    steps: tl.constexpr = BLOCK_K // KEYS
    for step in range(tl.load(listed) * steps, tl.load(listed + 1) * steps):
        entry, inner, start, masked = listed_tile(step, steps, columns, tile, HAS_MASKS, BLOCK_K, KEYS)
        wanted = True
        if HAS_LEFT or HAS_RIGHT:
            wanted = meets(first, start, queries, keys, left, right, HAS_LEFT, HAS_RIGHT, QUERIES, KEYS)
        if wanted:
            key = start + tl.arange(0, KEYS)
            keys_tile = load_rows(k + own * DIM, key, key < keys, DIM, DIM, WIDTH, UPCAST)
            logits = tl.dot(queries_tile, tl.trans(keys_tile), input_precision=PRECISION) * (scale * LOG2E)
            logits = pair_logits(
                logits, tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :], first, start, queries, keys, bias, bias_query, bias_key,
                tiles, masked, within, inner, mask_tile, mask_query, mask_key, left, right,
                HAS_BIAS, HAS_MASKS, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            values_tile = load_rows(v + own * VALUE_DIM, key, key < keys, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
            dweights = tl.dot(gradient, tl.trans(values_tile), input_precision=PRECISION)
            dlogits = tl.exp2(logits - sums[:, None]) * (dweights - taken[:, None])
            if WRITE_LOGITS:
                corner = scratch + batch * scratch_batch + head * scratch_head + entry.to(tl.int64) * (BLOCK_Q * BLOCK_K)
                at = (within + tl.arange(0, QUERIES))[:, None] * BLOCK_K + inner + tl.arange(0, KEYS)[None, :]
                tl.store(corner + at, dlogits)
            query_sum = tl.dot(dlogits.to(DOT), keys_tile, query_sum, input_precision=PRECISION)
    store_rows(dq + plane * queries * DIM, query_sum * scale, row, there, DIM, DIM, WIDTH)


# --- launching -----------------------------------------------------------------------------------------------------------------------


class _Call:
    """What the launches of one call share, by argument name."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tiles: Tensor, left: int, right: int, scale: float) -> None:
        self.q, self.value_dim = q, v.shape[3]
        self.crowded = bias is not None or tiles.shape[0] > 0
        self.batch, self.heads, self.queries, _ = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        self.block_q, self.block_k = tiles.shape[1:]
        self.query_blocks, self.key_blocks = triton.cdiv(self.queries, self.block_q), triton.cdiv(self.keys, self.block_k)
        self.arguments: dict[str, Any] = {
            "q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), "bias": bias, "tiles": tiles.view(torch.uint8),
            "heads": self.heads, "group": self.heads // self.kv_heads, "queries": self.queries, "keys": self.keys,
            "query_blocks": self.query_blocks, "key_blocks": self.key_blocks, "left": left, "right": right, "scale": scale,
            "HAS_BIAS": bias is not None, "HAS_MASKS": tiles.shape[0] > 0, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "BLOCK_Q": self.block_q, "BLOCK_K": self.block_k,
            **constants(q, self.value_dim), **dict(zip(("mask_tile", "mask_query", "mask_key"), tiles.stride(), strict=True)),
        }  # fmt: skip
        full = (self.batch, self.heads, self.queries, self.keys)
        strides = (0, 0, 0, 0) if bias is None else bias.expand(full).stride()
        self.arguments |= dict(zip(("bias_batch", "bias_head", "bias_query", "bias_key"), strides, strict=True))

    def run(self, name: str, kernel: Any, row_start: Tensor, columns: Tensor, tile: Tensor, **own: Any) -> None:
        """Launch over the blocks of queries, or of keys for their gradients, with the list or its transpose."""
        tiles = tiling("block_sparse", name, self.q, self.value_dim, queries=self.block_q, keys=self.block_k, crowded=self.crowded)
        by_keys = name == "key_gradients"
        blocks = self.key_blocks * (self.block_k // tiles.keys) if by_keys else self.query_blocks * (self.block_q // tiles.queries)
        lists = row_start.contiguous().expand(self.batch, self.heads, -1)
        place = {"list_batch": lists.stride(0), "list_head": lists.stride(1), "row_start": lists, "columns": columns, "tile": tile}
        programs = self.batch * (self.kv_heads if by_keys else self.heads) * blocks
        launch(kernel, programs, tiles, {**self.arguments, **place, "QUERIES": tiles.queries, "KEYS": tiles.keys, **own})


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, row_start: Tensor, columns: Tensor, tile: Tensor, tiles: Tensor,
    left: int, right: int, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and `lse`; shapes as in `foveal.kernels.block_sparse.cpu.forward`."""
    if out.numel() == 0:
        return
    _Call(q, k, v, bias, tiles, left, right, scale).run("forward", forward_kernel, row_start, columns, tile, out=out, lse=lse)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    row_start: Tensor, columns: Tensor, tile: Tensor, tiles: Tensor, turned_start: Tensor, turned_rows: Tensor, turned_tile: Tensor,
    out: Tensor, lse: Tensor, left: int, right: int, scale: float, dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None,
) -> None:  # fmt: skip
    """Fill `dq`, `dk`, `dv` and, where it is asked for, `dbias`; shapes as in `foveal.kernels.block_sparse.cpu.backward`."""
    if dbias is not None:
        dbias.zero_()
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    call = _Call(q, k, v, bias, tiles, left, right, scale)
    shared = {"dout": dout.contiguous(), "lse": lse.contiguous(), "delta": row_sums(out, dout, dlse)}
    call.run("key_gradients", key_gradients_kernel, turned_start, turned_rows, turned_tile, **shared, dk=dk, dv=dv)
    if dbias is None or columns.shape[0] == 0:
        none: dict[str, Any] = {"scratch": None, "scratch_batch": 0, "scratch_head": 0, "WRITE_LOGITS": False}
        call.run("query_gradients", query_gradients_kernel, row_start, columns, tile, **shared, dq=dq, **none)
        return
    # one copy of the list's tiles for each batch and head that shares it
    copies = (q.shape[0] // row_start.shape[0], q.shape[1] // row_start.shape[1])
    scratch = torch.zeros(*copies, columns.shape[0], call.block_q, call.block_k, dtype=torch.float32, device=q.device)
    steps: dict[str, Any] = {f"scratch_{name}": scratch.stride(at) if copies[at] > 1 else 0 for at, name in enumerate(("batch", "head"))}
    call.run("query_gradients", query_gradients_kernel, row_start, columns, tile, **shared, dq=dq, scratch=scratch, **steps, WRITE_LOGITS=True)
    _add_tiles(dbias, scratch, row_start, columns, call)


def _add_tiles(dbias: Tensor, scratch: Tensor, row_start: Tensor, columns: Tensor, call: _Call) -> None:
    """Add the gradients of listed tiles to the bias's own, in a fixed order (`index_put_` sorts where `index_add_` would race)."""
    device = columns.device
    counts = row_start.diff(dim=-1).flatten().long()
    line = torch.repeat_interleave(torch.arange(counts.shape[0], device=device), counts, output_size=columns.shape[0])
    row, plane = line % call.query_blocks, torch.div(line, call.query_blocks, rounding_mode="floor")
    batch, head = torch.div(plane, row_start.shape[1], rounding_mode="floor"), plane % row_start.shape[1]
    batch = batch + torch.arange(scratch.shape[0], device=device)[:, None, None]  # planes that are shared stand for each of their members
    head = head + torch.arange(scratch.shape[1], device=device)[:, None]
    tiled = Bias(dbias, call.block_q, call.block_k)
    parts = scratch.flatten(0, 1)
    place = tiled.place(batch, head, row, columns.long().expand(*scratch.shape[:3])).reshape(-1)
    found = tiled.cut(dbias).flatten(1)
    found.index_put_((place,), tiled.reduced(parts).to(found.dtype), accumulate=True)
    dbias.copy_(tiled.join(found))


# --- the compile check ---------------------------------------------------------------------------------------------------------------

_KERNELS = {"forward": forward_kernel, "key_gradients": key_gradients_kernel, "query_gradients": query_gradients_kernel}


def compile_cases() -> list[CompileCase]:
    """The half-precision tilings of the table with the options that change the code; neighbourhoods share the table, with float32."""
    cases = []
    plain: dict[str, Any] = {
        "HAS_BIAS": False,
        "HAS_MASKS": False,
        "HAS_LEFT": False,
        "HAS_RIGHT": False,
        "bias": None,
        "scratch": None,
        "WRITE_LOGITS": False,
    }
    causal = {**plain, "HAS_RIGHT": True}
    full: dict[str, Any] = {"HAS_BIAS": True, "HAS_MASKS": True, "HAS_LEFT": True, "HAS_RIGHT": True, "WRITE_LOGITS": True}
    for arch in ("ampere", "hopper", "cdna"):
        for name, kernel in _KERNELS.items():
            for dim, dtype, variant, options in [
                (64, "fp16", "all", full), (128, "bf16", "causal", causal), (256, "bf16", "plain", plain),
            ]:  # fmt: skip
                own = {key: value for key, value in {**options, "BLOCK_Q": 64, "BLOCK_K": 64}.items() if key in kernel.arg_names}
                crowded, quick = variant == "all", variant == "all" and dtype == "fp16"
                cases.append(compile_case(f"{name}-{variant}", kernel, name, arch, dim, dtype, own, crowded=crowded, quick=quick))
    return cases


def tunables(*, toy: bool = False) -> list[Tunable]:
    """Tiles of each kernel by head dimension, on a quarter of the blocks of 64; with a bias (crowded registers) and without."""
    length = 64 if toy else 4096
    found = []
    for dtype in (torch.float32,) if toy else (torch.bfloat16, torch.float32):
        for dim in (16,) if toy else (64, 128, 256):
            for biased in (True, False):

                def inputs(device: torch.device, dtype: torch.dtype = dtype, dim: int = dim, biased: bool = biased) -> list[Tensor]:
                    draw = torch.Generator().manual_seed(0)
                    leaves = [torch.randn(1, 1 if toy else 8, length, dim, generator=draw).to(device, dtype) for _ in range(3)]
                    if biased:
                        leaves.append(torch.randn(1, 1, 1, length, generator=draw).to(device))
                    return [leaf.requires_grad_() for leaf in leaves]

                for kernel in _KERNELS:
                    name = kernel + ("_crowded" if biased else "")
                    found.append(Tunable("block_sparse", name, dtype, width(dim), candidates(toy), inputs, _run_sample))
    return found


def _run_sample(tensors: Sequence[Tensor], backend: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    from foveal.kernels.block_sparse.block_index import BlockIndex
    from foveal.kernels.block_sparse.op import block_sparse_attention

    q, k, v, *bias = tensors
    length = q.shape[2]
    blocks = torch.rand(-(-length // 64), -(-length // 64), generator=torch.Generator().manual_seed(2)) < (1 if length == 64 else 0.25)
    index = BlockIndex.from_mask(blocks, 64, queries=length, keys=length).to(q.device)
    out = block_sparse_attention(q, k, v, index, bias=bias[0] if bias else None, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out], torch.autograd.grad(out, list(tensors), weights)
