"""Vector quantisation with a codebook that follows its vectors: nearest code, and an exponential moving average of what each code was given.

van den Oord et al., "Neural Discrete Representation Learning", NeurIPS 2017, appendix A.1. `official` is the released TFM-Tokenizer: codes start
near zero and a code that is given nothing fades away for good. `fixed` starts from the first batch, and codes that fall out of use are born again
at vectors of the batch, drawn with a probability that grows with the squared distance to their nearest code, as k-means++ draws its centres (Arthur
and Vassilvitskii, SODA 2007): a new code goes where the codebook is coarsest. Drawn evenly they would crowd where codes are dense already. The
processes of a distributed run share counts and births, so that they keep one codebook.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Mode = Literal["official", "fixed"]

_ROWS = 512  # vectors looked up at a time: 16 MB of distances to 8192 codes, however many vectors there are
LIVE = 1e-3  # a code with a smaller norm has faded: the released models hold such rows at 1e-39


def nearest_code(vectors: Float[Tensor, "vectors dim"], codes: Float[Tensor, "codes dim"]) -> Int[Tensor, " vectors"]:
    """For every vector the index of the code at the smallest Euclidean distance; of equally near ones the first."""
    half = codes.square().sum(1) / 2
    found = [torch.addmm(half, block, codes.T, alpha=-1).argmin(1) for block in vectors.split(_ROWS)]
    return torch.cat(found) if found else vectors.new_zeros(0, dtype=torch.long)


class Codebook(nn.Module):
    """`codes` vectors of `width` numbers that learn by moving averages, not by gradient.

    Args:
        codes: how many.
        width: numbers in each.
        mode: ``official`` or ``fixed``; see the module.
        decay: of the averages.
        eps: added to every count before it divides.
        revive_below: in fixed mode, a code whose average count falls below this share of the mean one is born again.
    """

    weight: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int, mode: Mode = "fixed", decay: float = 0.99, eps: float = 1e-5, revive_below: float = 0.1) -> None:
        super().__init__()
        self.mode, self.decay, self.eps, self.revive_below = mode, decay, eps, revive_below
        self.register_buffer("weight", torch.empty(codes, width).uniform_(-1 / codes, 1 / codes))
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", self.weight.clone())
        self._live: tuple[int, Tensor] | None = None

    def forward(self, vectors: Float[Tensor, "*batch width"], follow: bool = True) -> tuple[Float[Tensor, "*batch width"], Int[Tensor, "*batch"]]:
        """The nearest code of each vector, without gradient, and its index. In training the codebook then follows the vectors, if it is to."""
        flat = vectors.detach().flatten(0, -2)
        if self.training and self.mode == "fixed" and not self.counts.any():
            self._start_from(flat)
        index = nearest_code(flat, self.weight.to(flat.dtype)) if self.training else self.lookup(flat)
        quantized = self.weight[index].view_as(vectors).to(vectors.dtype)
        if self.training and follow:
            self._follow(flat, index)
        return quantized, index.view(vectors.shape[:-1])

    def lookup(self, vectors: Float[Tensor, "vectors width"]) -> Int[Tensor, " vectors"]:
        """As `nearest_code`, over the live codes and one faded code only: all faded codes lie at the origin, as near as one another."""
        if self._live is None or self._live[0] != self.weight._version or self._live[1].device != self.weight.device:
            norms = self.weight.norm(dim=1)
            faded = (norms <= LIVE).nonzero()[:, 0]
            kept = norms > LIVE
            if len(faded):
                kept[faded[0]] = True
            self._live = (self.weight._version, kept.nonzero()[:, 0])
        live = self._live[1]
        if len(live) == len(self.weight):
            return nearest_code(vectors, self.weight.to(vectors.dtype))
        return live[nearest_code(vectors, self.weight[live].to(vectors.dtype))]

    @torch.no_grad()
    def _start_from(self, vectors: Tensor) -> None:
        """Every code at a vector of the first batch; where the batch is smaller than the codebook, again, and a little beside it."""
        rows = torch.randint(len(vectors), (len(self.weight),), device=vectors.device)
        rows[: len(vectors)] = torch.randperm(len(vectors), device=vectors.device)[: len(rows)]
        chosen = vectors[rows].to(self.weight.dtype)
        chosen[len(vectors) :] += 0.01 * torch.randn_like(chosen[len(vectors) :])
        if self._shared:
            torch.distributed.broadcast(chosen, 0)
        self.weight.copy_(chosen)
        self.sums.copy_(chosen)
        self.counts.fill_(1.0)

    @torch.no_grad()
    def _follow(self, vectors: Tensor, index: Tensor) -> None:
        vectors = vectors.to(self.sums.dtype)
        given = torch.bincount(index, minlength=len(self.counts)).to(self.counts.dtype)
        summed = torch.zeros_like(self.sums).index_add_(0, index, vectors)
        if self._shared:
            torch.distributed.all_reduce(given)
            torch.distributed.all_reduce(summed)
        self.counts.mul_(self.decay).add_(given, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(summed, alpha=1 - self.decay)
        if self.mode == "fixed":
            self._revive(vectors, index)
        total = self.counts.sum()
        smoothed = (self.counts + self.eps) / (total + len(self.counts) * self.eps) * total
        self.weight.copy_(self.sums / smoothed[:, None])

    def _revive(self, vectors: Tensor, index: Tensor) -> None:
        """Codes with too small a count are born again with the mean count, so that they have time to find vectors of their own."""
        mean = self.counts.mean()
        forgotten = (self.counts < self.revive_below * mean).nonzero()[:, 0]
        if not len(forgotten):
            return
        far = (vectors - self.weight[index]).square().sum(1).clamp(min=1e-12)
        born = vectors[torch.multinomial(far, len(forgotten), replacement=len(forgotten) > len(vectors))]
        if self._shared:
            torch.distributed.broadcast(born, 0)
        self.counts[forgotten] = mean
        self.sums[forgotten] = born * mean

    @property
    def _shared(self) -> bool:
        return self.mode == "fixed" and torch.distributed.is_available() and torch.distributed.is_initialized()
