"""Chains of convolutions by convolution.c: float32, on processors with 512-bit vectors, one call a chain."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.kernels import native

SOURCE = str(Path(__file__).with_name("convolution.c"))
#: Maps side by side that one step takes.
PARTS = 8
_LANES, _PIXELS, _BLOCK, _STRIP = 16, 14, 64, 8
#: Tiles that go through the weights together at most, and the numbers that they copy: half a second-level cache.
_TILES, _SCRATCH = 16, 64 * 1024
_NO_MAP = (-1, *(0,) * 6)
#: ``Step`` of convolution.c: every field has eight bytes.
_STEP = struct.Struct(f"=21qd{(1 + PARTS) * len(_NO_MAP)}q")


class Place(NamedTuple):
    """Channels of a map in a chain: number of the map, first channel, how many."""

    value: int
    first: int
    channels: int


@dataclass(frozen=True)
class Step:
    """One convolution of a chain: what it reads, side by side, and what is added to it, scaled, before its SiLU (`early`) or after."""

    parts: tuple[Place, ...]
    added: Place | None
    outputs: int
    kernel: tuple[int, int]
    stride: int
    groups: int
    activated: bool
    scale: float = 1.0
    early: bool = False


@dataclass(frozen=True)
class Plan:
    """A chain on inputs of certain sizes: its steps as C reads them, and the memory it needs.

    Attributes:
        steps: bytes of the steps.
        outputs: sizes (batch, height, width, channels) of the maps that leave the chain.
        workspace: numbers that stay inside.
        share: numbers that a thread copies to.
    """

    steps: bytes
    outputs: tuple[tuple[int, int, int, int], ...]
    workspace: int
    share: int


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled convolution.c with its argument types, or None where it or the processor cannot."""
    loaded = native.load(SOURCE)
    if loaded is None or not loaded.convolution_serves():
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.convolution_run.argtypes = [ctypes.c_char_p, integer, pointer, pointer, integer, ctypes.c_int]
    loaded.convolution_run.restype = None
    return loaded


DENSE, DEPTHWISE, WINOGRAD = range(3)
#: G of Winograd's F(4, 3): what a kernel's row becomes.
_WINOGRAD = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))


def kind(step: Step) -> int:
    """The form in which a step is computed."""
    channels = [place.channels for place in step.parts]
    if step.groups == sum(channels) == step.outputs and len(channels) == 1:
        return DEPTHWISE
    # Narrow maps are not worth the way there and back.
    wide = all(count % _LANES == 0 for count in channels) and sum(channels) >= 2 * _LANES and step.outputs >= 2 * _LANES
    return WINOGRAD if wide and step.kernel == (3, 3) and step.stride == step.groups == 1 else DENSE


def pack(weight: Tensor, groups: int, form: int) -> Tensor:
    """Weights in the order in which convolution.c reads them: 16 output channels innermost, padded with zeros."""
    outputs, inputs, height, width = weight.shape
    if form == WINOGRAD:
        way = torch.tensor(_WINOGRAD, dtype=torch.float64)
        products = torch.einsum("au,oiuv,bv->aboi", way, weight.detach().double(), way).flatten(0, 1).to(weight.dtype)
        rows = torch.nn.functional.pad(products, (0, 0, 0, -outputs % _LANES)).unflatten(1, (-1, _LANES))
        return rows.transpose(2, 3).contiguous()
    apart = 1 if groups == outputs and inputs == 1 else groups
    rows = weight.detach().reshape(apart, outputs // apart, inputs, height, width)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, -rows.shape[1] % _LANES)).unflatten(1, (-1, _LANES))
    return rows.permute(0, 1, 4, 5, 3, 2).contiguous()


def plan(
    inputs: Sequence[Tensor], steps: Sequence[Step], outputs: Sequence[Sequence[int]], weights: Sequence[tuple[Tensor, Tensor | None]], threads: int
) -> Plan:
    """The chain on inputs of these sizes and strides.

    Args:
        inputs: in channels-last memory.
        steps: of the chain.
        outputs: numbers of the maps that leave it, each with those that stand beside it.
        weights: packed, with the biases.
        threads: that will run it.
    """
    # Of each map: base, offset, strides of (batch, row, pixel), channels, and its size (height, width).
    maps: list[tuple[int, int, tuple[int, int, int], int, tuple[int, int]]] = []
    for number, x in enumerate(inputs):
        strides = x.stride()
        maps.append((number, 0, (strides[0], strides[2], strides[3]), x.shape[1], (x.shape[2], x.shape[3])))
    batch, inside = inputs[0].shape[0], len(inputs) + len(outputs)
    last = {place.value: number for number, step in enumerate(steps) for place in (*step.parts, *([step.added] if step.added else []))}
    live: list[tuple[int, int, int]] = []  # beginning, end, last step that reads it
    packed, workspace, share = [], 0, 0
    # Of each map that leaves: its output, first channel there, and all channels of it.
    leaving: dict[int, tuple[int, int, int]] = {}
    for position, group in enumerate(outputs):
        widths = [steps[value - len(inputs)].outputs for value in group]
        for member, value in enumerate(group):
            leaving[value] = (len(inputs) + position, sum(widths[:member]), sum(widths))
    for number, (step, (weight, bias)) in enumerate(zip(steps, weights, strict=True)):
        value = len(inputs) + number
        height, width = max(maps[place.value][4][0] for place in step.parts), max(maps[place.value][4][1] for place in step.parts)
        out_height, out_width = (height - 1) // step.stride + 1, (width - 1) // step.stride + 1
        wanted = batch * out_height * out_width * step.outputs
        stride = step.outputs
        if value in leaving:
            base, offset, stride = leaving[value]
        else:
            live = sorted(entry for entry in live if entry[2] >= number)
            base, offset = inside, 0
            for begin, end, _ in live:
                if begin - offset >= wanted:
                    break
                offset = max(offset, end)
            live.append((offset, offset + -(-wanted // _LANES) * _LANES, last.get(value, number)))
            workspace = max(workspace, live[-1][1])
        maps.append((base, offset, (out_height * out_width * stride, out_width * stride, stride), step.outputs, (out_height, out_width)))
        read = sum(place.channels for place in step.parts)
        form, terms, pixels = kind(step), read * step.kernel[0] * step.kernel[1], batch * out_height * out_width
        if form == WINOGRAD:
            terms, pixels = read, batch * -(-out_height // 4) * -(-out_width // 4)
        tile = -(-terms // _BLOCK) * _BLOCK * _PIXELS
        if form == WINOGRAD:
            tile = 36 * (tile + -(-step.outputs // _LANES) * _LANES * _PIXELS)
        tiles = max(1, min(_TILES, (2 if form == WINOGRAD else 1) * _SCRATCH // tile))
        if threads > 1:  # a few pieces for each
            tiles = max(1, min(tiles, pixels // (_PIXELS * 4 * threads)))
        rows = (_STRIP - 1) * step.stride + step.kernel[0]
        share = max(share, rows * (width + 2 * (step.kernel[1] // 2)) * _LANES if form == DEPTHWISE else tiles * tile)

        def described(place: Place, size: tuple[int, int]) -> tuple[int, ...]:
            base, offset, strides, _, own = maps[place.value]
            return (base, offset + place.first, *strides, place.channels, int(own != size))

        parts = [field for place in step.parts for field in described(place, (height, width))]
        added = _NO_MAP if step.added is None else described(step.added, (out_height, out_width))
        packed.append(_STEP.pack(
            form, batch, height, width, out_height, out_width, read, step.outputs, *step.kernel, step.stride, step.groups, len(step.parts),
            step.activated, step.early, tiles, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), base, offset, stride, step.scale, *added,
            *parts, *_NO_MAP * (PARTS - len(step.parts)),
        ))  # fmt: skip
    sizes = tuple((batch, *maps[group[0]][4], leaving[group[0]][2]) for group in outputs)
    return Plan(b"".join(packed), sizes, workspace, share)


_memory = threading.local()


def run(chosen: Plan, inputs: Sequence[Tensor], threads: int) -> list[Tensor]:
    """Maps (batch, height, width, channels) that leave the chain."""
    loaded = library()
    assert loaded is not None
    # One workspace a thread for all chains: what is inside one does not outlive its call.
    needed = chosen.workspace + threads * chosen.share
    kept: Tensor | None = getattr(_memory, "workspace", None)
    if kept is None or kept.numel() < needed:
        with torch.inference_mode(False):
            kept = _memory.workspace = torch.empty(needed, dtype=torch.float32, device="cpu")
    out = [inputs[0].new_empty(size) for size in chosen.outputs]
    start = kept.data_ptr()
    pointers = [tensor.data_ptr() for tensor in (*inputs, *out)]
    bases = (ctypes.c_void_p * (len(pointers) + 1))(*pointers, start)
    loaded.convolution_run(chosen.steps, len(chosen.steps) // _STEP.size, bases, start + 4 * chosen.workspace, chosen.share, threads)
    return out
