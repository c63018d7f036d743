"""Efficient attention on a GPU at an EEG tokeniser's shape: very many short, narrow heads, whose cost is reading them."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, size
from foveal.kernels.efficient.op import efficient_attention

_BATCH, _LENGTH, _HEADS, _DIM = size(65_536, 2), size(20, 12), size(8, 2), 8
#: Bytes of q, k, v and the output in float32, and backward of these and their gradients.
_TRAFFIC = 4.0 * 4 * _BATCH * _LENGTH * _HEADS * _DIM


@comparison(
    "efficient attention, B65536 H8 N20 D8, forward+backward", baseline="softmax, softmax, two einsums", devices=("cuda",), traffic=3 * _TRAFFIC
)
def tokens_of_an_eeg() -> Contestants:
    torch.manual_seed(0)
    joined = torch.randn(_BATCH, _LENGTH, 3, _HEADS, _DIM, requires_grad=True)

    def composed() -> Tensor:
        q, k, v = joined.unbind(2)
        context = torch.einsum("bnhd,bnhe->bhde", k.softmax(1), v)
        return torch.einsum("bnhd,bhde->bnhe", q.softmax(-1) * _DIM**-0.5, context)

    return {
        "foveal": forward_and_backward(lambda: efficient_attention(*joined.unbind(2), layout="bnhd"), [joined]),
        "softmax, softmax, two einsums": forward_and_backward(composed, [joined]),
    }
