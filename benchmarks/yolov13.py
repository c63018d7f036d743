"""How fast does YOLOv13-N answer at 640 pixels, beside the order of operations that its authors published, with equal outputs?

python benchmarks/yolov13.py [--rounds 9] [--threads 1] writes benchmarks/results/yolov13.json.

The authors' order is written here as they run it: convolutions and their batch norms folded (their `fuse`), those of depthwise-separable
convolutions not, softmax by hand, hyperedges head by head with their full projections, channels first. Outputs are checked before anything is
timed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.detection import YOLOv13, YOLOv13Config
from foveal.detection.models.blocks import AreaAttention, ConvNorm
from foveal.detection.models.inference import inference_form
from foveal.kernels.bench import Contestants, comparison, main
from foveal.kernels.nn import HyperedgeAttention


class FoldedConv(nn.Module):
    """The authors' convolution after their fuse()."""

    def __init__(self, source: ConvNorm) -> None:
        super().__init__()
        norm = source.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        self.conv = copy.deepcopy(source.conv)
        self.conv.weight = nn.Parameter(source.conv.weight * scale[:, None, None, None])
        self.conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
        self.activated = source.activated

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.silu(y) if self.activated else y


class AuthorsAttention(nn.Module):
    """Tokens by transposition, exponentials, sums and divisions one by one."""

    def __init__(self, source: AreaAttention) -> None:
        super().__init__()
        self.heads, self.areas = source.heads, source.areas
        self.query_key, self.value, self.position, self.project = (
            FoldedConv(part) for part in (source.query_key, source.value, source.position, source.project)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        cells = height * width // self.areas
        query_key = self.query_key(x).flatten(2).transpose(1, 2)
        value = self.value(x)
        position = self.position(value)
        value = value.flatten(2).transpose(1, 2)
        query_key, value = query_key.reshape(batch * self.areas, cells, 2 * channels), value.reshape(batch * self.areas, cells, channels)
        query, key, value = (
            part.transpose(1, 2).reshape(-1, self.heads, channels // self.heads, cells) for part in (*query_key.chunk(2, 2), value)
        )  # fmt: skip
        logits = query.transpose(-2, -1) @ key * (channels // self.heads) ** -0.5
        weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = (value @ weights.transpose(-2, -1)).permute(0, 3, 1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return self.project(mixed + position)


class AuthorsHyperedges(nn.Module):
    """Every cell projected, heads apart, their logits averaged."""

    def __init__(self, source: HyperedgeAttention) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        source = self.source
        batch, cells, width = x.shape
        context = torch.cat((x.mean(1), x.max(1).values), -1)
        prototypes = source.prototype_base[None] + source.context_net(context).view(batch, source.edges, width)
        cells_by_head = source.pre_head_proj(x).view(batch, cells, source.heads, -1).transpose(1, 2).reshape(batch * source.heads, cells, -1)
        prototypes_by_head = (
            prototypes.view(batch, source.edges, source.heads, -1).permute(0, 2, 1, 3).reshape(batch * source.heads, source.edges, -1)
        )
        logits = (cells_by_head @ prototypes_by_head.transpose(1, 2) / source.head_dim**0.5).view(batch, source.heads, cells, source.edges).mean(1)
        incidence = F.softmax(logits, 1)
        edges = F.gelu(source.edge_proj(incidence.transpose(1, 2) @ x))
        return F.gelu(source.node_proj(incidence @ edges)) + x


def authors_order(model: YOLOv13) -> YOLOv13:
    """The same weights in the authors' sequence of operations."""

    def replace(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, ConvNorm):
                setattr(module, name, FoldedConv(child))
            elif isinstance(child, AreaAttention):
                setattr(module, name, AuthorsAttention(child))
            elif isinstance(child, HyperedgeAttention):
                setattr(module, name, AuthorsHyperedges(child))
            else:
                replace(child)

    made = copy.deepcopy(model).eval().requires_grad_(False)
    replace(made)
    return made


def trained(scale: str) -> YOLOv13:
    """A network whose every branch counts: gates open, norms with statistics."""
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config(scale)).eval().requires_grad_(False)
    for name, value in model.state_dict().items():
        if name.endswith("gate"):
            value.fill_(0.5)
        elif name.endswith("running_var"):
            value.uniform_(0.8, 1.2)
    return model


def contestants(scale: str, size: int) -> Contestants:
    """Equal outputs are checked before anything is timed."""
    model = trained(scale)
    first, last = torch.rand(1, 3, size, size), torch.rand(1, 3, size, size).to(memory_format=torch.channels_last)
    theirs, ours = authors_order(model), inference_form(model)
    with torch.no_grad():
        expected, actual = theirs(last.contiguous()), ours(last)
    error = max(float((mine - yours).norm() / yours.norm()) for mine, yours in zip(actual.maps, expected.maps, strict=True))
    print(f"greatest relative difference of the maps: {error:.1e}", file=sys.stderr)
    assert error < 1e-4, "the two forms disagree: their times cannot be compared"

    def run(network: nn.Module, image: Tensor) -> Callable[[], None]:
        return lambda: torch.no_grad()(network)(image)

    return {"foveal": run(ours, last), "ours as it is trained": run(model, last), "authors' order": run(theirs, first)}


@comparison("YOLOv13-N, 640 x 640, one picture", baseline="authors' order", promise=1.8, devices=("cpu",))
def small() -> Contestants:
    return contestants("n", 640)


@comparison("YOLOv13-S, 640 x 640, one picture", baseline="authors' order", devices=("cpu",))
def medium() -> Contestants:
    return contestants("s", 640)


if __name__ == "__main__":
    main("yolov13", Path(__file__).parent / "results")
