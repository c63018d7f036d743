"""What do the kernels do on a GPU: are their numbers right, how fast are they beside what people use, how far from the device's ceilings?

python benchmarks/gpu.py [--part ceilings tests numbers speed] [--only NAME ...] [--seconds 480] writes benchmarks/results/gpu.json.
Run in pieces, each piece replaces its own part of the file. `--part tilings` tries every candidate of `python -m foveal.kernels tune` as well.
`--toy` runs all of it without a GPU, in triton's interpreter at toy sizes: that the script works, and that the numbers are right there.

Parts: `ceilings`, a matrix product and a copy, which the rates are held against; `tests`, those marked gpu; `numbers`, every operator's Triton
kernels forward and backward against float64 by the error rule of foveal.kernels.testing, and twice for the same bits; `speed`, the comparisons
of <family>/bench_gpu.py, with the peers that are installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
PARTS = ("ceilings", "tests", "numbers", "speed", "tilings")
_BY_DEFAULT = PARTS[:4]


class Clock:
    """How long the run may take: what does not fit is named, not run."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, name: str) -> bool:
        if time.monotonic() < self.end:
            return True
        self.left_out.append(name)
        return False


def device_facts(device: torch.device) -> dict[str, Any]:
    """Whose figures these are."""
    from foveal.kernels.bench import machine
    from foveal.kernels.configurations import triton_version

    facts: dict[str, Any] = {**machine(), "triton": triton_version(), "device": "triton's interpreter" if device.type == "cpu" else None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = None
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = (subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines() or [None])[0]
        facts |= {
            "device": properties.name,
            "memory_gigabytes": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "driver": driver,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return facts


# --- ceilings ------------------------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device) -> dict[str, Any]:
    """The fastest matrix product and copy of a few calls of torch, in TFLOP/s and GB/s."""
    from foveal.kernels.bench import gpu_seconds, size

    def seconds(call: Callable[[], Any]) -> float:
        call()
        if device.type == "cuda":
            return min(gpu_seconds(call) for _ in range(5))
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    side, words = size(8192, 64), size(2**29, 2**16)
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[f"product_{str(dtype).removeprefix('torch.')}_tflops"] = round(2.0 * side**3 / seconds(lambda a=a, b=b: a @ b) / 1e12, 3)  # type: ignore[misc]
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    found["copy_gbps"] = round(2.0 * 4 * words / seconds(lambda: target.copy_(source)) / 1e9, 3)
    for name, value in found.items():
        print(f"  {name:30s} {value:10.1f}")
    return found


# --- tests ---------------------------------------------------------------------------------------------------------------------------


def tests(device: torch.device) -> dict[str, Any]:
    """The tests marked gpu, in a process of their own."""
    if device.type == "cpu":
        print("  not run: tests marked gpu need a GPU")
        return {"ran": False, "reason": "no GPU"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--no-header", "-m", "gpu", "tests/kernels/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
    print("  " + summary, *failed, sep="\n    ")
    return {"ran": True, "ok": done.returncode == 0, "summary": summary, "failed": failed}


# --- numbers -------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator: float32 tensors, of which `narrow` take the dtype under test, and the call that gives results."""

    operator: str
    name: str
    tensors: dict[str, Tensor]
    call: Callable[[dict[str, Tensor], str], Sequence[Tensor]]
    narrow: tuple[str, ...] = ("q", "k", "v")


def cases(device: torch.device) -> Iterator[Case]:
    """At least one call of every operator that has Triton kernels; on a GPU every width that the tables of tilings know."""
    import foveal.kernels as fk
    from foveal.kernels.bench import size

    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    def qkv(*shape: int) -> dict[str, Tensor]:
        return {name: normal(*shape) for name in "qkv"}

    def on(value: Tensor) -> Tensor:
        return value.to(device)

    widths = (64, 100, 128, 256) if device.type == "cuda" else (16,)
    length, heads = size(300, 40), size(3, 1)
    for dim in widths:
        given = qkv(2, heads, length, dim)
        yield Case("attention", f"plain d{dim}", given, lambda t, b: fk.attention(**t, return_lse=True, backend=b))
        bias = {**given, "bias": normal(1, heads, length, length)}
        yield Case("attention", f"causal bias d{dim}", bias, lambda t, b: fk.attention(**t, causal=True, backend=b))
        grid = size(16, 6)
        table = {**qkv(2, heads, grid, grid, dim), "rpb": normal(heads, 9, 9)}
        yield Case("neighborhood_attention_2d", f"table d{dim}", table, lambda t, b: [fk.neighborhood_attention_2d(kernel_size=5, **t, backend=b)])
        blocks = fk.BlockIndex.from_topk(uniform(1, 1, -(-length // 64), -(-length // 64)), 2, length, length).to(device)
        yield Case("block_sparse_attention", f"d{dim}", given, lambda t, b, i=blocks: [fk.block_sparse_attention(**t, block_index=i, backend=b)])  # type: ignore[misc]
        cache = {"q": normal(2, 4 * heads, 1, dim), "k": normal(2, heads, length, dim), "v": normal(2, heads, length, dim)}
        yield Case("decode_attention", f"d{dim}", cache, lambda t, b: [fk.decode_attention(t["q"], t["k"], t["v"], backend=b)])
    windows = {**qkv(size(512, 2), size(4, 1), 49, 32), "table": normal(size(4, 1), 13, 13)}
    yield Case("attention", "many windows", windows, _windows)
    sigmoid = qkv(1, heads, length, 32)
    yield Case("attention", "sigmoid", sigmoid, lambda t, b: [fk.attention(**t, score="sigmoid", score_bias=-3.0, backend=b)])
    bounds = on(torch.tensor([0, length // 3, length], dtype=torch.int32))
    packed = {name: normal(length, heads, 32) for name in "qkv"}
    yield Case("attention_varlen", "two sequences", packed, lambda t, b: [fk.attention_varlen(**_bounded(t, bounds, length), backend=b)])
    for decay, shape in (("none", None), ("token", (1, heads, length)), ("channel", (1, heads, length, 32))):
        given = {**qkv(1, heads, length, 32), **({} if shape is None else {"decay": -0.1 * uniform(*shape)})}
        yield Case("linear_attention", f"decay {decay}", given, lambda t, b: fk.linear_attention(**t, output_final_state=True, backend=b))
    unit = torch.nn.functional.normalize(normal(1, heads, length, 64), dim=-1)
    recurrent = {**qkv(1, heads, length, 64), "k": unit, "beta": uniform(1, heads, length)}
    gated = {**recurrent, "g": -0.1 * uniform(1, heads, length)}
    yield Case("gated_delta_rule", "d64", gated, lambda t, b: fk.gated_delta_rule(**t, output_final_state=True, backend=b))
    rates = {"theta": uniform(1, heads, length), "alpha": 0.1 * uniform(1, heads, length), "eta": 0.9 * uniform(1, heads, length)}
    memory = {name: t for name, t in recurrent.items() if name != "beta"} | rates
    yield Case("titans", "d64", memory, lambda t, b: [fk.titans(**t, backend=b)])
    rows = (size(2, 1), size(16, 2), size(300, 20))
    scan = {"u": normal(*rows), "delta": normal(*rows), "A": -normal(rows[1], 16).exp()}
    scan |= {name: normal(rows[0], 16, rows[2]) for name in ("B", "C")}
    yield Case("selective_scan", "n16", scan, lambda t, b: [fk.selective_scan(**t, delta_softplus=True, backend=b)], ("u", "delta", "B", "C"))
    nodes, edges = size(400, 10), size(5000, 30)
    index = on(torch.randint(nodes, (2, edges), generator=draw))
    graph = {**qkv(nodes, size(8, 2), 16), "edge_bias": normal(edges, size(8, 2))}
    yield Case("segment_attention", "edge bias", graph, lambda t, b: [fk.segment_attention(**t, edges=index, backend=b)])
    fitted = {**qkv(1, heads, size(100, 20), 32), "ridge": 1 + uniform(heads)}
    yield Case("local_linear_attention", "d32", fitted, lambda t, b: [fk.local_linear_attention(**t, backend=b, **_solved(b))])
    triples = {name: normal(1, heads, size(40, 6), 32) for name in ("q", "k1", "k2", "v1", "v2")}
    yield Case("kronecker_attention", "d32", triples, lambda t, b: fk.kronecker_attention(**t, return_lse=True, backend=b), tuple(triples))
    narrow = qkv(size(64, 2), size(8, 1), 20, 8)
    yield Case("efficient_attention", "d8", narrow, lambda t, b: [fk.efficient_attention(**t, backend=b)])
    yield Case("rotary", "d64", {"q": normal(1, 2, length, 64), "k": normal(1, 2, length, 64)}, lambda t, b: fk.rotary(**t, backend=b), ("q", "k"))
    search = {"x": normal(size(3000, 40), 32), "codebook": normal(size(1000, 50), 32)}
    yield Case("nearest_code", "d32", search, lambda t, b: [fk.nearest_code(**t, return_distance=True, backend=b)[1]], ("x", "codebook"))


def _windows(tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    from foveal.kernels import RelativeBias, attention

    return [attention(tensors["q"], tensors["k"], tensors["v"], rel_bias=RelativeBias.grid(tensors["table"], 7, 7), backend=backend)]


def _bounded(tensors: dict[str, Tensor], bounds: Tensor, longest: int) -> dict[str, Any]:
    return {**tensors, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _solved(backend: str) -> dict[str, Any]:
    """Enough iterations that they are the direct solve, which the definition is."""
    return {} if backend == "reference" else {"cg_iters": 40, "tol": 1e-7}


def evaluate(case: Case, dtype: torch.dtype, device: torch.device, backend: str) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Results, gradients of their weighted sum, and the gradients' names."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {name: t.to(device, dtype if name in case.narrow else wide).requires_grad_() for name, t in case.tensors.items()}
    given = case.call(leaves, backend)
    results = [given] if isinstance(given, Tensor) else list(given)
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=draw).to(r) for r in results]
    if not any(r.requires_grad for r in results):
        return results, [], []
    asked = [(r, w) for r, w in zip(results, weights, strict=True) if r.requires_grad]
    gradients = torch.autograd.grad([r for r, _ in asked], list(leaves.values()), [w for _, w in asked], allow_unused=True)
    named = [(name, g) for name, g in zip(leaves, gradients, strict=True) if g is not None]
    return [r.detach() for r in results], [g for _, g in named], [f"d{name}" for name, _ in named]


def compare(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Largest relative error of the results and of the gradients beside eager torch's, the sentence of the rule that broke, and repeatability."""
    from foveal.kernels.testing.errors import BACKWARD, FORWARD, assert_close_to_definition, relative_error

    actual = evaluate(case, dtype, device, "triton")
    again = evaluate(case, dtype, device, "triton")
    eager, definition = evaluate(case, dtype, device, "reference"), evaluate(case, torch.float64, device, "reference")
    figures: dict[str, Any] = {"wrong": []}
    for part, (side, factor) in enumerate((("results", FORWARD), ("gradients", BACKWARD))):
        names = actual[2] if part else [f"result {i}" for i in range(len(actual[0]))]
        errors = []
        for name, found, plain, right in zip(names, actual[part], eager[part], definition[part], strict=True):
            errors.append((relative_error(found, right), relative_error(plain, right)))
            try:
                assert_close_to_definition(found, plain, right, factor=factor, name=name)
            except AssertionError as error:
                figures["wrong"].append(str(error))
        figures[side] = {"error": max((a for a, _ in errors), default=0.0), "eager": max((b for _, b in errors), default=0.0)}
    figures["repeatable"] = all(torch.equal(a, b) for part in (0, 1) for a, b in zip(actual[part], again[part], strict=True))
    return figures


def numbers(device: torch.device, only: Sequence[str], clock: Clock) -> dict[str, Any]:
    """Every case in every dtype."""
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    found: dict[str, Any] = {}
    for case in cases(device):
        for dtype in dtypes:
            key = f"{case.operator}, {case.name}, {str(dtype).removeprefix('torch.')}"
            if not _wanted(key, only) or not clock.allows(key):
                continue
            try:
                figures = compare(case, dtype, device)
            except Exception as error:  # one kernel that does not launch must not hide the others
                figures = {"wrong": [_first_line(error)]}
            figures["ok"] = not figures["wrong"] and figures.get("repeatable", False)
            found[key] = figures
            errors = "   ".join(
                f"{side} {figures[side]['error']:.1e} (eager {figures[side]['eager']:.1e})" for side in ("results", "gradients") if side in figures
            )
            print(f"  {key:62s} {errors}{'' if figures['ok'] else '   WRONG: ' + '; '.join(figures['wrong'] or ['two runs differ'])}", flush=True)
    return {"ok": all(figures["ok"] for figures in found.values()), "cases": found}


# --- speed ---------------------------------------------------------------------------------------------------------------------------


def speed(device: torch.device, only: Sequence[str], clock: Clock, rounds: int, limits: dict[str, Any]) -> dict[str, Any]:
    """The comparisons for GPUs; a contestant that fails is named and left out."""
    from foveal.kernels import bench

    bench.discover()
    found: dict[str, Any] = {}
    for question in bench.REGISTRY.values():
        if not question.make.__module__.endswith("bench_gpu") or not _wanted(question.name, only) or not clock.allows(question.name):
            continue
        failed: dict[str, str] = {}
        runners: dict[str, Callable[[], Any]] = {}
        try:
            with torch.device(device):
                contestants = question.make()
        except Exception as error:
            found[question.name] = {"ok": False, "failed": {"all": _first_line(error)}}
            print(f"  {question.name}: not made: {_first_line(error)}")
            continue
        for name, call in contestants.items():
            try:
                call()
                runners[name] = call
            except Exception as error:  # a peer built for another torch, or too little memory for its form
                failed[name] = _first_line(error)
        figures: dict[str, Any] = {"ok": question.ours in runners, "failed": failed}
        if question.ours in runners:
            baseline = question.baseline if question.baseline in runners else question.ours
            posed = dataclasses.replace(question, make=lambda runners=runners: runners, baseline=baseline)
            figures |= bench.measure(posed, rounds, time.perf_counter, device.type)
            figures["of_ceiling"] = of_ceiling(figures, limits, question.ours)
            bench.show(question.name, figures)
        for name, reason in failed.items():
            print(f"  {name:34s} failed: {reason}")
        if figures.get("of_ceiling") is not None:
            print(f"  {100 * figures['of_ceiling']:.0f} % of the measured ceiling", flush=True)
        found[question.name] = figures
        del contestants, runners
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"ok": all(figures["ok"] for figures in found.values()), "comparisons": found}


def of_ceiling(figures: dict[str, Any], limits: dict[str, Any], ours: str) -> float | None:
    """How near a comparison comes to what limits it: the matrix product where its operations were counted, else the copy."""
    for rate, limit in (("tflops", "product_bfloat16_tflops"), ("gbps", "copy_gbps")):
        if rate in figures and limits.get(limit):
            return round(figures[rate][ours] / limits[limit], 4)
    return None


# --- tilings -------------------------------------------------------------------------------------------------------------------------


def tilings(device: torch.device, only: Sequence[str], clock: Clock, rounds: int) -> dict[str, Any]:
    """Every candidate of every table: refused with a reason, or timed; nothing is written to the user's cache."""
    from foveal.kernels import tune

    found: dict[str, Any] = {}
    for family in tune.families():
        for tunable in tune.tunables(family, toy=device.type == "cpu"):
            key = f"{family}, {tunable.entry}"
            if not _wanted(key, only) or not clock.allows(key):
                continue
            outcome = tune.tune_one(tunable, device, rounds)
            found[key] = {"milliseconds": outcome.milliseconds, "refused": outcome.refused, "better": outcome.chosen}
            print(f"  {key:50s} {tune.label(outcome.chosen) if outcome.chosen else 'shipped stays'}; refused: {len(outcome.refused)}", flush=True)
    return {"ok": True, "entries": found}


# --- the command ---------------------------------------------------------------------------------------------------------------------


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(part in name for part in only)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a number is wrong, a test fails or one of our kernels does not run; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="the kernels on a GPU: numbers, speed, distance to the ceilings")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=_BY_DEFAULT)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="cases and comparisons whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=480, help="start nothing new after this long; what is left out is named")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="no GPU: triton's interpreter, toy sizes, figures that mean nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    asked = parser.parse_args(arguments)
    if asked.toy:
        os.environ |= {"TRITON_INTERPRET": "1", "FOVEAL_BENCH_TOY": "1"}
        from foveal.kernels.testing.interpreter import mend_range_over_tensor_bounds

        mend_range_over_tensor_bounds()
    elif not torch.cuda.is_available():
        print("torch can use no GPU here: run on one, or see that the script works with --toy", file=sys.stderr)
        return 2
    device = torch.device("cpu" if asked.toy else "cuda")
    clock = Clock(asked.seconds)
    report: dict[str, Any] = json.loads(asked.output.read_text(encoding="utf-8")) if asked.output.exists() else {}
    facts = device_facts(device)
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}")
    rounds = 1 if asked.toy else asked.rounds
    ok = True
    for part in (name for name in PARTS if name in asked.part):
        print(part, flush=True)
        start = time.monotonic()
        if part == "ceilings":
            found = ceilings(device)
        elif part == "tests":
            found = tests(device)
        elif part == "numbers":
            found = numbers(device, asked.only, clock)
        elif part == "speed":
            found = speed(device, asked.only, clock, rounds, report.get("ceilings", {}).get("figures", {}))
        else:
            found = tilings(device, asked.only, clock, rounds)
        ok &= found.get("ok", True)
        report[part] = {"on": facts, "seconds": round(time.monotonic() - start, 1), "figures": found}
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if clock.left_out:
        print(f"left out after {asked.seconds:.0f} s: {'; '.join(clock.left_out)}")
    print(f"written to {asked.output}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
