"""The form of a trained BEVANet that only answers: the same numbers, fewer steps.

What is exact, and done here once:

- batch norms go into the convolutions before them, in the head too;
- the norms before attention and perceptron go into the pointwise convolutions that follow, their layer scales into those that end them; of the
  shortcut around attention, one factor a channel is left;
- the gates of channels see one place, at which a padded depthwise 3 x 3 kernel is its middle alone: pointwise, depthwise and norm become one
  matrix, and the three gates of a block come from one product;
- the heads of training are gone, and memory is channels last, in which the layer norms over channels read the map as it lies.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.bevanet import BEVANet, Head
from foveal.detection.models.large_kernel import ConvPerceptron, EfficientAttentionBlock, GateLayer, KernelSelection


def inference_form(model: BEVANet) -> BEVANet:
    """A copy of `model` for answering alone, in evaluation mode and channels-last memory; float64 stays float64."""
    answering = copy.deepcopy(model).eval()
    answering.config = replace(model.config, auxiliary=False)
    for name in ("detail_head", "boundary_head"):
        if hasattr(answering, name):
            delattr(answering, name)
    with torch.no_grad():
        _fold(answering)
    for parameter in answering.parameters():
        parameter.requires_grad_(False)
    return answering.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fold(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, EfficientAttentionBlock):
            setattr(module, name, FoldedAttentionBlock(child))
            continue
        if isinstance(child, nn.Sequential) and len(child) == 2 and isinstance(child[0], nn.Conv2d) and isinstance(child[1], nn.BatchNorm2d):
            setattr(module, name, _after(child[0], child[1]))
            continue
        _fold(child)
        if isinstance(child, Head):
            # The second part's norm follows the first part's convolution.
            child.first.conv, child.second.norm = _after(child.first.conv, child.second.norm), nn.Identity()  # type: ignore[assignment]


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and addend of a batch norm, by channel, in double precision."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def _copied(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    made = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,  # type: ignore[arg-type]
    ).to(conv.weight)  # fmt: skip
    made.weight.copy_(weight)
    assert made.bias is not None
    made.bias.copy_(bias)
    return made


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros(conv.out_channels, dtype=torch.float64, device=conv.weight.device) if conv.bias is None else conv.bias.double()


def _after(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution and the norm after it in one."""
    factor, addend = _affine(norm)
    return _copied(conv, conv.weight.double() * factor.view(-1, 1, 1, 1), _bias(conv) * factor + addend)


def _before(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """A norm and the pointwise convolution after it in one."""
    factor, addend = _affine(norm)
    weight = conv.weight.double()
    return _copied(conv, weight * factor.view(1, -1, 1, 1), _bias(conv) + weight[:, :, 0, 0] @ addend)


def _scaled(conv: nn.Conv2d, scale: Tensor, addend: Tensor | float = 0.0) -> nn.Conv2d:
    """A convolution whose result is scaled by channel, and something added."""
    return _copied(conv, conv.weight.double() * scale.double().view(-1, 1, 1, 1), _bias(conv) * scale.double() + addend)


class FoldedSelection(KernelSelection):
    """`KernelSelection` whose gates are two matrix products."""

    def __init__(self, selection: KernelSelection) -> None:
        nn.Module.__init__(self)
        self.place = selection.place
        self.reduced = _gate_matrix([selection.reduce])
        self.expanded = _gate_matrix(list(selection.expand))  # type: ignore[arg-type]

    def channel_gates(self, pooled: Float[Tensor, "batch channels 1 1"]) -> list[Tensor]:
        """A gate in 0..1 for each map, (batch, channels, 1, 1)."""
        gates = torch.sigmoid(F.relu(self.expanded(F.relu(self.reduced(pooled.flatten(1))))))
        return [gate[..., None, None] for gate in gates.chunk(3, 1)]


def _gate_matrix(layers: list[GateLayer]) -> nn.Linear:
    """Gates side by side: pointwise, the middle of the depthwise kernel, norm."""
    weights, biases = [], []
    for layer in layers:
        factor, addend = _affine(layer.norm)
        middle = layer.depthwise.weight.double()[:, 0, 1, 1]
        weights.append(layer.pointwise.weight.double()[:, :, 0, 0] * (middle * factor)[:, None])
        biases.append((_bias(layer.pointwise) * middle + _bias(layer.depthwise)) * factor + addend)
    weight = torch.cat(weights)
    made = nn.Linear(weight.shape[1], weight.shape[0]).to(layers[0].pointwise.weight)
    made.weight.copy_(weight)
    made.bias.copy_(torch.cat(biases))
    return made


class FoldedAttentionBlock(nn.Module):
    """`EfficientAttentionBlock` with its norms and scales inside its convolutions."""

    factor: Tensor

    def __init__(self, block: EfficientAttentionBlock) -> None:
        super().__init__()
        attention, perceptron = block.attention, block.perceptron
        factor, addend = _affine(block.norm1)
        self.enter, self.kernel = _before(block.norm1, attention.enter), attention.kernel
        self.kernel.select = FoldedSelection(attention.kernel.select)  # type: ignore[arg-type]
        self.leave = _scaled(attention.leave, block.scale1, block.scale1.double() * addend)
        self.register_buffer("factor", (1 + block.scale1.double() * factor).to(block.scale1.dtype).view(-1, 1, 1))
        self.perceptron = ConvPerceptron(1, 1)
        self.perceptron.expand, self.perceptron.depthwise = _before(block.norm2, perceptron.expand), perceptron.depthwise
        self.perceptron.project = _scaled(perceptron.project, block.scale2)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        x = torch.addcmul(self.leave(self.kernel(F.gelu(self.enter(x)))), x, self.factor)
        return x + self.perceptron(x)
