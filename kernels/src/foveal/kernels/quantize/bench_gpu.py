"""Nearest-code search on a GPU at an EEG tokeniser's size: every distance at once would be a matrix of 2.5 GB."""

from __future__ import annotations

import torch

from foveal.kernels.bench import Contestants, comparison, size
from foveal.kernels.quantize.op import nearest_code

_VECTORS, _CODES, _DIM = size(77_824, 70), size(8192, 65), 64


@comparison("nearest code, 77824 vectors, 8192 codes, D64", baseline="addmm, argmin", devices=("cuda",), flops=2.0 * _VECTORS * _CODES * _DIM)
def tokens() -> Contestants:
    torch.manual_seed(0)
    x, codebook = torch.randn(_VECTORS, _DIM), torch.randn(_CODES, _DIM)
    return {
        "foveal": lambda: nearest_code(x, codebook),
        "addmm, argmin": lambda: torch.addmm(codebook.square().sum(1), x, codebook.mT, alpha=-2).argmin(1),
        "torch.cdist, argmin": lambda: torch.cdist(x, codebook).argmin(1),
    }
