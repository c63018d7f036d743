"""Benchmarks as comparisons: contestants side by side in one process, interleaved, compared by ratio.

A comparison is a function decorated with `@comparison("name", baseline="...")` that returns a dict from contestant to a callable
without arguments (inputs made once, never zeros). Each family keeps its own in ``<family>/bench.py``; `discover` finds them.

One round runs each contestant once in turn, so that a change of the machine's load meets all of them; the figure is the median over
rounds, the ratio the median of the rounds' own ratios. Each comparison has a process of its own. Time is process CPU time by default:
other people's programs on the machine do not enter it. On a GPU it is the time between two events on its stream.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Contestants = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Comparison:
    """One question: which contestants, which of them is the baseline, and the ratio promised (baseline time over ours)."""

    name: str
    baseline: str
    ours: str
    promise: float | None
    rounds: int | None
    devices: tuple[str, ...]
    flops: float | None
    make: Callable[[], Contestants]
    traffic: float | None = None

    @property
    def family(self) -> str:
        """Folder of foveal.kernels that the comparison belongs to, or the name of its file."""
        parts = self.make.__module__.split(".")
        return parts[-2] if parts[-1].startswith("bench") and len(parts) > 1 else parts[-1]


REGISTRY: dict[str, Comparison] = {}

#: Arguments that a benchmark file took out of sys.argv for itself, to be given to the process of each comparison.
PASSED_ON: list[str] = []


def comparison(
    name: str,
    *,
    baseline: str,
    ours: str = "foveal",
    promise: float | None = None,
    rounds: int | None = None,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    flops: float | None = None,
    traffic: float | None = None,
) -> Callable[[Callable[[], Contestants]], Callable[[], Contestants]]:
    """Register the decorated function as a comparison.

    Args:
        name: what is compared, at which sizes.
        baseline: the contestant that the others are held against.
        ours: the contestant that the promise is about.
        promise: the least ratio that the project states for it, on a CPU.
        rounds: most rounds, for a baseline that takes minutes.
        devices: where it makes sense. The function is called under ``torch.device(...)``: tensors that it makes are on the device.
        flops: floating-point operations of one call, where the rate in TFLOP/s tells something.
        traffic: bytes that one call must read and write at least, where the rate in GB/s tells something.
    """

    def register(make: Callable[[], Contestants]) -> Callable[[], Contestants]:
        REGISTRY[name] = Comparison(name, baseline, ours, promise, rounds, devices, flops, make, traffic)
        return make

    return register


def discover() -> None:
    """Register the comparisons of every family: import each ``<family>/bench.py`` and ``<family>/bench_*.py`` of foveal.kernels."""
    for file in sorted(Path(__file__).parent.glob("*/bench*.py")):
        importlib.import_module(f"foveal.kernels.{file.parent.name}.{file.stem}")


def size(real: int, toy: int) -> int:
    """A length of a comparison for GPUs: `toy` where ``FOVEAL_BENCH_TOY=1`` asks for sizes that triton's interpreter can walk through."""
    return toy if os.environ.get("FOVEAL_BENCH_TOY", "0") == "1" else real


def installed(package: str) -> bool:
    """Whether `package` could be imported: a peer that is not there is left out of its comparison."""
    return importlib.util.find_spec(package) is not None


def peer(module: str) -> Any:
    """The module of somebody else's package, or None where it is not installed or does not load (a build for another torch)."""
    if not installed(module.partition(".")[0]):
        return None
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"{module} is left out: {error}", file=sys.stderr)
        return None


def forward_and_backward(operator: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], None]:
    """A contestant that runs the operator and the gradients of its sum with fixed random weights."""
    weights = torch.randn_like(operator().detach())

    def call() -> None:
        torch.autograd.grad(operator(), leaves, weights)

    return call


def _commit() -> str:
    """The checkout's commit; "unknown" where this file is not under version control (an installed package)."""
    here = Path(__file__)

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True)

    try:
        tracked = git("ls-files", "--error-unmatch", here.name).returncode == 0
        return git("describe", "--always", "--dirty", "--abbrev=12").stdout.strip() if tracked else "unknown"
    except OSError:  # no git
        return "unknown"


def machine() -> dict[str, Any]:
    """Whose figures these are: processor, threads, versions, commit."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")), model
        )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call by the GPU's own clock, over as many calls as make some 10 ms."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    repeats = 1
    while True:
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        milliseconds = begin.elapsed_time(end)
        if milliseconds > 10 or repeats >= 256:
            return milliseconds / repeats / 1e3
        repeats *= 4


def measure(question: Comparison, rounds: int, clock: Callable[[], float], device: str = "cpu") -> dict[str, Any]:
    """Median seconds of each contestant, and the median of the rounds' ratios to the baseline."""
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        contestants = question.make()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peak: dict[str, int] = {}
    rounds = min(rounds, question.rounds or rounds)
    for name, call in contestants.items():  # first calls compile, allocate and warm caches
        if question.rounds is None or name != question.baseline:  # a baseline of minutes is not run for nothing
            call()
    for _ in range(rounds):
        for name, call in contestants.items():
            gc.collect()
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                times[name].append(gpu_seconds(call))
                peak[name] = torch.cuda.max_memory_allocated()
                continue
            start = clock()
            call()
            times[name].append(clock() - start)
    ratios = {
        name: statistics.median(base / other for base, other in zip(times[question.baseline], seconds, strict=True))
        for name, seconds in times.items()
    }
    figures: dict[str, Any] = {
        "baseline": question.baseline,
        "ours": question.ours,
        "promise": question.promise,
        "rounds": rounds,
        "milliseconds": {name: round(1e3 * statistics.median(seconds), 4) for name, seconds in times.items()},
        "spread": {name: round((max(seconds) - min(seconds)) / statistics.median(seconds), 3) for name, seconds in times.items()},
        "times_faster_than_baseline": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }
    if device != "cpu":
        figures["peak_megabytes"] = {name: round(amount / 2**20, 1) for name, amount in peak.items()}
    if question.flops is not None:
        figures["tflops"] = {name: round(question.flops / statistics.median(seconds) / 1e12, 3) for name, seconds in times.items()}
    if question.traffic is not None:
        figures["gbps"] = {name: round(question.traffic / statistics.median(seconds) / 1e9, 3) for name, seconds in times.items()}
    return figures


def _measured_in_a_fork(question: Comparison, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """`measure` in a copy of this process, which has computed nothing yet: a new interpreter would import torch anew for seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(measure(question, rounds, clock)))
    child.start()
    sender.close()
    try:
        figures: dict[str, Any] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{question.name!r} could not be measured: its process ended before it had figures, for the reason above") from None
    child.join()
    return figures


#: Columns of the table, after those of Liger-Kernel's benchmark data: one row a kernel, provider and metric.
COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label", "x_value"),
    *("y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp", "foveal_kernels_commit"),
)

_METRICS = {
    "milliseconds": ("speed", "ms"),
    "times_faster_than_baseline": ("speedup", "x"),
    "peak_megabytes": ("memory", "MB"),
    "tflops": ("rate", "TFLOP/s"),
    "gbps": ("bandwidth", "GB/s"),
}


def rows(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A report's figures as rows of `COLUMNS`; the range of times is the spread around the median."""
    here = report["machine"]
    for name, figures in report["comparisons"].items():
        kernel, _, sizes = name.partition(", ")
        mode = "full" if "backward" in name else "forward"
        for metric, (metric_name, unit) in _METRICS.items():
            for provider, value in figures.get(metric, {}).items():
                reach = value * figures["spread"][provider] / 2 if metric == "milliseconds" else 0.0
                yield {
                    "kernel_name": kernel,
                    "kernel_provider": provider,
                    "kernel_operation_mode": mode,
                    "metric_name": metric_name,
                    "metric_unit": unit,
                    "x_name": "sizes",
                    "x_label": "sizes",
                    "x_value": sizes,
                    "y_value_50": value,
                    "y_value_20": round(value - reach, 4),
                    "y_value_80": round(value + reach, 4),
                    "extra_benchmark_config_str": json.dumps(
                        {"baseline": figures["baseline"], "rounds": figures["rounds"], "clock": report["clock"]}
                    ),
                    "gpu_name": here["gpu"] if report.get("device", "cpu") != "cpu" else here["processor"],
                    "timestamp": here["date"],
                    "foveal_kernels_commit": here["commit"],
                }


def write_table(report: Mapping[str, Any], path: Path) -> None:
    """The report as a CSV file of `COLUMNS`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows(report))


def show(name: str, figures: Mapping[str, Any]) -> None:
    """Print one comparison: times, ratios, and whether the promise was kept."""
    print(name)
    for contestant, milliseconds in figures["milliseconds"].items():
        ratio = figures["times_faster_than_baseline"][contestant]
        rate = "".join(f"   {figures[key][contestant]:8.1f} {_METRICS[key][1]}" for key in ("tflops", "gbps") if key in figures)
        print(f"  {contestant:34s} {milliseconds:12.3f} ms   {ratio:8.2f}x{rate}{' (baseline)' if contestant == figures['baseline'] else ''}")
    if figures["promise"] is not None:
        kept = figures["times_faster_than_baseline"][figures["ours"]] >= figures["promise"]
        print(f"  promised: {figures['promise']}x, {'kept' if kept else 'NOT KEPT'}", flush=True)


def main(title: str, folder: Path, arguments: Sequence[str] | None = None, *, command: Sequence[str] = (), table: bool = False) -> None:
    """Command line of a benchmark: run the registered comparisons, print a table, write <folder>/<title>.json.

    Args:
        title: what the file is called.
        folder: where it goes, unless ``--output`` says otherwise.
        arguments: default: those of the process.
        command: how to start this command line again, in a process of each comparison's own; default: as this process was started.
        table: also write the figures as CSV beside the JSON.
    """
    parser = argparse.ArgumentParser(description=f"benchmark {title}: contestants side by side, interleaved")
    parser.add_argument("names", nargs="*", help="comparisons whose name contains one of these (default: all)")
    parser.add_argument("--family", nargs="+", help="comparisons of these families only")
    parser.add_argument("--device", default="cpu", help="cpu (default), or cuda for the GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.add_argument("--wall", action="store_true", help="wall clock instead of process CPU time")
    parser.add_argument("--output", type=Path, default=folder / f"{title}.json")
    parser.add_argument("--list", action="store_true", help="name the comparisons, run none")
    parser.add_argument("--this", help="measure the comparison of exactly this name in this process, and print its figures as JSON")
    asked = parser.parse_args(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    clock = time.perf_counter if asked.wall else time.process_time
    if asked.this:
        print(json.dumps(measure(REGISTRY[asked.this], asked.rounds, clock, asked.device)))
        return
    kind = asked.device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("torch can use no GPU here; leave out --device, or see python -m foveal.kernels doctor")
    chosen = [question for question in REGISTRY.values() if kind in question.devices and (not asked.family or question.family in asked.family)]
    chosen = [question for question in chosen if not asked.names or any(part in question.name for part in asked.names)]
    if not chosen:
        known = "; ".join(f"{question.name} ({question.family})" for question in REGISTRY.values())
        parser.error(f"no comparison for {asked.device} fits {[*asked.names, *(asked.family or ())]}; there are: {known}")
    if asked.list:
        print("\n".join(f"{question.family:14s} {question.name}" for question in chosen))
        return
    used = "GPU events" if kind != "cpu" else "wall" if asked.wall else "process CPU"
    report: dict[str, Any] = {"machine": machine(), "clock": used, "rounds": asked.rounds, "comparisons": {}}
    if kind != "cpu":
        report["device"] = asked.device
    if (asked.names or asked.family) and asked.output.exists():  # a part of the comparisons was asked for: keep the others' figures
        report["comparisons"] = json.loads(asked.output.read_text(encoding="utf-8"))["comparisons"]
    again = list(command) or [sys.executable, *sys.orig_argv[1 : sys.orig_argv.index(sys.argv[0]) + 1]]
    options = [
        "--rounds",
        str(asked.rounds),
        "--threads",
        str(torch.get_num_threads()),
        "--device",
        asked.device,
        *(["--wall"] if asked.wall else []),
    ]
    for question in chosen:
        # a process of its own: what the comparison before it did to the allocator must not decide who wins
        if kind == "cpu" and sys.platform == "linux" and threading.active_count() == 1:
            figures = _measured_in_a_fork(question, asked.rounds, clock)
        else:
            child = [*again, *PASSED_ON, "--this", question.name, *options]
            figures = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        report["comparisons"][question.name] = figures
        show(question.name, figures)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if table:
        write_table(report, asked.output.with_suffix(".csv"))
        print(f"written to {asked.output} and {asked.output.with_suffix('.csv').name}")
