"""Decoding as two Triton kernels: each part of the keys by one program, then the parts of a row merged by their log-sum-exps.

A program takes the queries of all heads that share a key head, a part of that sequence's keys, and walks over it once. How many parts there
are is chosen so that the device is full; with one part nothing is merged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.dispatch import interpreting
from foveal.kernels.gathered import LN2, LOG2E, TILINGS, Tiling, absorb, compile_case, constants, finish, launch, load_rows, store_rows, tiling
from foveal.kernels.gpu import width
from foveal.kernels.testing.compile import CompileCase

#: Least keys of a part: below, merging costs more than another core brings.
SHORTEST_PART = 256
#: Programs that a core of the device should find.
PROGRAMS_PER_CORE = 2


@triton.jit
def split_kernel(
    q, k, v, index, pages, lengths, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, index_batch, index_head, index_row, page_row,
    rows, batches, kv_heads, group, queries, listed, capacity, page_size, splits, scale,
    HAS_INDEX: tl.constexpr, PAGED: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of QUERIES rows (member of the head group, query) over one part of their sequence's keys."""
    tiles = tl.cdiv(group * queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    plane = tl.program_id(0) // tiles % (batches * kv_heads)
    part = tl.program_id(0) // (tiles * batches * kv_heads)
    batch = (plane // kv_heads).to(tl.int64)
    shared = (plane % kv_heads).to(tl.int64)
    filled = tl.minimum(tl.load(lengths + batch), capacity)
    count = filled
    if HAS_INDEX:
        count = listed + 0
    step = tl.cdiv(tl.cdiv(count, splits), KEYS) * KEYS
    begin = part * step
    end = tl.minimum(begin + step, count)

    row = first + tl.arange(0, QUERIES)
    there = row < group * queries
    member = row // queries
    query = row % queries
    tile = load_rows(q + batch * q_batch + shared * group * q_head, member * q_head + query * q_row, there, 1, DIM, WIDTH, UPCAST)
    accumulated = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(begin, end, KEYS):
        number = start + tl.arange(0, KEYS)
        present = number < end
        place = number
        if HAS_INDEX:
            place = tl.load(index + batch * index_batch + shared * index_head + number.to(tl.int64) * index_row, mask=present, other=-1)
        present = present & (place >= 0) & (place < filled)
        outer = batch
        inner = place
        if PAGED:
            outer = tl.load(pages + batch * page_row + place // page_size, mask=present, other=0).to(tl.int64)
            inner = place % page_size
        keys = load_rows(k + shared * k_head, outer * k_batch + inner.to(tl.int64) * k_row, present, 1, DIM, WIDTH, UPCAST)
        logits = tl.dot(tile, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        seen = present[None, :] & there[:, None]
        if CAUSAL:
            seen = seen & (place[None, :] <= filled - queries + query[:, None])
        values = load_rows(v + shared * v_head, outer * v_batch + inner.to(tl.int64) * v_row, present, 1, VALUE_DIM, VALUE_WIDTH, UPCAST)
        accumulated, largest, total = absorb(accumulated, largest, total, tl.where(seen, logits, float("-inf")), values, DOT, PRECISION)
    found, sums = finish(accumulated, largest, total)
    target = part * rows + (batch * kv_heads + shared) * group * queries + row
    store_rows(out, found, target, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH)
    tl.store(lse + target, sums, mask=there)


@triton.jit
def merge_kernel(
    parts, part_lse, out, lse, rows, splits, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """Output and log-sum-exp of QUERIES rows from those of their parts."""
    row = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    there = row < rows
    column = tl.arange(0, VALUE_WIDTH)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulated = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    for part in range(0, splits):
        at = row + part * rows
        sums = tl.load(part_lse + at, mask=there, other=float("-inf")) * LOG2E
        higher = tl.maximum(largest, sums)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(sums - anchor)
        shrink = tl.exp2(largest - anchor)
        read = tl.load(parts + at[:, None] * VALUE_DIM + column[None, :], mask=there[:, None] & (column[None, :] < VALUE_DIM), other=0.0)
        accumulated = accumulated * shrink[:, None] + share[:, None] * read
        total = total * shrink + share
        largest = higher
    empty = total == 0
    whole = tl.where(empty, 1.0, total)
    store_rows(out, accumulated / whole[:, None], row, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH)
    tl.store(lse + row, tl.where(empty, float("-inf"), (largest + tl.log2(whole)) * LN2), mask=there)


# --- launching -----------------------------------------------------------------------------------------------------------------------


def parts(programs: int, keys: int, device: torch.device) -> int:
    """Into how many parts to cut `keys` keys so that `programs` programs a part fill the device."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(triton.cdiv(PROGRAMS_PER_CORE * cores, programs), triton.cdiv(keys, SHORTEST_PART)))


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, kv_index: Tensor | None, page_table: Tensor | None,
    causal: bool, splits: int, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and `lse`; shapes as in `foveal.kernels.decode.cpu.forward`."""
    if out.numel() == 0:
        return
    batch, heads, queries, _ = q.shape
    kv_heads, length = k_cache.shape[1:3]
    group, value_dim = heads // kv_heads, v_cache.shape[3]
    q, k_cache, v_cache = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_cache, v_cache))
    capacity = length if page_table is None else length * page_table.shape[1]
    listed = 0 if kv_index is None else kv_index.shape[2]
    tiles = tiling("decode", "forward", q, value_dim, queries=width(group * queries), crowded=kv_index is not None or page_table is not None)
    programs = triton.cdiv(group * queries, tiles.queries) * batch * kv_heads
    splits = splits or parts(programs, listed if kv_index is not None else capacity, q.device)
    rows = batch * heads * queries
    found, sums = out, lse
    if splits > 1:
        found = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
        sums = torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
    arguments = {
        "q": q, "k": k_cache, "v": v_cache, "index": kv_index, "pages": page_table, "lengths": cache_seqlens.contiguous(), "out": found, "lse": sums,
        "rows": rows, "batches": batch, "kv_heads": kv_heads, "group": group, "queries": queries, "listed": listed, "capacity": capacity,
        "page_size": length, "splits": splits, "scale": scale, "HAS_INDEX": kv_index is not None, "PAGED": page_table is not None,
        "CAUSAL": causal, "QUERIES": tiles.queries, "KEYS": tiles.keys, **constants(q, value_dim),
    }  # fmt: skip
    for name, tensor in (("q", q), ("k", k_cache), ("v", v_cache)):
        arguments |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), tensor.stride(), strict=False))
    arguments["k_batch"], arguments["v_batch"] = (t.stride(0) for t in (k_cache, v_cache))
    strides = (0, 0, 0) if kv_index is None else kv_index.expand(batch, kv_heads, -1).stride()
    arguments |= dict(zip(("index_batch", "index_head", "index_row"), strides, strict=True))
    if page_table is not None:
        arguments["pages"] = page_table = page_table.contiguous()
    arguments["page_row"] = 0 if page_table is None else page_table.stride(0)
    launch(split_kernel, programs * splits, tiles, arguments)
    if splits > 1:
        small = Tiling(min(16, triton.next_power_of_2(rows)) if not interpreting() else width(rows), 16, 4, 1)
        merged = {"parts": found, "part_lse": sums, "out": out, "lse": lse, "rows": rows, "splits": splits, "QUERIES": small.queries}
        launch(merge_kernel, triton.cdiv(rows, small.queries), small, {**merged, "VALUE_DIM": value_dim, "VALUE_WIDTH": width(value_dim)})


# --- the compile check ---------------------------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """The split kernel with 16 and with 64 rows, plain and with all options, and the merge."""
    cases = []
    strides = [f"{name}_{axis}" for name in "qkv" for axis in ("batch", "head", "row")]
    plain = {"HAS_INDEX": False, "PAGED": False, "CAUSAL": False, "index": None, "pages": None}
    full = {"HAS_INDEX": True, "PAGED": True, "CAUSAL": True}
    for arch in ("ampere", "hopper", "cdna"):
        for dim, dtype, rows, variant in [
            (128, "bf16", 16, "plain"), (128, "bf16", 64, "all"), (256, "bf16", 16, "all"), (64, "fp32", 16, "all"),
        ]:  # fmt: skip
            own = {**(plain if variant == "plain" else full), "QUERIES": min(rows, TILINGS["forward", arch, 4 if dtype == "fp32" else 2][0].queries)}
            quick = variant == "plain" and dim == 128
            name, crowded = f"split-{rows}-{variant}", variant == "all"
            cases.append(compile_case(name, split_kernel, "forward", arch, dim, dtype, own, divisible=strides, crowded=crowded, quick=quick))
        own = {"QUERIES": 16}
        merge = compile_case("merge", merge_kernel, "forward", arch, 128, "bf16", own, types={"parts": "*fp32", "part_lse": "*fp32"})
        cases.append(_without_products(merge))
    return cases


def _without_products(case: CompileCase) -> CompileCase:
    from dataclasses import replace

    return replace(case, matrix=False, num_stages=1)
