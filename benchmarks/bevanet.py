"""How fast does BEVANet-S answer, beside the order of operations that its authors published, with equal outputs?

python benchmarks/bevanet.py [--rounds 9] [--threads 1] writes benchmarks/results/bevanet.json.

The authors' order is their network as it is loaded: norms and layer scales apart, gates by padded convolutions on a map of one place, channels
first, tokens copied for each layer norm. Statistics and scales are drawn, so that nothing is hidden by ones and zeros; outputs are checked before
anything is timed. Large-kernel attention is also measured alone, one block at the size it has at 1/32 of a picture of 512 x 1,024 pixels.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from foveal.detection.models.bevanet import SIZES, BEVANet, BEVANetConfig
from foveal.detection.models.bevanet_inference import FoldedAttentionBlock, inference_form
from foveal.detection.models.large_kernel import ChannelNorm, EfficientAttentionBlock
from foveal.kernels.bench import Contestants, comparison, main


class AuthorsNorm(nn.LayerNorm):
    """Tokens in a row and back again."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x.flatten(2).transpose(1, 2))
        return tokens.permute(0, 2, 1).reshape(x.shape).contiguous()


def settled(model: nn.Module) -> None:
    """Statistics and scales as after a training."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.exp(0.2 * torch.randn(value.shape, generator=generator)))
        elif value.dim() == 1:
            value.copy_(0.5 + 0.2 * torch.randn(value.shape, generator=generator))
    model.eval()


def _same(first: Tensor, second: Tensor) -> None:
    error = float((first - second).norm() / second.norm())
    if error > 1e-4:
        raise AssertionError(f"expected equal outputs; they differ by {error:.1e}")


@comparison("BEVANet-S, 256 x 512, one picture", baseline="authors' order", devices=("cpu",))
def network() -> Contestants:
    torch.manual_seed(0)
    model = BEVANet(BEVANetConfig(**SIZES["small"]))
    settled(model)
    ours, theirs = inference_form(model), copy.deepcopy(model)
    for module in theirs.modules():
        if isinstance(module, ChannelNorm):
            module.__class__ = AuthorsNorm
    image = torch.randn(1, 3, 256, 512)
    striped = image.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        _same(ours(striped), theirs(image))

    def run(form: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            answer: Tensor = form(x)
            return answer

    return {"foveal": lambda: run(ours, striped), "authors' order": lambda: run(theirs, image)}


@comparison("large-kernel attention (window 35), 256 channels, 16 x 32", baseline="authors' order", devices=("cpu",))
def attention() -> Contestants:
    torch.manual_seed(0)
    block = EfficientAttentionBlock(256, 35)
    settled(block)
    with torch.no_grad():
        folded = FoldedAttentionBlock(copy.deepcopy(block)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randn(1, 256, 16, 32)
    striped = image.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        _same(folded(striped), block(image))

    def run(form: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            answer: Tensor = form(x)
            return answer

    return {"foveal": lambda: run(folded, striped), "authors' order": lambda: run(block, image)}


if __name__ == "__main__":
    main("bevanet", Path(__file__).parent / "results")
