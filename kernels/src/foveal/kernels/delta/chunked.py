"""Torch form of the delta rule and of Titans: chunks, inside which all errors come from one triangular solve.

Unrolled over a chunk, the state before token i is a weighted sum of the entering state and of key times error for the tokens j < i. So the
errors of a chunk solve ``(I + A) e = v - K S``: A is strictly lower triangular, key against key times the weight with which a later token
meets an earlier one. What depends on no state is done for all chunks at once; from chunk to chunk three small products remain (the WY form
of Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024). The two mechanisms differ only in the
weights: for the delta rule exponentials of decays, for Titans products of its factors, formed by their own recurrence of one chunk.

Plain torch, recorded by autograd and differentiable as often as one likes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """One mechanism on chunks, each (batch, heads, chunks, tokens, ...); `state` dims count all its parts stacked.

    Attributes:
        meets: weight with which the error of token j stands in the state that token i's error is taken from, zero for j >= i.
        sees: weight with which it stands in the state that token i's query reads, zero for j > i.
        key_in: what the error of a token reads of the entering state, (tokens, state).
        query_in: what its output reads of it, (tokens, state).
        key_out: what its error adds to the leaving state, (tokens, state).
        kept: what each part of the leaving state keeps of each part of the entering one, (parts, parts).
    """

    meets: Tensor
    sees: Tensor
    key_in: Tensor
    query_in: Tensor
    key_out: Tensor
    kept: Tensor


class Walk(Protocol):
    """What goes from chunk to chunk: `walk`, or a kernel in its place."""

    def __call__(
        self, from_values: Tensor, from_state: Tensor, seen: Tensor, query_in: Tensor, key_out: Tensor, kept: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def walk(
    from_values: Tensor, from_state: Tensor, seen: Tensor, query_in: Tensor, key_out: Tensor, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk ``e = from_values - from_state S``, ``out = query_in S + seen e``, ``S = kept S + key_out^T e``: outputs and last state."""
    outputs = []
    key_out = key_out.mT
    for index in range(from_values.shape[2]):
        error = from_values[:, :, index] - from_state[:, :, index] @ state
        outputs.append(query_in[:, :, index] @ state + seen[:, :, index] @ error)
        parts = state.unflatten(2, (kept.shape[-1], -1)).flatten(3)
        state = (kept[:, :, index] @ parts).view(state.shape) + key_out[:, :, index] @ error
    return torch.stack(outputs, 2), state


def run(q: Tensor, k: Tensor, v: Tensor, weights: Chunks, state: Tensor, walk: Walk = walk) -> tuple[Tensor, Tensor]:
    """(output, leaving state) from chunks of q, k and v and the entering state (batch, heads, state, value_dim)."""
    unit = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device) + k @ k.mT * weights.meets
    solved = torch.linalg.solve_triangular(unit, torch.cat([v, weights.key_in], -1), upper=False, unitriangular=True)
    from_values, from_state = solved.split([v.shape[-1], solved.shape[-1] - v.shape[-1]], -1)
    out, state = walk(from_values, from_state, q @ k.mT * weights.sees, weights.query_in, weights.key_out, weights.kept, state)
    return out.flatten(2, 3), state


def _pieces(length: int, chunk_size: int) -> list[tuple[slice, int]]:
    """The whole chunks as one piece, the rest as another: nothing is padded, so no token is invented that a state would have to survive."""
    whole = length // chunk_size * chunk_size
    pieces = [(slice(0, whole), chunk_size), (slice(whole, length), length - whole)]
    return [(places, size) for places, size in pieces if size and places.stop > places.start]


def _chunks(tensor: Tensor, places: slice, size: int, dtype: torch.dtype) -> Tensor:
    return tensor[:, :, places].to(dtype).unflatten(2, (-1, size))


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    walk: Walk = walk,
) -> tuple[Tensor, Tensor]:
    """(output in v's dtype, last state); arguments as in the definition."""
    wide = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide) if initial_state is None else initial_state.to(wide)
    outputs = [v.new_zeros(*v.shape[:2], 0, v.shape[3], dtype=wide)]
    for places, size in _pieces(q.shape[2], chunk_size):
        query, key, value, rate = (_chunks(x, places, size, wide) for x in (q, k, v, beta))
        upto = torch.zeros_like(rate) if g is None else _chunks(g, places, size, wide).cumsum(-1)
        later = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        between = (upto[..., :, None] - upto[..., None, :]).masked_fill(~later, float("-inf")).exp() * rate[..., None, :]
        entering = upto.exp()[..., None]
        leaving = ((upto[..., -1:] - upto).exp() * rate)[..., None] * key
        weights = Chunks(between.tril(-1), scale * between, entering * key, scale * entering * query, leaving, entering[..., -1:, :])
        out, state = run(query, key, value, weights, state, walk)
        outputs.append(out)
    return torch.cat(outputs, 2).to(v.dtype), state


def _titans_weights(theta: Tensor, alpha: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in memory and momentum after every token: of the tokens' errors (..., token, error), and of the entering (memory, momentum).

    The entering memory has weight prod(1 - alpha) in the memory; the entering momentum its own in each.
    """
    size = theta.shape[-1]
    identity = torch.eye(size, dtype=theta.dtype, device=theta.device)
    in_memory = torch.zeros_like(theta)
    in_momentum = torch.zeros_like(theta)
    entering_memory = torch.ones_like(theta[..., 0])
    carried_momentum, carried_memory = torch.ones_like(entering_memory), torch.zeros_like(entering_memory)
    memory_rows, states = [], []
    for i in range(size):
        in_momentum = eta[..., i, None] * in_momentum + theta[..., i, None] * identity[i]
        in_memory = (1 - alpha[..., i, None]) * in_memory + in_momentum
        carried_momentum = eta[..., i] * carried_momentum
        carried_memory = (1 - alpha[..., i]) * carried_memory + carried_momentum
        entering_memory = (1 - alpha[..., i]) * entering_memory
        memory_rows.append(in_memory)
        states.append(torch.stack([entering_memory, carried_memory, carried_momentum], -1))
    return torch.stack(memory_rows, -2), in_momentum, torch.stack(states, -2)


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    initial_state: tuple[Tensor, Tensor] | None,
    scale: float,
    chunk_size: int,
    walk: Walk = walk,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(output in v's dtype, (memory, momentum)); arguments as in the definition."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dim = q.shape[3]
    zeros = q.new_zeros(*q.shape[:2], dim, v.shape[3], dtype=wide)
    state = torch.cat([zeros, zeros] if initial_state is None else [part.to(wide) for part in initial_state], 2)
    outputs = [v.new_zeros(*v.shape[:2], 0, v.shape[3], dtype=wide)]
    for places, size in _pieces(q.shape[2], chunk_size):
        query, key, value, rate, forget, keep = (_chunks(x, places, size, wide) for x in (q, k, v, theta, alpha, eta))
        in_memory, in_momentum, entering = _titans_weights(rate, forget, keep)

        def before(rows: Tensor, first: Tensor) -> Tensor:
            """The rows of the state before each token: those after the one before it."""
            return torch.cat([first, rows[..., :-1, :]], -2)

        meets = before(in_memory, torch.zeros_like(in_memory[..., :1, :]))
        first = torch.zeros_like(entering[..., :1, :2])
        first[..., 0] = 1
        enters = before(entering[..., :2], first)
        key_in = torch.cat([enters[..., :1] * key, enters[..., 1:] * key], -1)
        query_in = scale * torch.cat([entering[..., :1] * query, entering[..., 1:2] * query], -1)
        key_out = torch.cat([in_memory[..., -1, :, None] * key, in_momentum[..., None] * key], -1)
        end = entering[..., -1, :]
        mixing = torch.stack([torch.stack([end[..., 0], end[..., 1]], -1), torch.stack([torch.zeros_like(end[..., 2]), end[..., 2]], -1)], -2)
        out, state = run(query, key, value, Chunks(meets, scale * in_memory, key_in, query_in, key_out, mixing), state, walk)
        outputs.append(out)
    memory, momentum = state.split(dim, 2)
    return torch.cat(outputs, 2).to(v.dtype), (memory, momentum)
