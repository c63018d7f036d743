"""Launching attention's Triton kernels: a `Call` becomes pointers, sizes and features; the compile check lists what ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.configurations import tiling as tuned
from foveal.kernels.dense.call import Call
from foveal.kernels.dense.kernels import (
    RowGradients,
    Shared,
    Wanted,
    forward_kernel,
    key_gradients_kernel,
    prepare_kernel,
    query_gradients_kernel,
    shared_gradient_kernel,
)
from foveal.kernels.dense.logits import Features, Inputs, Matrix, Pairs, Sizes
from foveal.kernels.dense.philox import threshold
from foveal.kernels.dense.reference import entry_of_pair
from foveal.kernels.dense.tilings import STRIP, TILINGS, Tiling, shortened, tiling, window_tiling
from foveal.kernels.dense.windows import backward_windows_kernel, forward_windows_kernel
from foveal.kernels.dispatch import interpreting
from foveal.kernels.gpu import COMPILED_FOR, architecture, compiled_precision, precision, width

if TYPE_CHECKING:
    from foveal.kernels.testing.compile import CompileCase
    from foveal.kernels.tune import Tunable

#: Longest sequence of which several run in one program, how many, and the fewest (sequence, head) pairs for which that fills a GPU.
SHORT, WINDOWS, MANY = 64, 4, 1024
#: Numbers of a table's gradient, by row and entry, that are in memory at once.
TABLE_ROWS = 2**24

_DOT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


class _Launch:
    """What the launches of one call share."""

    def __init__(self, call: Call) -> None:
        self.call, self.device = call, call.q.device
        self.varlen = call.cu_queries is not None
        self.batch, self.heads, self.queries, self.keys = call.sequences, call.q.shape[1], call.longest_query, call.longest_key
        if not self.varlen:
            self.queries, self.keys = call.q.shape[2], call.k.shape[2]
        self.rows = (call.q.shape[0], self.heads, call.q.shape[2])
        self.features = self._features()
        self.inputs = self._inputs()
        self.sizes = Sizes(
            batches=self.batch,
            heads=self.heads,
            group=call.group,
            queries=self.queries,
            keys=self.keys,
            entries=0 if call.table is None else call.table.shape[3],
            left=call.left,
            right=call.right,
            scale=call.scale,
            softcap=call.softcap,
            threshold=threshold(call.dropout),
            growth=1 / (1 - call.dropout),
        )

    def _features(self) -> Features:
        call = self.call
        upcast = interpreting() and call.q.dtype == torch.bfloat16
        return Features(
            dim=call.q.shape[3],
            value_dim=call.v.shape[3],
            width=width(call.q.shape[3]),
            value_width=width(call.v.shape[3]),
            dot="fp32" if upcast else _DOT[call.q.dtype],
            precision=precision(),
            upcast=upcast,
            score=call.score,
            power=call.power,
            normalize=call.normalize,
            left=call.left >= 0,
            right=call.right >= 0,
            softcap=call.softcap > 0,
            gate=0 if call.gate is None else 1 if call.gate.shape[3] == 1 else 2,
            dropout=call.dropout > 0,
            varlen=self.varlen,
            **{name: getattr(call, name) is not None for name in ("bias", "mask", "score_bias", "temperature", "sinks", "alibi", "table")},
        )

    def _inputs(self) -> Inputs:
        call = self.call
        full = (self.batch, self.heads, self.queries, self.keys)
        mask = None if call.mask is None else call.mask.view(torch.uint8)
        pairs = [Pairs(None) if t is None else Pairs(t, *t.expand(full).stride()) for t in (call.bias, mask)]
        planes = {name: self._expanded(getattr(call, name), (self.batch, self.heads)) for name in ("score_bias", "sinks", "alibi")}
        gate = call.gate if call.gate is None or call.gate.stride(3) == 1 or call.gate.shape[3] == 1 else call.gate.contiguous()
        table = call.table if call.table is None or call.table.stride(3) == 1 else call.table.contiguous()
        return Inputs(
            q=self.matrix(call.q), k=self.matrix(call.k), v=self.matrix(call.v), bias=pairs[0], mask=pairs[1],
            temperature=self._expanded(call.temperature, self.rows), gate=self._expanded(gate, self.rows), table=self._expanded(table, self.rows),
            query_code=call.query_code, key_code=call.key_code, seed=call.seed, cu_queries=call.cu_queries, cu_keys=call.cu_keys, **planes,
        )  # fmt: skip

    def matrix(self, tensor: Tensor | None) -> Matrix:
        """(batch, heads, rows, ...) as the kernels take it; sequences are found by their rows, not by a batch stride."""
        if tensor is None:
            return Matrix(None)
        strides = tensor.stride()
        return Matrix(tensor, 0 if self.varlen else strides[0], strides[1], strides[2])

    def _expanded(self, tensor: Tensor | None, dims: tuple[int, ...]) -> Matrix:
        if tensor is None:
            return Matrix(None)
        strides = tensor.expand(*dims, *tensor.shape[len(dims) :]).stride()
        return Matrix(tensor, 0 if self.varlen else strides[0], strides[1], strides[2] if len(dims) == 3 else 0)

    def by_row(self, *columns: int) -> Tensor:
        """An uninitialised float32 array by batch, head and query, contiguous."""
        return torch.empty(*self.rows, *columns, dtype=torch.float32, device=self.device)

    def tiling(self, kernel: str) -> Tiling:
        """Tile sizes of one kernel for this call."""
        wider = max(self.features.width, self.features.value_width)
        modified = self.features.modified
        shipped = tiling(kernel, architecture(self.device), self.call.q.element_size(), wider, modified=modified)
        chosen = tuned("dense", f"{kernel}_modified" if modified else kernel, self.call.q, wider, asdict(shipped))
        split = bool(chosen.pop("split"))
        return shortened(Tiling(**chosen, split=split), self.queries, self.keys)

    def window_tiling(self, *, backward: bool) -> Tiling:
        """Tile sizes of the kernels of many windows."""
        return window_tiling(self.queries, self.keys, self.call.q.element_size(), architecture(self.device), backward=backward)

    @property
    def windows(self) -> bool:
        """Whether the call is many short sequences, several of which one program takes."""
        short = max(self.queries, self.keys) <= SHORT and max(self.features.width, self.features.value_width) <= SHORT
        return short and self.batch * self.heads >= MANY and not self.varlen

    @property
    def window_programs(self) -> int:
        """Programs of the kernels of many windows."""
        return triton.cdiv(self.batch, WINDOWS) * self.heads

    def run(self, kernel: Any, programs: int, tiles: Tiling, **own: Any) -> None:
        """Launch a kernel with what all share and its own arguments."""
        shared = {"x": self.inputs, "n": self.sizes, "F": self.features, "QUERIES": tiles.queries, "KEYS": tiles.keys}
        everything = {**shared, "DOT": _DTYPES[self.features.dot], **own}
        chosen = {name: everything[name] for name in kernel.arg_names}
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):  # -1: no device to switch to
            kernel[(programs,)](**chosen, num_warps=tiles.warps, num_stages=tiles.stages)


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse`."""
    if out.numel() == 0:
        return
    launch = _Launch(call)
    if launch.windows:
        tiles = launch.window_tiling(backward=False)
        results = {"out": launch.matrix(out), "lse": launch.matrix(lse)}
        launch.run(forward_windows_kernel, launch.window_programs, tiles, **results, WINDOWS=WINDOWS)
        return
    tiles = launch.tiling("forward")
    programs = triton.cdiv(launch.queries, tiles.queries) * launch.batch * launch.heads
    launch.run(forward_kernel, programs, tiles, out=launch.matrix(out), lse=launch.matrix(lse))


def backward(call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, gradients: dict[str, Tensor]) -> None:
    """Fill `gradients`: of q, k and v, and of the optional inputs that it names."""
    for gradient in gradients.values():
        if call.q.numel() == 0 or call.k.numel() == 0:
            gradient.zero_()
    if call.q.numel() == 0:
        return
    launch = _Launch(call)
    delta, dout = _prepare(launch, dout, dlse, out, gradients)
    if call.sinks is not None and "sinks" in gradients:
        share = torch.exp(call.sinks[..., None] - lse)
        gradients["sinks"].copy_(-(share * delta).sum(-1).sum_to_size(call.sinks.shape))
    if call.k.numel() == 0:
        return
    shared = {"dout": launch.matrix(dout), "lse": launch.matrix(lse), "delta": launch.matrix(delta)}
    if launch.windows and call.group == 1 and _windows_give(gradients):
        _window_gradients(launch, shared, gradients)
        return

    tiles = launch.tiling("key_gradients")
    programs = triton.cdiv(launch.keys, tiles.keys) * launch.batch * (launch.heads // call.group)
    wanted = {"dk": launch.matrix(gradients["k"]), "dv": launch.matrix(gradients["v"])}
    for want_k, want_v in ((True, False), (False, True)) if tiles.split else ((True, True),):
        launch.run(key_gradients_kernel, programs, tiles, **shared, **wanted, WANT_K=want_k, WANT_V=want_v)

    _query_gradients(launch, shared, gradients)
    if "bias" in gradients and gradients["bias"].shape != (launch.batch, launch.heads, launch.queries, launch.keys):
        _shared_bias_gradient(launch, shared, gradients["bias"])
    if "table" in gradients and gradients["table"].shape[2] == 1 and not launch.varlen:
        _shared_table_gradient(launch, shared, gradients["table"])


def _windows_give(gradients: dict[str, Tensor]) -> bool:
    """Whether the kernel of many windows has all of these gradients: a bias's or table's must be shared by the windows."""
    if any(name in gradients for name in ("temperature", "score_bias", "alibi")):
        return False
    shared = [gradients[name] for name in ("bias", "table") if name in gradients]
    return all(gradient.shape[0] == 1 for gradient in shared) and ("table" not in gradients or gradients["table"].shape[2] == 1)


def window_launches(tiles: Tiling, *, shared: bool) -> list[tuple[Tiling, dict[str, bool]]]:
    """The launches of `backward_windows_kernel` that give all gradients: their tiles, and what each is to give."""
    if not tiles.split:
        return [(tiles, {"WANT_Q": True, "WANT_K": True, "WANT_V": True, "WANT_SHARED": shared})]
    by_row = {"WANT_Q": True, "WANT_K": False, "WANT_V": False, "WANT_SHARED": shared}
    by_column = {"WANT_Q": False, "WANT_K": True, "WANT_V": True, "WANT_SHARED": False}
    return [(replace(tiles, queries=STRIP), by_row), (replace(tiles, keys=STRIP), by_column)]


def _window_gradients(launch: _Launch, shared: dict[str, Matrix], gradients: dict[str, Tensor]) -> None:
    call = launch.call
    parts = None
    if "bias" in gradients or "table" in gradients:
        parts = torch.empty(launch.window_programs, launch.queries, launch.keys, dtype=torch.float32, device=launch.device)
    own = {f"d{name}": launch.matrix(gradients[name]) for name in ("q", "k", "v")}
    for tiles, wanted in window_launches(launch.window_tiling(backward=True), shared=parts is not None):
        programs = launch.window_programs * triton.cdiv(launch.queries, tiles.queries) * triton.cdiv(launch.keys, tiles.keys)
        launch.run(backward_windows_kernel, programs, tiles, **shared, **own, parts=parts, WINDOWS=WINDOWS, **wanted)
    if parts is None:
        return
    summed = parts.unflatten(0, (-1, launch.heads)).sum(0)  # (heads, query, key)
    if "bias" in gradients and call.bias is not None:
        dbias = summed[None].sum_to_size(gradients["bias"].shape)
        gradients["bias"].copy_(dbias.masked_fill(call.bias == float("inf"), 0.0))
    if "table" in gradients and call.query_code is not None and call.key_code is not None:
        entries = gradients["table"].shape[3]
        entry = entry_of_pair(call.query_code, call.key_code, entries).flatten()
        by_entry = torch.zeros(entries, launch.heads, dtype=torch.float32, device=launch.device)
        by_entry.index_put_((entry,), summed.flatten(1).T, accumulate=True)  # sorts: the same bits each time
        gradients["table"].copy_(by_entry.T[None, :, None].sum_to_size(gradients["table"].shape))


def _prepare(launch: _Launch, dout: Tensor, dlse: Tensor | None, out: Tensor, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Delta, and the output's gradient before the gate; the gate's own gradient is written."""
    gate = launch.call.gate
    delta = launch.by_row()
    opened = dout if gate is None else torch.empty_like(dout, memory_format=torch.contiguous_format)
    dgate = None if gate is None or "gate" not in gradients else launch.by_row(gate.shape[3])
    tiles = Tiling(min(64, width(launch.queries)), 16, 4, 1)
    programs = triton.cdiv(launch.queries, tiles.queries) * launch.batch * launch.heads
    launch.run(
        prepare_kernel, programs, tiles, out=launch.matrix(out), dout=launch.matrix(dout), dlse=launch.matrix(dlse), delta=launch.matrix(delta),
        opened=launch.matrix(opened), dgate=launch.matrix(dgate), HAS_DLSE=dlse is not None, WANT_GATE=dgate is not None,
    )  # fmt: skip
    if gate is not None and dgate is not None:
        gradients["gate"].copy_(dgate.sum_to_size(gate.shape))
    return delta, opened


def _query_gradients(launch: _Launch, shared: dict[str, Matrix], gradients: dict[str, Tensor]) -> None:
    """Gradients of the queries, and of the inputs that are given by query; those of a head are summed over their rows."""
    call = launch.call
    dbias = gradients.get("bias")
    if dbias is not None and dbias.shape != (launch.batch, launch.heads, launch.queries, launch.keys):
        dbias = None
    windowed = call.left >= 0 or call.right >= 0
    if dbias is not None and windowed:
        dbias.zero_()  # tiles outside the window are not visited
    found = {name: launch.by_row() for name in ("temperature", "score_bias", "alibi") if name in gradients}
    dtable = None
    # Sequences of different lengths align their keys differently: no tile of pairs has the same entries in all of them.
    if call.table is not None and "table" in gradients and (call.table.shape[2] > 1 or launch.varlen):
        dtable = launch.by_row(call.table.shape[3]).zero_()  # entries that no pair has
    tiles = launch.tiling("query_gradients")
    programs = triton.cdiv(launch.queries, tiles.queries) * launch.batch * launch.heads
    rows = {name: launch.matrix(found.get(name)) for name in ("temperature", "score_bias", "alibi")}
    wanted = Wanted(bias=dbias is not None, table=dtable is not None, **{name: name in found for name in rows})
    launch.run(
        query_gradients_kernel, programs, tiles, **shared, dq=launch.matrix(gradients["q"]),
        rows=RowGradients(bias=dbias, table=launch.matrix(dtable), **rows), W=wanted,
    )  # fmt: skip
    for name, by_row in found.items():
        gradients[name].copy_((by_row if name == "temperature" else by_row.sum(-1)).sum_to_size(gradients[name].shape))
    if dtable is not None:
        gradients["table"].copy_(dtable.sum_to_size(gradients["table"].shape))


def _shared_bias_gradient(launch: _Launch, shared: dict[str, Matrix], dbias: Tensor) -> None:
    tiles = launch.tiling("shared_gradient")
    which = Shared(batches=dbias.shape[0] == 1, heads=dbias.shape[1] == 1, queries=dbias.shape[2] == 1, keys=dbias.shape[3] == 1)
    query_tiles = 1 if which.queries else triton.cdiv(launch.queries, tiles.queries)
    key_tiles = 1 if which.keys else triton.cdiv(launch.keys, tiles.keys)
    programs = query_tiles * key_tiles * dbias.shape[0] * dbias.shape[1]
    target = Matrix(dbias, dbias.shape[2] * dbias.shape[3])
    own = {"target": target, "ends": None, "planes": dbias.shape[1], "begin_row": 0, "end_row": launch.queries}
    launch.run(shared_gradient_kernel, programs, tiles, **shared, **own, S=which)


def _shared_table_gradient(launch: _Launch, shared: dict[str, Matrix], dtable: Tensor) -> None:
    """A table's gradient by row and entry, as many rows at a time as `TABLE_ROWS` allows, summed over the rows."""
    tiles = launch.tiling("shared_gradient")
    planes, entries = dtable.shape[0] * dtable.shape[1], dtable.shape[3]
    which = Shared(batches=dtable.shape[0] == 1, heads=dtable.shape[1] == 1, table=True)
    step = max(tiles.queries, TABLE_ROWS // (planes * entries) // tiles.queries * tiles.queries)
    key_tiles = triton.cdiv(launch.keys, tiles.keys)
    summed = torch.zeros(planes, entries, dtype=torch.float32, device=launch.device)
    for begin in range(0, launch.queries, step):
        end = min(begin + step, launch.queries)
        by_entry = torch.zeros(planes, end - begin, entries, dtype=torch.float32, device=launch.device)
        ends = torch.empty(planes, key_tiles, 2, end - begin, dtype=torch.float32, device=launch.device)
        own = {"target": Matrix(by_entry, (end - begin) * entries, 0, entries), "ends": ends, "planes": dtable.shape[1], "begin_row": begin}
        programs = triton.cdiv(end - begin, tiles.queries) * key_tiles * planes
        launch.run(shared_gradient_kernel, programs, tiles, **shared, **own, end_row=end, S=which)
        summed += by_entry.sum(1)
        at_ends = ends.sum((1, 3))
        summed[:, 0] += at_ends[:, 0]
        if entries > 1:
            summed[:, -1] += at_ends[:, 1]
    dtable.copy_(summed.view_as(dtable))


# --- the compile check ---------------------------------------------------------------------------------------------------------------

#: Head dimension, dtype and variant of what is compiled: each entry of the table, plain and modified, and each option's code at least once.
_COMPILED_2_BYTES = [
    (64, "fp16", "plain"),
    (64, "fp16", "all"),
    (64, "bf16", "curved"),
    (64, "bf16", "positions"),
    (64, "bf16", "dropout"),
    (64, "bf16", "varlen"),
    (128, "fp16", "plain"),
    (128, "bf16", "all"),
    (256, "bf16", "plain"),
    (256, "fp16", "all"),
]
_COMPILED_4_BYTES = [(64, "fp32", "all"), (128, "fp32", "all"), (256, "fp32", "all")]
#: Options whose code takes no tiling of its own: once for each kind of matrix unit is enough, in the two kernels that have all of it between them.
_COMPILED_ONCE = ("curved", "dropout", "varlen")
_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"bias": True, "mask": True, "left": True, "right": True},
    "curved": {"score": "softplus", "score_bias": True, "right": True},
    "positions": {"table": True, "alibi": True, "softcap": True, "temperature": True, "sinks": True, "gate": 2},
    "dropout": {"dropout": True, "gate": 1},
    "varlen": {"varlen": True, "right": True},
}
_KERNELS = {
    "forward": forward_kernel,
    "key_gradients": key_gradients_kernel,
    "query_gradients": query_gradients_kernel,
    "shared_gradient": shared_gradient_kernel,
}


class _Part(NamedTuple):
    """One launch of a kernel: what its name ends in, the kernel, and its own arguments, types and constants alike."""

    suffix: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]


def compile_cases() -> list[CompileCase]:
    """Every tiling of the table in both half precisions or float32, with the options that change the code."""
    from foveal.kernels.testing.compile import CompileCase

    cases = []
    for name, arch, itemsize in TILINGS:
        for dim, dtype, variant in _COMPILED_4_BYTES if itemsize == 4 else _COMPILED_2_BYTES:
            once = ("sm_90", "gfx942") if name in ("forward", "key_gradients") else ()
            targets = tuple(target for target in COMPILED_FOR[arch] if variant not in _COMPILED_ONCE or target in once)
            if not targets:
                continue
            features = Features(dim, dim, width(dim), width(dim), dot=dtype, precision=compiled_precision(arch), **_VARIANTS[variant])
            tiles = tiling(name, arch, itemsize, features.width, modified=features.modified)
            shared = {"F": features, "QUERIES": tiles.queries, "KEYS": tiles.keys, "DOT": _DTYPES[dtype]}
            for part in _parts(name, tiles, variant, dtype):
                arguments = part.kernel.arg_names
                types = {"x": _input_types(features, dtype), "n": _SIZE_TYPES, **_matrix_types(dtype), **part.types}
                constants = {key: value for key, value in {**shared, **part.constants}.items() if key in arguments}
                signature = {key: value for key, value in types.items() if key in arguments and key not in constants}
                cases.append(
                    CompileCase(
                        name=f"{name}{part.suffix}-{arch}-d{dim}-{dtype}-{variant}",
                        kernel=part.kernel,
                        signature=signature,
                        constants=constants,
                        num_warps=tiles.warps,
                        num_stages=tiles.stages,
                        divisible=[*_aligned("", signature)],
                        matrix=itemsize == 2 and part.kernel is not prepare_kernel,
                        targets=targets,
                        quick=(dim, dtype, variant) == (64, "fp16", "all") or (name, variant) == ("shared_gradient", "positions"),
                    )
                )
    return cases + _window_cases()


def _window_cases() -> list[CompileCase]:
    """The kernels of many windows, with Swin's table and with all that may change a logit."""
    from foveal.kernels.testing.compile import TARGETS, CompileCase

    cases = []
    for variant, options in (("swin", {"table": True, "mask": True}), ("positions", _VARIANTS["positions"]), ("plain", {})):
        for dtype, arch in (("bf16", "nvidia"), ("bf16", "cdna"), ("fp32", "nvidia"))[: 3 if variant == "swin" else 2]:
            features = Features(32, 32, 32, 32, dot=dtype, precision=compiled_precision(arch), **options)
            tilings = {backward: window_tiling(49, 49, 4 if dtype == "fp32" else 2, arch, backward=backward) for backward in (False, True)}
            launches: list[tuple[str, Any, Tiling, dict[str, Any]]] = [("forward", forward_windows_kernel, tilings[False], {})]
            for tiles, wanted in window_launches(tilings[True], shared=variant != "plain"):
                name = "backward" if not tiles.split else "backward-rows" if wanted["WANT_Q"] else "backward-columns"
                launches.append((name, backward_windows_kernel, tiles, {**wanted, **({} if wanted["WANT_SHARED"] else {"parts": None})}))
            for name, kernel, tiles, own in launches:
                constants = {"F": features, "QUERIES": tiles.queries, "KEYS": tiles.keys, "DOT": _DTYPES[dtype], "WINDOWS": WINDOWS, **own}
                constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
                types = {
                    "x": _input_types(features, dtype),
                    "n": _SIZE_TYPES,
                    **_matrix_types(dtype),
                    "dv": _matrix_types(dtype)["dk"],
                    "parts": "*fp32",
                }
                signature = {key: value for key, value in types.items() if key in kernel.arg_names and key not in constants}
                cases.append(
                    CompileCase(
                        name=f"windows-{name}-{arch}-d32-{dtype}-{variant}",
                        kernel=kernel,
                        signature=signature,
                        constants=constants,
                        num_warps=tiles.warps,
                        num_stages=tiles.stages,
                        divisible=_aligned("", signature),
                        matrix=dtype == "bf16",
                        targets=tuple(name for name in TARGETS if (name == "gfx942") == (arch == "cdna")),
                        quick=variant == "swin" and dtype == "bf16",
                    )
                )
    return cases


def _parts(name: str, tiles: Tiling, variant: str, dtype: str) -> list[_Part]:
    kernel = _KERNELS[name]
    if name == "forward":
        return [_Part("", kernel, {}, {})]
    if name == "key_gradients":
        parts = {"-k": (True, False), "-v": (False, True)} if tiles.split else {"": (True, True)}
        return [_Part(suffix, kernel, {}, {"WANT_K": k, "WANT_V": v}) for suffix, (k, v) in parts.items()]
    nothing = dict.fromkeys(("temperature", "score_bias", "alibi", "table"), _OFF)
    if name == "shared_gradient":
        sums = {"ends": "*fp32", "planes": "i32", "begin_row": "i32", "end_row": "i32"}
        if variant == "all":
            return [_Part("", kernel, sums, {"S": Shared(batches=True, heads=False), "ends": None})]
        return [_Part("", kernel, sums, {"S": Shared(batches=True, heads=False, table=True)})] if variant == "positions" else []
    if variant == "all":
        return [_Part("-bias", kernel, {"rows": RowGradients(bias="*fp32", **nothing)}, {"W": Wanted(bias=True)})]
    if variant == "positions":
        rows = RowGradients(bias="constexpr", temperature=_WIDE, score_bias=_OFF, alibi=_WIDE, table=_WIDE)
        by_row = _Part("-rows", kernel, {"rows": rows}, {"W": Wanted(temperature=True, alibi=True, table=True)})
        prepare = _Part("-prepare", prepare_kernel, {"dgate": _WIDE}, {"HAS_DLSE": True, "WANT_GATE": True})
        return [by_row, prepare]
    return [_Part("", kernel, {"rows": RowGradients(bias="constexpr", **nothing)}, {"W": Wanted()})]


_WIDE = Matrix("*fp32", "i32", "i32", "i32")
_OFF = Matrix("constexpr", "i32", "i32", "i32")
_SIZE_TYPES = Sizes(*("i32 " * 8 + "fp32 fp32 i64 fp32").split())


def _matrix_types(dtype: str) -> dict[str, Matrix]:
    like = Matrix(f"*{dtype}", "i32", "i32", "i32")
    return {**dict.fromkeys(("out", "dout", "opened", "dq", "dk", "dv"), like), **dict.fromkeys(("lse", "dlse", "delta", "target"), _WIDE)}


def _input_types(features: Features, dtype: str) -> Inputs:
    like = Matrix(f"*{dtype}", "i32", "i32", "i32")
    wide = {name: _WIDE if getattr(features, name) else _OFF for name in ("score_bias", "temperature", "sinks", "alibi", "table")}
    codes, sequences = ("*i32" if on else "constexpr" for on in (features.table, features.varlen))
    return Inputs(
        q=like, k=like, v=like, gate=like if features.gate else _OFF, query_code=codes, key_code=codes, cu_queries=sequences, cu_keys=sequences,
        bias=Pairs("*fp32" if features.bias else "constexpr", *["i32"] * 4), mask=Pairs("*u8" if features.mask else "constexpr", *["i32"] * 4),
        seed="*i64" if features.dropout else "constexpr", **wide,
    )  # fmt: skip


def _aligned(prefix: str, types: Any) -> list[str]:
    """Names of the strides that are multiples of 16 where the head dimension is."""
    found = []
    for name, kind in types.items() if isinstance(types, dict) else zip(types._fields, types, strict=True):
        if not isinstance(kind, str):
            found += _aligned(f"{prefix}{name}.", kind)
        elif kind == "i32" and name in ("batch", "head", "row", "query"):
            found.append(f"{prefix}{name}")
    return found


# --- tuning ----------------------------------------------------------------------------------------------------------------------------

#: (queries, keys, warps, stages) of the tiles that `tune` tries, by kernel; `key_gradients` in one launch or in two.
_TRIED = {
    "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 64, 8, 1)),
    "key_gradients": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2), (32, 128, 8, 1)),
    "query_gradients": ((64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1), (128, 32, 8, 1)),
    "shared_gradient": ((32, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 2), (64, 64, 8, 1), (32, 32, 4, 2)),
}


def tunables(*, toy: bool = False) -> list[Tunable]:
    """The kernels that walk, by head dim, as they are and with a bias that gets a gradient (`_modified`)."""
    from foveal.kernels.tune import Tunable

    batch, heads, length = (1, 2, 70) if toy else (8, 16, 1024)
    found = []
    for modified in (False, True):
        for dim in (16,) if toy else (64, 128):

            def inputs(device: torch.device, dim: int = dim, modified: bool = modified) -> list[Tensor]:
                draw = torch.Generator().manual_seed(0)
                dtype = torch.float32 if toy else torch.bfloat16
                tensors = [torch.randn(batch, heads, length, dim, generator=draw).to(dtype) for _ in range(3)]
                if modified:
                    tensors.append(torch.randn(1, heads, length, length, generator=draw))
                return [tensor.to(device).requires_grad_() for tensor in tensors]

            for kernel, sizes in _TRIED.items():
                if kernel == "shared_gradient" and not modified:
                    continue
                tilings: list[dict[str, int]] = [
                    {"queries": rows, "keys": columns, "warps": warps, "stages": stages, **({"split": split} if kernel == "key_gradients" else {})}
                    for rows, columns, warps, stages in (sizes[1:3] if toy else sizes)
                    for split in ((0, 1) if kernel == "key_gradients" else (0,))
                ]
                name = f"{kernel}_modified" if modified else kernel
                found.append(Tunable("dense", name, torch.float32 if toy else torch.bfloat16, width(dim), tilings, inputs, _run_sample))
    return found


def _run_sample(tensors: Sequence[Tensor], backend: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    from foveal.kernels.dense.op import attention

    q, k, v, *bias = tensors
    out = attention(q, k, v, bias=bias[0] if bias else None, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out], torch.autograd.grad(out, list(tensors), weights)
