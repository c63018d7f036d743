"""How much faster is RAT with its pixels sorted into regions than with the authors' mask of all pairs of pixels?

The published network restores a picture of 256 x 256 with the region map that comes with the authors' example (every second pixel of it), or with
superpixels of noise where that is absent. Theirs: a mask built region by region, added to the logits of every layer and head. The outputs are
held against each other before anything is timed. A second question is one layer of region attention alone, forward and backward.

python benchmarks/medical.py [NAME ...] [--rounds 3] [--threads 2] [--wall] writes benchmarks/results/medical.json.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, main
from foveal.medical.models.rat import RAT, RegionAttention, sort_regions
from foveal.medical.regions import numbered, region_volume, superpixels
from foveal.medical.volumes import read_volume

EXAMPLE = Path(__file__).parents[2] / "shared" / "data" / "medical" / "rat_example" / "example_img"
SIZE = 256


def example(step: int) -> tuple[Tensor, Tensor]:
    """Picture and region map."""
    if EXAMPLE.exists():
        picture = read_volume(EXAMPLE / "input_img.png")
        regions = region_volume(EXAMPLE / "indexed_mask.nii", picture)
        pixels = picture.voxels[::step, ::step, 0] / 255.0
        return torch.from_numpy(pixels).float()[None, None], torch.from_numpy(numbered(regions[::step, ::step, 0]))[None]
    noise = torch.nn.functional.avg_pool2d(torch.rand(1, 1, SIZE + 30, SIZE + 30, generator=torch.Generator().manual_seed(0)), 31, 1)
    return noise, torch.from_numpy(superpixels(noise[0, 0].numpy()))[None]


def additive_mask(regions: Tensor) -> Tensor:
    """0 inside a region, -1000 between regions: (batch, pixels, pixels), region by region as the authors build it."""
    flat = regions.flatten(1)
    mask = torch.full((len(flat), flat.shape[1], flat.shape[1]), -1000.0)
    for number in range(int(flat.max()) + 1):
        inside = (flat == number).float()
        mask += 1000.0 * inside[:, :, None] * inside[:, None, :]
    return mask


def dense(layer: RegionAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The authors' form of one layer."""
    q, k, v = layer.qkv(x).flatten(2).unflatten(1, (3, layer.heads, -1)).mT.unbind(1)
    logits = q @ k.mT * layer.heads**-0.5 + mask[:, None].repeat(1, layer.heads, 1, 1)
    return layer.project((logits.softmax(-1) @ v).mT.reshape(x.shape))


class DenseRAT(torch.nn.Module):
    """The same network with the authors' form of its region attention."""

    def __init__(self, network: RAT) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, picture: Tensor, regions: Tensor) -> Tensor:
        step = self.network.config.reduction
        mask, plain = additive_mask(regions[:, ::step, ::step]), RegionAttention.forward
        RegionAttention.forward = lambda layer, x, parts: dense(layer, x, mask)  # type: ignore[method-assign]
        try:
            return self.network(picture, regions)
        finally:
            RegionAttention.forward = plain  # type: ignore[method-assign]


def _awake(network: RAT) -> RAT:
    """Attentions and blocks start switched off; here they take part."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("beta", "gamma", "_weight")) and parameter.dim() == 4:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@comparison(f"RAT restores {SIZE} x {SIZE} pixels, 15.9 million parameters", baseline="dense, masked", promise=3.0, rounds=1)
def whole() -> Contestants:
    torch.manual_seed(0)
    network = _awake(RAT())
    theirs = DenseRAT(network)
    picture, regions = example(512 // SIZE)
    small = picture[..., :64, :64], regions[..., :64, :64]

    @torch.no_grad()
    def ours(picture: Tensor, regions: Tensor) -> Tensor:
        return network(picture, regions)

    torch.testing.assert_close(ours(*small), theirs(*small), rtol=1e-4, atol=1e-4)
    return {"foveal": lambda: ours(picture, regions), "dense, masked": lambda: theirs(picture, regions)}


@comparison("region attention of 64 x 64 cells, 8 heads of 32, forward and backward", baseline="dense, masked", promise=3.0, rounds=3)
def layer() -> Contestants:
    torch.manual_seed(0)
    region = RegionAttention(256, 8)
    _, regions = example(512 // SIZE)
    cells = regions[:, ::4, ::4]
    x = torch.randn(1, 256, *cells.shape[1:], requires_grad=True)
    leaves = [x, *region.parameters()]
    mask, parts = additive_mask(cells), sort_regions(cells)
    torch.testing.assert_close(region(x, parts), dense(region, x, mask), rtol=1e-4, atol=1e-4)
    return {
        "foveal": forward_and_backward(lambda: region(x, parts), leaves),
        "dense, masked": forward_and_backward(lambda: dense(region, x, mask), leaves),
    }


if __name__ == "__main__":
    main("medical", Path(__file__).parent / "results")
