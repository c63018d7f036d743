"""What this machine has, and which backend each operator would use on it and why the others would not."""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveal.kernels
from foveal.kernels import configurations, native
from foveal.kernels.dispatch import explain

#: Other people's kernels that `bench` compares with where they are installed.
PEERS = ("flash-attn", "xformers", "flash-linear-attention", "natten", "mamba-ssm", "torch-scatter", "torch-geometric", "vector-quantize-pytorch")

#: Arguments of a plain float32 call of an operator: positional, by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def operators() -> list[str]:
    """Names of the public operators: the functions of the face, but for the one that explains them."""
    return [name for name in foveal.kernels.__all__ if inspect.isfunction(getattr(foveal.kernels, name)) and name != "explain"]


def example(name: str, device: torch.device | str = "cpu") -> Call:
    """Arguments of a plain call of a public operator, small."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    def whole(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

    def heads(count: int) -> tuple[Tensor, ...]:
        return tuple(random(1, 2, 64, 32) for _ in range(count))

    def scan() -> tuple[Tensor, ...]:
        return random(1, 8, 32), random(1, 8, 32), -random(8, 4).exp(), random(1, 4, 32), random(1, 4, 32)

    def nodes() -> tuple[Tensor, ...]:
        return *(random(4, 2, 8) for _ in range(3)), whole([[0, 1, 2, 3], [1, 2, 3, 0]])

    def points() -> tuple[Tensor, ...]:
        return *heads(2), random(64, 3)

    def token(gates: int) -> tuple[Tensor, ...]:
        return *(random(1, 2, 32) for _ in range(3)), *(random(1, 2).sigmoid() for _ in range(gates))

    calls: dict[str, Callable[[], Call]] = {
        "attention": lambda: (heads(3), {}),
        "selective_scan": lambda: (scan(), {}),
        "segment_attention": lambda: (nodes(), {}),
        "segment_softmax": lambda: ((random(4, 2), whole([0, 1, 1, 2])), {"num_nodes": 3}),
        "segment_reduce": lambda: ((random(4, 2), whole([0, 1, 1, 2])), {"num_nodes": 3}),
        "depthwise_norm": lambda: ((random(2, 16, 8), random(8, 5), random(8), random(8), random(8)), {}),
        "attention_varlen": lambda: ((*(random(40, 2, 32) for _ in range(3)), *[whole([0, 15, 40])] * 2, 25, 25), {}),
        "block_sparse_attention": lambda: ((*heads(3), foveal.kernels.BlockIndex.from_window(64, 64, (16, 0), 16).to(device)), {}),
        "decode_attention": lambda: ((random(1, 2, 1, 32), *heads(2)), {}),
        "delta_rule": lambda: ((*heads(3), random(1, 2, 64).sigmoid()), {}),
        "efficient_attention": lambda: (heads(3), {}),
        "gated_delta_rule": lambda: ((*heads(3), random(1, 2, 64).sigmoid(), -random(1, 2, 64).exp()), {}),
        "kronecker_attention": lambda: (tuple(random(1, 2, 9, 16) for _ in range(5)), {}),
        "linear_attention": lambda: (heads(3), {}),
        "local_linear_attention": lambda: (heads(3), {"ridge": 1.0}),
        "titans": lambda: ((*heads(3), *(random(1, 2, 64).sigmoid() for _ in range(3))), {}),
        "neighborhood_attention_1d": lambda: (heads(3), {"kernel_size": 7}),
        "neighborhood_attention_2d": lambda: (tuple(x.unflatten(2, (8, 8)) for x in heads(3)), {"kernel_size": 3}),
        "neighborhood_attention_3d": lambda: (tuple(x.unflatten(2, (4, 4, 4)) for x in heads(3)), {"kernel_size": 3}),
        "hyperedge_attention": lambda: ((*nodes()[:3], random(4, 2, 8), nodes()[3]), {}),
        "hyperedge_mean": lambda: ((random(4, 8), nodes()[3]), {}),
        "nearest_code": lambda: ((random(9, 8), random(5, 8)), {}),
        "rotary": lambda: (heads(2), {}),
        "rotary_axial": lambda: ((*heads(2), (8, 8)), {}),
        "rotary_quaternion": lambda: (points(), {}),
        "rotate": lambda: ((*points(), random(3, 8)), {}),
        "channel_norm": lambda: ((random(2, 16, 8), random(2), random(8), random(8), (4, 4)), {}),
        "delta_rule_step": lambda: ((*token(1), random(1, 2, 32, 32)), {}),
        "gated_delta_rule_step": lambda: ((*token(1), -random(1, 2).exp(), random(1, 2, 32, 32)), {}),
        "linear_attention_step": lambda: ((*token(0), random(1, 2, 32, 32)), {}),
        "titans_step": lambda: ((*token(3), (random(1, 2, 32, 32), random(1, 2, 32, 32))), {}),
        "merge_attention": lambda: (([random(1, 2, 64, 32)] * 2, [random(1, 2, 64)] * 2), {}),
        "quatrope_extension": lambda: ((random(1, 64, 3), 32), {}),
        "gated_injection": lambda: ((random(2, 16, 8), random(2, 4, 8), random(3, 8, 5), random(3, 8), random(3, 8)), {}),
    }
    return calls[name]()


def backends(device: torch.device | str) -> dict[str, dict[str, Any]]:
    """Operator -> the backend that a plain call on `device` would use, and the others with the reason against them."""
    found: dict[str, dict[str, Any]] = {}
    for name in operators():
        positional, named = example(name, device)
        try:
            explanation = explain(getattr(foveal.kernels, name), *positional, **named)
        except ValueError as error:
            found[name] = {"backend": f"cannot run: {error}", "others": {}}
        else:
            found[name] = {"backend": explanation.backend, "others": explanation.reasons}
    return found


def native_libraries() -> dict[str, str]:
    """Name of each C file of foveal.kernels -> what serves it."""
    folder = Path(__file__).parent
    return {f"{source.parent.name}/{source.name}": native.explain(str(source)) for source in sorted(folder.glob("*/*.c"))}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "architecture": getattr(gpu, "gcnArchName", f"sm_{gpu.major}{gpu.minor}"),
        }
        for gpu in properties
    ]


def _tuned() -> dict[str, list[str]]:
    """Family -> the entries that its launchers take from the user's cache on this machine."""
    device = configurations.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    files = {file.parent.name: configurations.tuned_file(file.parent.name, device) for file in sorted(Path(__file__).parent.glob("*/triton.py"))}
    return {family: sorted(json.loads(path.read_text(encoding="utf-8"))["tilings"]) for family, path in files.items() if path.exists()}


def report() -> dict[str, Any]:
    """All that `doctor` prints, as one JSON-able object."""
    gpus = _gpus()
    device = "cuda" if gpus else "cpu"
    return {
        "foveal-kernels": _installed("foveal-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerator": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "triton": configurations.triton_version(),
        "machine": f"{platform.machine()} {platform.system()}",
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "compiler": native.compiler(),
        "native": native_libraries(),
        "peers": {name: found for name in PEERS if (found := _installed(name)) is not None},
        "tuned": _tuned(),
        "device": device,
        "operators": backends(device),
    }


def show(as_json: bool = False) -> None:
    """Print the report, as lines or as one JSON object."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"foveal-kernels {found['foveal-kernels'] or 'not installed as a distribution'}")
    print(f"python {found['python']}, torch {found['torch']} (built for {found['accelerator']}), triton {found['triton']}")
    print(f"{found['machine']}, {found['threads']} threads")
    for gpu in found["gpus"]:
        print(f"gpu: {gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}")
    if not found["gpus"]:
        print("gpu: none that torch can use")
    print(f"C compiler: {found['compiler'] or 'none'}")
    print("C kernels")
    for name, state in found["native"].items():
        print(f"  {name:<28} {state}")
    print(
        "tuned tilings: "
        + (", ".join(f"{family} ({len(entries)})" for family, entries in found["tuned"].items()) or "none, the shipped tables serve")
    )
    print("peers for bench: " + (", ".join(f"{name} {number}" for name, number in found["peers"].items()) or "torch alone"))
    print(f"operators on the {'GPU' if found['device'] == 'cuda' else 'CPU'}")
    for name, operator in found["operators"].items():
        print(f"  {name:<28} {operator['backend']}")
        for backend, reason in operator["others"].items():
            print(f"  {'':<28}   not {backend}: {reason}")
