"""Linear attention as Triton kernels: chunk states, a pass over them, and the outputs of all chunks side by side.

One primitive does all the work. In it a query row reads a state of (rows, lanes) that key rows wrote their lanes into; `states_kernel` makes
what every chunk adds to the state, `pass_kernel` turns that into the state entering every chunk, and `outputs_kernel` reads it and adds the
quadratic form inside the chunk. Only the middle one is sequential, and it moves one number a thread. The backward pass is the same primitive
three times with the roles exchanged, as linear.c explains:

    dq: dout reads what v wrote into lanes of k.     dk: from the end, v reads what dout wrote into lanes of q.
    dv: from the end, k reads what q wrote into lanes of dout.

A decay per channel belongs to the rows of the forward pass and of dv, to the lanes of dq and dk. There a chunk is 16 tokens and the decay
between two of them is applied elementwise, so only differences towards earlier tokens are exponentiated. A program owns what it writes: no
atomics, the same bits every time. UPCAST loads in float32, as triton's interpreter needs for bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.dispatch import interpreting
from foveal.kernels.gpu import precision, width
from foveal.kernels.linear.cpu import rows as row_major
from foveal.kernels.testing.compile import CompileCase

NO_DECAY: tl.constexpr = tl.constexpr(0)
TOKEN_DECAY: tl.constexpr = tl.constexpr(1)
ROW_DECAY: tl.constexpr = tl.constexpr(2)
LANE_DECAY: tl.constexpr = tl.constexpr(3)


@triton.jit
def load_tile(base, place, live, stride, first, COUNT: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """(tokens, WIDTH) of a matrix of COUNT columns, from column `first`; zero where a token is not live and beyond the columns."""
    column = first + tl.arange(0, WIDTH)
    pointers = base + place[:, None].to(tl.int64) * stride + column[None, :]
    tile = tl.load(pointers, mask=live[:, None] & (column < COUNT)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def states_kernel(
    key, lane, upto, states,
    key_batch, key_head, key_row, lane_batch, lane_head, lane_row, heads, length, chunks, key_scale,
    ROWS: tl.constexpr, LANES: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to a tile of the state: key times lane, decayed to the chunk's end."""
    lane_tiles = (LANES + BLOCK_L - 1) // BLOCK_L
    tiles = (ROWS + BLOCK_R - 1) // BLOCK_R * lane_tiles
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % chunks
    pair = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    first_row, first_lane = tile // lane_tiles * BLOCK_R, tile % lane_tiles * BLOCK_L
    step = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    live = step < length
    place = length - 1 - step if REVERSE else step
    keys = load_tile(key + batch * key_batch + head * key_head, place, live, key_row, first_row, ROWS, BLOCK_R, UPCAST)
    lanes = load_tile(lane + batch * lane_batch + head * lane_head, place, live, lane_row, first_lane, LANES, BLOCK_L, UPCAST)
    end = tl.minimum(chunk * BLOCK_T + BLOCK_T, length) - 1
    if DECAY == TOKEN_DECAY:
        left = tl.load(upto + pair * length + end) - tl.load(upto + pair * length + step, mask=live, other=0.0)
        keys = keys * tl.exp(tl.where(live, left, 0.0))[:, None]
    if DECAY == ROW_DECAY:
        column = first_row + tl.arange(0, BLOCK_R)
        last = tl.load(upto + (pair * length + end) * ROWS + column, mask=column < ROWS, other=0.0)
        left = last[None, :] - load_tile(upto + pair * length * ROWS, step, live, ROWS, first_row, ROWS, BLOCK_R, False)
        keys = keys * tl.exp(tl.where(live[:, None], left, 0.0))
    if DECAY == LANE_DECAY:
        column = first_lane + tl.arange(0, BLOCK_L)
        last = tl.load(upto + (pair * length + end) * LANES + column, mask=column < LANES, other=0.0)
        left = last[None, :] - load_tile(upto + pair * length * LANES, step, live, LANES, first_lane, LANES, BLOCK_L, False)
        lanes = lanes * tl.exp(tl.where(live[:, None], left, 0.0))
    added = tl.dot(tl.trans(keys.to(DOT)), lanes.to(DOT), input_precision=PRECISION) * key_scale
    row, column = first_row + tl.arange(0, BLOCK_R), first_lane + tl.arange(0, BLOCK_L)
    inside = (row < ROWS)[:, None] & (column < LANES)[None, :]
    tl.store(states + (pair * chunks + chunk) * (ROWS * LANES) + row[:, None] * LANES + column[None, :], added, mask=inside)


@triton.jit
def pass_kernel(
    states, upto, entering, leaving, length, chunks,
    ROWS: tl.constexpr, LANES: tl.constexpr, TRANSPOSED: tl.constexpr, DECAY: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces what every chunk adds by the state that enters it. TRANSPOSED: `entering` and `leaving` are (lanes, rows)."""
    tiles = (ROWS * LANES + BLOCK - 1) // BLOCK
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    index = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = index < ROWS * LANES
    row, column = index // LANES, index % LANES
    whole = column * ROWS + row if TRANSPOSED else index
    state = tl.zeros([BLOCK], tl.float32)
    if entering is not None:
        state += tl.load(entering + pair * (ROWS * LANES) + whole, mask=inside, other=0.0)
    for chunk in range(chunks):
        pointers = states + (pair * chunks + chunk) * (ROWS * LANES) + index
        added = tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, state, mask=inside)
        end = tl.minimum(chunk * BLOCK_T + BLOCK_T, length) - 1
        if DECAY == TOKEN_DECAY:
            state = state * tl.exp(tl.load(upto + pair * length + end))
        if DECAY == ROW_DECAY:
            state = state * tl.exp(tl.load(upto + (pair * length + end) * ROWS + row, mask=inside, other=0.0))
        if DECAY == LANE_DECAY:
            state = state * tl.exp(tl.load(upto + (pair * length + end) * LANES + column, mask=inside, other=0.0))
        state += added
    if leaving is not None:
        tl.store(leaving + pair * (ROWS * LANES) + whole, state, mask=inside)


@triton.jit
def outputs_kernel(
    query, key, lane, weight, upto, states, out, terms,
    query_batch, query_head, query_row, key_batch, key_head, key_row, lane_batch, lane_head, lane_row, weight_batch, weight_head, weight_row,
    heads, length, chunks, query_scale, key_scale,
    ROWS: tl.constexpr, LANES: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's outputs in a tile of lanes; with `terms`, also weight times what came from strictly earlier steps (the decay's gradient)."""
    lane_tiles = (LANES + BLOCK_L - 1) // BLOCK_L
    lane_tile = tl.program_id(0) % lane_tiles
    chunk = tl.program_id(0) // lane_tiles % chunks
    pair = (tl.program_id(0) // lane_tiles // chunks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    first_lane = lane_tile * BLOCK_L
    token = tl.arange(0, BLOCK_T)
    step = chunk * BLOCK_T + token
    live = step < length
    place = length - 1 - step if REVERSE else step
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    lane += batch * lane_batch + head * lane_head
    column = first_lane + tl.arange(0, BLOCK_L)

    met = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    given = tl.zeros([BLOCK_T, BLOCK_L], tl.float32)
    own = tl.zeros([BLOCK_T], tl.float32)
    for first_row in tl.static_range(0, ROWS, BLOCK_R):
        queries = load_tile(query, place, live, query_row, first_row, ROWS, BLOCK_R, UPCAST)
        keys = load_tile(key, place, live, key_row, first_row, ROWS, BLOCK_R, UPCAST)
        own += tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        row = first_row + tl.arange(0, BLOCK_R)
        inside = (row < ROWS)[:, None] & (column < LANES)[None, :]
        state = tl.load(states + (pair * chunks + chunk) * (ROWS * LANES) + row[:, None] * LANES + column[None, :], mask=inside, other=0.0)
        if DECAY == ROW_DECAY:
            until = load_tile(upto + pair * length * ROWS, step, live, ROWS, first_row, ROWS, BLOCK_R, False)
            given += tl.dot((queries * tl.exp(until)).to(DOT), state.to(DOT), input_precision=PRECISION)
            for j in range(BLOCK_T):
                then = chunk * BLOCK_T + j
                there = length - 1 - then if REVERSE else then
                seen = (row < ROWS) & (then < length)
                other = tl.load(key + there.to(tl.int64) * key_row + row, mask=seen, other=0.0).to(tl.float32)
                since = until - tl.load(upto + (pair * length + then) * ROWS + row, mask=seen, other=0.0)[None, :]
                reached = tl.sum(queries.to(tl.float32) * other[None, :] * tl.exp(tl.minimum(since, 0.0)), 1)
                met += tl.where(token[None, :] == j, reached[:, None], 0.0)
        else:
            met += tl.dot(queries.to(DOT), tl.trans(keys.to(DOT)), input_precision=PRECISION)
            given += tl.dot(queries.to(DOT), state.to(DOT), input_precision=PRECISION)
    met *= query_scale * key_scale
    given *= query_scale
    before = (token[:, None] > token[None, :]) & live[:, None]
    lanes = load_tile(lane, place, live, lane_row, first_lane, LANES, BLOCK_L, UPCAST)
    if DECAY == TOKEN_DECAY:
        until = tl.load(upto + pair * length + step, mask=live, other=0.0)
        given *= tl.exp(until)[:, None]
        met *= tl.exp(tl.where(before, until[:, None] - until[None, :], 0.0))
    met = tl.where(before, met, 0.0)
    if DECAY == LANE_DECAY:
        until = load_tile(upto + pair * length * LANES, step, live, LANES, first_lane, LANES, BLOCK_L, False)
        given *= tl.exp(until)
        for j in range(BLOCK_T):
            then = chunk * BLOCK_T + j
            there = length - 1 - then if REVERSE else then
            seen = (column < LANES) & (then < length)
            other = tl.load(lane + there.to(tl.int64) * lane_row + column, mask=seen, other=0.0).to(tl.float32)
            since = until - tl.load(upto + (pair * length + then) * LANES + column, mask=seen, other=0.0)[None, :]
            reached = tl.sum(tl.where(token[None, :] == j, met, 0.0), 1)
            given += reached[:, None] * other[None, :] * tl.exp(tl.minimum(since, 0.0))
    else:
        given += tl.dot(met.to(DOT), lanes.to(DOT), input_precision=PRECISION)
    inside = live[:, None] & (column < LANES)[None, :]
    if terms is not None:
        weights = load_tile(weight + batch * weight_batch + head * weight_head, place, live, weight_row, first_lane, LANES, BLOCK_L, UPCAST)
        shares = weights.to(tl.float32) * given
        if REVERSE:  # the first step from the end is read by nothing that a decay lies before
            shares = tl.where((step > 0)[:, None], shares, 0.0)
        if DECAY == TOKEN_DECAY:
            tl.store(terms + (pair * lane_tiles + lane_tile) * length + place, tl.sum(shares, 1), mask=live)
        else:
            tl.store(terms + (pair * length + place[:, None]) * LANES + column[None, :], shares, mask=inside)
    given += (own * (query_scale * key_scale))[:, None] * lanes.to(tl.float32)
    tl.store(out + (pair * length + place[:, None]) * LANES + column[None, :], given.to(out.dtype.element_ty), mask=inside)


# --- launching -----------------------------------------------------------------------------------------------------------------------

_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

#: Tokens of a chunk without a decay per channel, and with one.
_TOKENS, _TOKENS_BY_CHANNEL = 64, 16
#: Largest tile of rows and of lanes, by bytes of an element.
_TILE = {2: 64, 4: 32}
_PASSED_AT_ONCE = 256


def _warps(kernel: Any, itemsize: int, decay: int) -> int:
    """Three TF32 products of a (64, 64) tile do not fit into the registers of four warps."""
    return 8 if kernel is outputs_kernel and itemsize == 4 and decay < 2 else 4


def _block(size: int, itemsize: int) -> int:
    return min(_TILE[itemsize], width(size))


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), tensor.stride(), strict=False))


class _Decay:
    """Log decays summed from the start of each chunk, in the order of the steps of either direction."""

    def __init__(self, decay: Tensor | None, q: Tensor) -> None:
        self.by_channel = decay is not None and decay.dim() == 4
        self.tokens = _TOKENS_BY_CHANNEL if self.by_channel else _TOKENS
        self.decay = None if decay is None else decay.float().expand(*q.shape[:3], *decay.shape[3:])

    def upto(self, reverse: bool) -> Tensor | None:
        if self.decay is None:
            return None
        # from the end, what lies between two steps is the decay of the later one
        decay = torch.cat([torch.zeros_like(self.decay[:, :, :1]), self.decay.flip(2)[:, :, :-1]], 2) if reverse else self.decay
        length = decay.shape[2]
        missing = -length % self.tokens
        padded = torch.cat([decay, decay.new_zeros(*decay.shape[:2], missing, *decay.shape[3:])], 2)
        return padded.unflatten(2, (-1, self.tokens)).cumsum(3).flatten(2, 3)[:, :, :length].contiguous()

    def kind(self, of_lanes: bool) -> int:
        return 0 if self.decay is None else 1 if not self.by_channel else 3 if of_lanes else 2


def _read(
    query: Tensor,
    key: Tensor,
    lane: Tensor,
    decay: _Decay,
    *,
    of_lanes: bool,
    reverse: bool,
    entering: Tensor | None,
    query_scale: float = 1.0,
    key_scale: float = 1.0,
    weight: Tensor | None = None,
    wants_leaving: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The primitive: (output in the lanes' dtype, leaving state, terms, entering states of all chunks).

    A decay per channel is one of the rows, or `of_lanes`; then `entering` and the leaving state are (lanes, rows), as the caller has them.
    """
    batch, heads, length, rows = query.shape
    lanes = lane.shape[3]
    pairs, chunks = batch * heads, triton.cdiv(length, decay.tokens)
    upcast = interpreting() and query.dtype == torch.bfloat16
    itemsize = query.element_size()
    upto = decay.upto(reverse)
    states = torch.empty(pairs, chunks, rows, lanes, dtype=torch.float32, device=query.device)
    out = torch.empty(lane.shape, dtype=lane.dtype, device=query.device)
    leaving = torch.empty(batch, heads, *((lanes, rows) if of_lanes else (rows, lanes)), dtype=torch.float32, device=query.device)
    block_r, block_l = _block(rows, itemsize), _block(lanes, itemsize)
    row_tiles, lane_tiles = triton.cdiv(rows, block_r), triton.cdiv(lanes, block_l)
    terms = None
    if weight is not None:
        terms = states.new_empty(batch, heads, length, lanes) if decay.by_channel else states.new_empty(batch, heads, lane_tiles, length)
    shared: dict[str, Any] = {
        "query": query, "key": key, "lane": lane, "weight": weight, "upto": upto, "states": states, "out": out, "terms": terms,
        "entering": entering, "leaving": leaving if wants_leaving else None,
        **_strides("query", query), **_strides("key", key), **_strides("lane", lane), **_strides("weight", query if weight is None else weight),
        "heads": heads, "length": length, "chunks": chunks, "query_scale": query_scale, "key_scale": key_scale,
        "ROWS": rows, "LANES": lanes, "REVERSE": reverse, "TRANSPOSED": of_lanes, "DECAY": decay.kind(of_lanes), "BLOCK_T": decay.tokens,
        "BLOCK_R": block_r, "BLOCK_L": block_l, "BLOCK": _PASSED_AT_ONCE,
        "UPCAST": upcast, "DOT": tl.float32 if upcast else _TRITON_DTYPE[query.dtype], "PRECISION": precision(),
    }  # fmt: skip
    programs = {
        states_kernel: pairs * chunks * row_tiles * lane_tiles,
        pass_kernel: pairs * triton.cdiv(rows * lanes, _PASSED_AT_ONCE),
        outputs_kernel: pairs * chunks * lane_tiles,
    }
    with torch.cuda.device(query.device if query.is_cuda else -1):  # -1: no device to switch to
        for kernel, grid in programs.items():
            warps = _warps(kernel, itemsize, shared["DECAY"])
            kernel[(grid,)](**{name: shared[name] for name in kernel.arg_names}, num_warps=warps, num_stages=1 if itemsize == 4 else 2)
    return out, leaving if wants_leaving else None, terms, states


def _state_of(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial_state: Tensor | None, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """(output in v's dtype, last state); `chunk_size` is the kernels' own."""
    if v.numel() == 0 or q.numel() == 0:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32)
        return v.new_zeros(v.shape), state if initial_state is None else initial_state.float().clone()
    q, k, v = (row_major(t, t.dtype) for t in (q, k, v))
    out, leaving, _, _ = _read(
        q, k, v, _Decay(decay, q), of_lanes=False, reverse=False, entering=_state_of(initial_state), query_scale=scale, wants_leaving=True
    )
    assert leaving is not None
    return out, leaving


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, decay (float32, in its own shape) and initial state."""
    if v.numel() == 0 or q.numel() == 0:
        zeros = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32)
        dinitial = zeros if dfinal_state is None else dfinal_state.float()
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None if decay is None else torch.zeros_like(decay), dinitial
    q, k, v, dout = (row_major(t, q.dtype) for t in (q, k, v, dout))
    decays = _Decay(decay, q)
    first, last = _state_of(initial_state), _state_of(dfinal_state)
    has_decay = decay is not None
    dq, _, read, states = _read(dout, v, k, decays, of_lanes=True, reverse=False, entering=first, query_scale=scale, weight=q if has_decay else None)
    through = _beyond(states, k, v, decays, last) if has_decay and last is not None else None
    del states
    dk, _, written, _ = _read(v, dout, q, decays, of_lanes=True, reverse=True, entering=last, key_scale=scale, weight=k if has_decay else None)
    dv, leaving, _, _ = _read(k, q, dout, decays, of_lanes=False, reverse=True, entering=last, key_scale=scale, wants_leaving=True)
    assert leaving is not None
    dinitial = leaving
    ddecay = None
    if decay is not None and decays.decay is not None and read is not None and written is not None:
        terms = read - written
        if through is not None:
            terms = torch.cat([terms[..., :-1, :], terms[..., -1:, :] + through], 2) if decays.by_channel else terms
        if not decays.by_channel:
            terms = terms.sum(2)
            if through is not None:
                terms = torch.cat([terms[..., :-1], terms[..., -1:] + through.sum(-1)], 2)
        ddecay = terms.flip(2).cumsum(2, dtype=torch.float64).flip(2).float().sum_to_size(decay.shape)
        kept = decays.decay[:, :, 0].exp()
        dinitial = dinitial * (kept[..., None] if decays.by_channel else kept[..., None, None])
    return dq, dk, dv, ddecay, dinitial


def _beyond(states: Tensor, k: Tensor, v: Tensor, decays: _Decay, dfinal_state: Tensor) -> Tensor:
    """Gradient of the last state against that state before the last token's own part, by channel: (batch, heads, 1, dim)."""
    assert decays.decay is not None
    batch, heads, length, _ = k.shape
    start = (length - 1) // decays.tokens * decays.tokens
    decay = decays.decay[:, :, start:] if decays.by_channel else decays.decay[:, :, start:, None]
    upto = decay.cumsum(2)
    keys = (k[:, :, start:-1].float() * (upto[:, :, -1:] - upto[:, :, :-1]).exp()).mT @ v[:, :, start:-1].float()
    entering = states[:, -1].unflatten(0, (batch, heads)).mT * upto[:, :, -1, :, None].exp()
    return ((keys + entering) * dfinal_state).sum(-1)[:, :, None]


# --- the compile check ---------------------------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every kind of decay in bfloat16 and float32 at head dim 64, forwards and from the end, with and without the decay's terms."""
    cases = []
    kinds = {"plain": (0, False), "token": (1, False), "rows": (2, False), "lanes": (3, True)}
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        for kind, (decay, of_lanes) in kinds.items():
            block = _block(64, itemsize)
            constants: dict[str, Any] = {
                "ROWS": 64, "LANES": 64, "REVERSE": of_lanes, "TRANSPOSED": of_lanes, "DECAY": decay,
                "BLOCK_T": _TOKENS_BY_CHANNEL if decay > 1 else _TOKENS, "BLOCK_R": block, "BLOCK_L": block, "BLOCK": _PASSED_AT_ONCE,
                "UPCAST": False, "DOT": tl.bfloat16 if itemsize == 2 else tl.float32, "PRECISION": "tf32x3",
            }  # fmt: skip
            if decay == 0:
                constants["upto"] = None
            for name, kernel in (("states", states_kernel), ("pass", pass_kernel), ("outputs", outputs_kernel)):
                if name == "pass" and itemsize == 2:
                    continue  # the states are float32 whatever the inputs
                own = dict(constants)
                if name == "outputs" and decay in (0, 2):
                    own |= {"terms": None, "weight": None}
                types = {"upto": "*fp32", "states": "*fp32", "terms": "*fp32", "entering": "*fp32", "leaving": "*fp32"}
                types |= dict.fromkeys(("query", "key", "lane", "weight", "out"), f"*{dtype}") | dict.fromkeys(("query_scale", "key_scale"), "fp32")
                for arithmetic, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):
                    own["PRECISION"] = arithmetic
                    cases.append(
                        CompileCase(
                            name=f"{name}-{kind}-{dtype}-{arithmetic}",
                            kernel=kernel,
                            signature={argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in own},
                            constants={argument: value for argument, value in own.items() if argument in kernel.arg_names},
                            num_warps=_warps(kernel, itemsize, decay),
                            num_stages=1 if itemsize == 4 else 2,
                            divisible=[argument for argument in kernel.arg_names if argument.endswith(("_batch", "_head", "_row"))],
                            matrix=itemsize == 2 and name != "pass",
                            targets=targets,
                            quick=kind == "token" and dtype == "bf16" and name == "outputs",
                        )
                    )
    return cases
