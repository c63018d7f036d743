"""``foveal doctor``: what this machine has, and which backend each kernel would use on it and why the others would not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def show(as_json: bool) -> None:
    """Print versions, devices and kernel backends, as lines or as one JSON object."""
    from foveal.core.environment import describe

    report = {**describe(), "kernels": kernels(), "native": native_libraries()}
    if as_json:
        print(json.dumps(report, indent=2))
        return
    machine = report["machine"]
    print(f"machine    {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}")
    for gpu in machine["gpus"]:
        print(f"gpu        {gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}")
    if not machine["gpus"]:
        print(f"gpu        none that torch can use (torch was built for {report['accelerator']})")
    print(f"python     {report['python']}")
    print("versions   " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"commit     {report['commit'] or 'installed, not a checkout'}")
    print("\nC kernels")
    for name, state in report["native"].items():
        print(f"  {name:<20} {state}")
    print(f"\nkernels on {'the GPU' if machine['gpus'] else 'the CPU'}")
    for name, kernel in report["kernels"].items():
        print(f"  {name:<20} {kernel['backend']}")
        for backend, reason in kernel["others"].items():
            print(f"  {'':<20}   not {backend}: {reason}")


def native_libraries() -> dict[str, str]:
    """Name of each C file of foveal.kernels -> what serves it."""
    import foveal.kernels
    from foveal.kernels import native

    folder = Path(foveal.kernels.__file__).parent
    return {f"{source.parent.name}/{source.name}": native.explain(str(source)) for source in sorted(folder.glob("*/*.c"))}


def kernels() -> dict[str, dict[str, Any]]:
    """Operator -> the backend that a plain call on the best device here would use, and the others with the reason against them."""
    import foveal.kernels
    from foveal.kernels import explain

    found: dict[str, dict[str, Any]] = {}
    for name, arguments in _calls().items():
        try:
            explanation = explain(getattr(foveal.kernels, name), *arguments())
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            found[name] = {"backend": f"cannot run: {error}", "others": {}}
        else:
            found[name] = {"backend": explanation.backend, "others": explanation.reasons}
    return found


def _calls() -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Operator -> arguments of a plain call of it, in float32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(*shape: int) -> Any:
        return torch.randn(shape, device=device)

    def graph() -> Any:
        from foveal.kernels import CSR

        return CSR.from_edge_index(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]], device=device), 4)

    return {
        "attention": lambda: (random(1, 2, 64, 32), random(1, 2, 64, 32), random(1, 2, 64, 32)),
        "selective_scan": lambda: (random(1, 8, 32), random(1, 8, 32), -random(8, 4).exp(), random(1, 4, 32), random(1, 4, 32)),
        "segment_attention": lambda: (random(4, 2, 8), random(4, 2, 8), random(4, 2, 8), graph()),
        "segment_softmax": lambda: (random(4, 2), graph()),
        "segment_reduce": lambda: (random(4, 2), graph()),
        "depthwise_norm": lambda: (random(2, 16, 8), random(8, 5), random(8), random(8), random(8)),
    }
