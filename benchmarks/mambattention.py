"""How fast is MambAttention beside the reference scan and beside the authors' code, and how much memory does 10 s of audio take?

python benchmarks/mambattention.py [--authors CHECKOUT] [--rounds 3] [--threads 1] [--wall] writes benchmarks/results/mambattention.json.

CHECKOUT is a checkout of the authors' repository (github.com/NikolaiKyhne/MambAttention): its model is imported in this process, with the scan
that its vendored mamba_ssm calls the reference, since the other one needs a GPU. Without it the baseline is our own model with the same scan.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.audio import MambAttention, load_official, to_official
from foveal.audio.demo.noisy import load_noisy
from foveal.audio.models import mambattention
from foveal.audio.models.mambattention import MambAttentionConfig
from foveal.kernels.bench import PASSED_ON, Contestants, comparison, main

AUTHORS: Path | None = None
if "--authors" in sys.argv:
    place = sys.argv.index("--authors")
    AUTHORS = Path(sys.argv[place + 1])
    PASSED_ON += sys.argv[place : place + 2]
    del sys.argv[place : place + 2]

_RESULTS = Path(__file__).parent / "results"


def speech(seconds: float) -> Tensor:
    """(1, samples): real speech in noise, repeated where it is too short."""
    noisy, _, rate = load_noisy()
    samples = round(rate * seconds)
    return noisy.repeat(-(-samples // len(noisy)))[None, :samples]


def materialised_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> Tensor:
    """The scan as mamba_ssm's reference computes it: all decays and inputs of (batch, dim, length, state) first, then a loop over steps."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), [u[..., 0]] * u.shape[2]
    for step in reversed(range(u.shape[2])) if reverse else range(u.shape[2]):
        state = decay[:, :, step] * state + entering[:, :, step]
        outputs[step] = torch.einsum("bdn,bn->bd", state, C[:, :, step])
    return (torch.stack(outputs, dim=2) + u * D[:, None]) * F.silu(z)


def materialised_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that holds every score."""
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


@contextlib.contextmanager
def replaced(**functions: Callable[..., Any]) -> Iterator[None]:
    """Our model with other forms of its kernels."""
    before = {name: getattr(mambattention, name) for name in functions}
    for name, function in functions.items():
        setattr(mambattention, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(mambattention, name, function)


class _RMSNorm(nn.Module):
    """What the authors take from a Triton kernel."""

    def __init__(self, size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, **_: Any) -> Any:
        total = x if residual is None else x + residual
        out = F.rms_norm(total, total.shape[-1:], self.weight, self.eps)
        return (out, total) if prenorm else out


def _rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-5, **rest: Any) -> Any:
    total = x if residual is None else x + residual
    out = F.rms_norm(total, total.shape[-1:], weight, eps)
    return (out, total) if rest.get("prenorm") else out


def authors_model(state: dict[str, Tensor]) -> nn.Module:
    """The authors' MambAttention from their own files; only what needs a GPU is replaced."""
    assert AUTHORS is not None
    vendored = AUTHORS / "mamba_install"
    sys.path[:0] = [str(AUTHORS), str(vendored)]
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(vendored / "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    for name in ("causal_conv1d", "causal_conv1d_cuda", "selective_scan_cuda"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["causal_conv1d"].causal_conv1d_fn = None
    sys.modules["causal_conv1d"].causal_conv1d_update = None
    norms = types.ModuleType("mamba_ssm.ops.triton.layernorm")
    norms.RMSNorm, norms.layer_norm_fn, norms.rms_norm_fn = _RMSNorm, None, _rms_norm
    sys.modules[norms.__name__] = norms
    updates = types.ModuleType("mamba_ssm.ops.triton.selective_state_update")
    updates.selective_state_update = None
    sys.modules[updates.__name__] = updates
    generation = types.ModuleType("mamba_ssm.utils.generation")
    generation.GenerationMixin = object
    sys.modules[generation.__name__] = generation
    hub = types.ModuleType("mamba_ssm.utils.hf")
    hub.load_config_hf = hub.load_state_dict_hf = None
    sys.modules[hub.__name__] = hub
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
    mixer.selective_scan_fn = scan.selective_scan_ref
    mixer.causal_conv1d_fn = None
    plain = mixer.Mamba.__init__
    mixer.Mamba.__init__ = lambda self, *arguments, **named: plain(self, *arguments, **{**named, "use_fast_path": False})
    settings = importlib.import_module("yaml").safe_load(
        (AUTHORS / "checkpoints" / "MambAttention_seed3441_VB-DemandEx.yaml").read_text(encoding="utf-8")
    )
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True  # the constructor refuses without, and does nothing with it
    try:
        model = importlib.import_module("models.generator").MambAttention(settings)
    finally:
        torch.cuda.is_available = available
    model.load_state_dict(state)
    return model.eval()


@comparison("MambAttention, 1 s, inference", baseline="authors' code" if AUTHORS else "ours with the reference scan", promise=5.0, rounds=3)
def one_second() -> Contestants:
    """Equal outputs are checked before anything is timed."""
    torch.manual_seed(0)
    state = to_official("mambattention", MambAttention())
    ours, noisy = load_official("mambattention", state), speech(1.0)
    spectrum = ours.spectrum(noisy * mambattention.unit_gain(noisy))
    calls: dict[str, Callable[[], Any]] = {"foveal": lambda: torch.inference_mode()(ours)(*spectrum)}

    def reference() -> Any:
        with replaced(selective_scan=materialised_scan):
            return torch.inference_mode()(ours)(*spectrum)

    calls["ours with the reference scan"] = reference
    if AUTHORS is not None:
        theirs = authors_model(state)
        calls["authors' code"] = lambda: torch.inference_mode()(theirs)(*spectrum)
    expected = calls["foveal"]()[2]
    for name, call in calls.items():
        error = float((call()[2] - expected).norm() / expected.norm())
        print(f"relative difference of the spectra, {name}: {error:.1e}", file=sys.stderr)
        assert error < 1e-4, "the models disagree: their times cannot be compared"
    return calls


def peak_memory(form: str, seconds: float) -> float:
    """GiB that a process of its own needs beyond model and input; measured in this process, which is that one."""
    model, noisy = MambAttention().eval(), speech(seconds)
    spectrum = model.spectrum(noisy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode(), replaced(**({"attention": materialised_attention} if form == "every score" else {})):
        model(*spectrum)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def _scores(seconds: float, config: MambAttentionConfig) -> float:
    """GiB of the scores of one attention along time, the least that a form which holds every score needs."""
    frames = round(seconds * config.sample_rate) // config.hop + 1
    return config.bins // 2 * config.heads * frames**2 * 4 / 2**30


def report_memory(seconds: float = 10.0, shorter: float = 5.0) -> None:
    """Peak memory, written beside the times: of both forms for `shorter`, of ours for `seconds`, where the other's scores alone are 7.6 GiB."""
    found: dict[str, dict[str, float]] = {}
    for length, forms in ((shorter, ("foveal", "every score")), (seconds, ("foveal",))):
        for form in forms:
            code = [sys.executable, __file__, "--memory", form, str(length)]
            measured = subprocess.run(code, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.setdefault(f"{length:g} s", {})[form] = round(float(measured.splitlines()[-1]), 3)
    found[f"{seconds:g} s"]["every score: the scores of one attention alone"] = round(_scores(seconds, MambAttentionConfig()), 3)
    print("MambAttention, peak memory")
    for length, sizes in found.items():
        least = max(sizes.values()) / sizes["foveal"]
        for form, size in sizes.items():
            print(f"  {length:6s} {form:50s} {size:8.2f} GiB")
        print(f"  {length:6s} promised: 4.0x less, {'kept' if least >= 4 else 'NOT KEPT'} ({least:.2f}x)")
    target = _RESULTS / "mambattention.json"
    written = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    written["peak memory, GiB"] = found
    target.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--memory" in sys.argv:
        torch.set_num_threads(1)
        _, form, seconds = sys.argv[sys.argv.index("--memory") :]
        print(peak_memory(form, float(seconds)))
    else:
        main("mambattention", _RESULTS)
        if "--this" not in sys.argv:
            report_memory()
