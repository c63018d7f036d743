"""How fast does YOLOv13-N answer at 640 pixels, beside the order of operations that its authors published, with equal outputs?

python benchmarks/yolov13.py [--rounds 9] [--threads 1] writes benchmarks/results/yolov13.json.

The authors' order is written here twice. As their network is when it is loaded: batch norms apart, softmax by hand, hyperedges head by head with
their full projections, channels first. And after their `fuse`: convolutions and batch norms in one, but those of depthwise-separable
convolutions. Outputs are checked before anything is timed. Exported files run in ONNX Runtime with as many threads as torch.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.detection import YOLOv13, YOLOv13Config
from foveal.detection.export import Exported
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

    def __init__(self, source: AreaAttention, conv: Callable[[ConvNorm], nn.Module]) -> None:
        super().__init__()
        self.heads, self.areas = source.heads, source.areas
        self.query_key, self.value, self.position, self.project = (
            conv(part) for part in (source.query_key, source.value, source.position, source.project)
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


class SeparateConv(nn.Module):
    """The authors' convolution as it is loaded."""

    def __init__(self, source: ConvNorm) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        y = self.source.norm(self.source.conv(x))
        return F.silu(y) if self.source.activated else y


def authors_order(model: YOLOv13, fused: bool) -> YOLOv13:
    """The same weights in the authors' sequence of operations."""
    conv = FoldedConv if fused else SeparateConv

    def replace(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, ConvNorm):
                setattr(module, name, conv(child))
            elif isinstance(child, AreaAttention):
                setattr(module, name, AuthorsAttention(child, conv))
            elif isinstance(child, HyperedgeAttention):
                setattr(module, name, AuthorsHyperedges(child))
            else:
                replace(child)

    made = copy.deepcopy(model).eval().requires_grad_(False)
    replace(made)
    return made


def trained(scale: str) -> YOLOv13:
    """A network whose every branch counts: norms with the statistics of what goes through them, gates half open."""
    generator = torch.Generator().manual_seed(0)
    model = YOLOv13(YOLOv13Config(scale)).requires_grad_(False)
    for name, value in model.state_dict().items():
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif name.endswith("gate"):
            value.fill_(0.5)
        elif name.startswith("head.score") and name.endswith("bias"):
            value.zero_()  # scores about a half: near zero ONNX Runtime's sigmoid is right to 1e-7, not to seven digits
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.rand(2, 3, 320, 320, generator=generator))
    return model.eval()


def disagreement(actual: Tensor, expected: Tensor) -> float:
    """Size of the difference over that of what varies from place to place: a network that says the same everywhere would agree with any."""
    return float((actual - expected).norm() / (expected - expected.mean(2, keepdim=True)).norm())


def session(network: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    """A network in ONNX Runtime, by the same exporter for all; ours takes any number of pictures, as foveal detection export writes it."""
    import onnxruntime

    names: dict[str, Any] = {}
    if isinstance(network, Exported):
        names = {"input_names": ["image"], "output_names": ["decoded"], "dynamic_axes": {"image": {0: "batch"}, "decoded": {0: "batch"}}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        file = str(Path(folder) / "network.onnx")
        torch.onnx.export(network, (image,), file, opset_version=17, dynamo=False, **names)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        runs = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    entry, given = runs.get_inputs()[0].name, image.numpy()
    return lambda: torch.from_numpy(runs.run(None, {entry: given})[0])


def contestants(scale: str, size: int) -> Contestants:
    """Equal outputs are checked before anything is timed."""
    model, generator = trained(scale), torch.Generator().manual_seed(1)
    first = torch.rand(1, 3, size, size, generator=generator)
    last = first.to(memory_format=torch.channels_last)
    loaded, fused, ours = authors_order(model, False), authors_order(model, True), inference_form(model)
    exported = session(Exported(model, False).eval(), first)
    with torch.no_grad():
        expected = loaded(first).decoded
        for name, actual in (("fused", fused(first).decoded), ("ours", ours(last).decoded), ("exported", exported())):
            boxes, scores = disagreement(actual[:, :4], expected[:, :4]), disagreement(actual[:, 4:], expected[:, 4:])
            print(f"relative difference, {name}: boxes {boxes:.1e}, scores {scores:.1e}", file=sys.stderr)
            assert max(boxes, scores) < 1e-4, "the forms disagree: their times cannot be compared"

    def run(network: nn.Module, image: Tensor) -> Callable[[], None]:
        return lambda: torch.no_grad()(network)(image)

    return {
        "foveal": run(ours, last),
        "foveal, exported, ONNX Runtime": exported,
        "authors' order, fused": run(fused, first),
        "authors' order": run(loaded, first),
    }


@comparison("YOLOv13-N, 640 x 640, one picture", baseline="authors' order", devices=("cpu",))
def small() -> Contestants:
    return contestants("n", 640)


@comparison("YOLOv13-N and YOLO11n in ONNX Runtime, 640 x 640", baseline="YOLO11n", devices=("cpu",))
def beside_yolo11() -> Contestants:
    image = torch.rand(1, 3, 640, 640, generator=torch.Generator().manual_seed(1))
    return {"foveal": session(Exported(trained("n"), False).eval(), image), "YOLO11n": session(yolo11(), image)}


def yolo11() -> nn.Module:
    """Ultralytics' network as its exporter leaves it: folded, decoding in the graph."""
    from foveal.detection.borrowed import tasks

    other: Any = tasks.DetectionModel("yolo11n.yaml", verbose=False).eval().fuse(verbose=False)
    other.model[-1].export, other.model[-1].format = True, "onnx"
    return other


if __name__ == "__main__":
    main("yolov13", Path(__file__).parent / "results")
