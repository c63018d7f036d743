"""How much memory do guided attention in training and RAT at 512 x 512 need?

Guided attention: the published network at 256 x 256, forward with the guided loss and backward. The bytes of every tensor alive are followed
through the run (weights, gradients, what autograd keeps, what is in passing), on tensors without values, so that the figure is of the
algorithm and not of an allocator. Theirs: the same network with position attention as the authors write it, a (position, position) map a level.
RAT: one real restoration in a process of its own, and that process' largest resident size.

python benchmarks/medical_memory.py [--batch 8] [--no-rat] writes benchmarks/results/medical_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveal.kernels.bench import machine
from foveal.medical.losses import guided_loss
from foveal.medical.models.guided_attention import GuidedAttentionNet, PositionAttention

RESULT = Path(__file__).parent / "results" / "medical_memory.json"


class Followed(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.alive = self.peak = 0

    def follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.follow(value)
        return out


def authors_position_attention(layer: PositionAttention, x: Tensor) -> Tensor:
    """All pairs of positions, as the released code writes it."""
    q, k, v = (part(x).flatten(2) for part in (layer.query, layer.key, layer.value))
    weights = torch.softmax(torch.bmm(q.mT, k), -1)
    return layer.gamma * torch.bmm(v, weights.mT).view_as(x) + x


def training_peak(batch: int, authors: bool, recompute: bool) -> int:
    """Bytes at the most during forward and backward."""
    plain = PositionAttention.forward
    if authors:
        PositionAttention.forward = authors_position_attention  # type: ignore[method-assign,assignment]
    try:
        with FakeTensorMode(), Followed() as followed:
            network = GuidedAttentionNet(recompute=recompute).train()
            for tensor in (*network.parameters(), *network.buffers()):
                followed.follow(tensor)
            image, label = torch.empty(batch, 1, 256, 256), torch.empty(batch, 256, 256, dtype=torch.int64)
            guided_loss(network.forward_guided(image), label).total.backward()
            return followed.peak
    finally:
        PositionAttention.forward = plain  # type: ignore[method-assign]


def rat_resident(size: int) -> dict[str, float]:
    """Restore one picture and tell the largest resident size of this process."""
    import time

    sys.path.insert(0, str(Path(__file__).parent))
    import medical

    from foveal.medical.models.rat import RAT

    picture, regions = medical.example(512 // size)
    network = RAT().eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with torch.no_grad():
        network(picture, regions)
    seconds = time.process_time() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"gibibytes": round(after / 2**20, 2), "of which before": round(before / 2**20, 2), "cpu_seconds": round(seconds, 1)}


def run(batch: int, rat: bool) -> dict[str, Any]:
    """All figures."""
    forms = {"the authors' form": (True, False), "foveal": (False, False), "foveal, recompute": (False, True)}
    peaks = {name: training_peak(batch, *form) for name, form in forms.items()}
    base = peaks["the authors' form"]
    report: dict[str, Any] = {
        "machine": machine(),
        "guided attention, training at 256 x 256": {
            "batch": batch,
            "gibibytes": {name: round(peak / 2**30, 2) for name, peak in peaks.items()},
            "share_of_the_authors": {name: round(peak / base, 3) for name, peak in peaks.items()},
        },
    }
    if rat:
        child = [sys.executable, __file__, "--this", "512"]
        report["RAT at 512 x 512"] = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images in a batch; the authors' training has 8")
    parser.add_argument("--no-rat", action="store_true")
    parser.add_argument("--this", type=int, help="restore a picture of this size in this process, and print its figures")
    asked = parser.parse_args()
    if asked.this:
        print(json.dumps(rat_resident(asked.this)))
    else:
        found = run(asked.batch, not asked.no_rat)
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found, indent=1))
