"""Attention in windows of a map: blocks that look beyond their border (HaloNet), and windows beside a pooled whole (HiLo)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.kernels.dense.op import attention
from foveal.kernels.nn.heads import check_map, merge_heads, split_heads, width_of_heads

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


#: Widest q that the attention kernels take.
LARGEST_DIM = 256


class HaloAttention(nn.Module):
    r"""Blocked local attention: the queries of a block look at the block and at a halo around it, with relative positions.

    .. math:: o_i = \sum_j \mathrm{softmax}_j\big(s\, q_i \cdot (k_j + r^h_{y_j - y_i} + r^w_{x_j - x_i})\big)\, v_j

    over the keys j of the (block + 2 halo) x (block + 2 halo) window around i's block. The position terms are extra columns of q beside one-hot rows
    and columns of k: no bias array of (query, key) is made.

    Args:
        dim: channels of the map.
        heads: number of heads.
        block: side of a block of queries.
        halo: how many cells its window reaches beyond it.
        beyond: keys outside the map: "zeros" take part with k = v = 0, as in the paper; "masked" do not, so that a border weighs what is there.
        head_dim: width of a head; dim // heads by default.
        bias: whether the projection of q, k and v adds a bias.

    Raises:
        ValueError: the numbers do not fit, or head_dim + 2 (block + 2 halo) is over 256.

    References:
        Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet), CVPR 2021
        (arXiv:2103.12731); relative positions of Shaw et al. as in Ramachandran et al., 2019. The widespread lucidrains/halonet-pytorch
        masks the cells inside the map instead of those outside.
    """

    def __init__(
        self, dim: int, heads: int, *, block: int = 8, halo: int = 3, beyond: str = "zeros", head_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, width_of_heads(dim, heads, head_dim)
        if block < 1 or halo < 0:
            raise ValueError(f"block must be positive and halo not negative; got block {block} and halo {halo}")
        if beyond not in ("zeros", "masked"):
            raise ValueError(f"beyond must be 'zeros' or 'masked'; got {beyond!r}")
        self.block, self.halo, self.side, self.beyond = block, halo, block + 2 * halo, beyond
        if self.head_dim + 2 * self.side > LARGEST_DIM:
            raise ValueError(f"head_dim + 2 * (block + 2 * halo) must be at most {LARGEST_DIM}; got {self.head_dim + 2 * self.side}")
        inner = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=bias)
        self.proj = nn.Linear(inner, dim)
        self.rel_height = nn.Parameter(torch.randn(2 * (block + halo) - 1, self.head_dim) * self.head_dim**-0.5)
        self.rel_width = nn.Parameter(torch.randn(2 * (block + halo) - 1, self.head_dim) * self.head_dim**-0.5)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        """The map attends to itself; any height and width."""
        check_map(x, self.dim)
        batch, height, width, _ = x.shape
        down, right = -height % self.block, -width % self.block
        q, k, v = self.qkv(x).chunk(3, -1)
        q = self._blocks(F.pad(q, (0, 0, 0, right, 0, down)), self.block)
        k, v = (self._blocks(self._pad(t, down, right), self.side) for t in (k, v))
        mask = None
        if self.beyond == "masked":
            mask = self._blocks(self._pad(x.new_ones(1, height, width, 1), down, right), self.side)[..., 0].bool().repeat(batch, 1)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        rows, columns = self.positions(q)
        cells = torch.eye(self.side, dtype=q.dtype, device=q.device)
        places = torch.cat([cells.repeat_interleave(self.side, 0), cells.repeat(self.side, 1)], 1).expand(*k.shape[:2], -1, -1)
        out = attention(torch.cat([q, rows, columns], -1), torch.cat([k, places], -1), v, mask=mask, scale=self.head_dim**-0.5)
        grid = (batch, (height + down) // self.block, (width + right) // self.block, self.block, self.block, -1)
        out = merge_heads(out).view(grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return self.proj(out[:, :height, :width])

    def positions(self, q: Float[Tensor, "blocks heads query dim"]) -> tuple[Float[Tensor, "blocks heads query side"], ...]:
        """q_i . r for each row of the window, and for each column of it."""
        q = q.unflatten(2, (self.block, self.block))
        last = self.block - 1
        rows, columns = q @ self.rel_height.to(q.dtype).mT, q @ self.rel_width.to(q.dtype).mT
        rows = torch.stack([rows[:, :, y, :, last - y : last - y + self.side] for y in range(self.block)], 2)
        columns = torch.stack([columns[:, :, :, i, last - i : last - i + self.side] for i in range(self.block)], 3)
        return rows.flatten(2, 3), columns.flatten(2, 3)

    def _pad(self, x: Tensor, down: int, right: int) -> Tensor:
        return F.pad(x, (0, 0, self.halo, self.halo + right, self.halo, self.halo + down))

    def _blocks(self, x: Tensor, side: int) -> Float[Tensor, "blocks cells channels"]:
        """The windows of `side`, one every `block` cells, row by row."""
        windows = x.unfold(1, side, self.block).unfold(2, side, self.block)
        return windows.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2)


class HiLoAttention(nn.Module):
    r"""HiLo attention: some heads look inside small windows (high frequencies), the others at the pooled map (low frequencies).

    .. math:: y = [W_H\, \mathrm{MHA}_{s \times s}(x),\; W_L\, \mathrm{MHA}(q = x,\; k = v = \mathrm{avgpool}_s\, x)]

    Args:
        dim: channels of the map, a multiple of heads.
        heads: number of heads.
        window: s; 1 makes every head a plain attention over the whole map.
        alpha: share of the heads that look at the pooled map, 0 to 1.
        head_dim: width of a head, which must be dim // heads; given only to be checked.
        bias: whether the projections of queries, keys and values add a bias.

    Raises:
        ValueError: the numbers do not fit.

    References:
        Pan et al., Fast Vision Transformers with HiLo Attention, NeurIPS 2022 (arXiv:2205.13213). Parameter names and shapes are those of
        the authors' hilo.py (ziplab/LITv2), which takes maps of whole windows only: here windows at the border are masked and pooled over what is
        there.
    """

    def __init__(self, dim: int, heads: int, *, window: int = 2, alpha: float = 0.5, head_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim, self.window = dim, heads, width_of_heads(dim, heads, None), window
        if head_dim not in (None, self.head_dim):
            raise ValueError(f"head_dim must be dim // heads = {self.head_dim}: the heads' outputs are the channels; got {head_dim}")
        if window < 1 or not 0 <= alpha <= 1:
            raise ValueError(f"window must be positive and alpha from 0 to 1; got window {window} and alpha {alpha}")
        self.l_heads = heads if window == 1 else int(heads * alpha)
        self.h_heads = heads - self.l_heads
        l_dim, h_dim = self.l_heads * self.head_dim, self.h_heads * self.head_dim
        if self.l_heads:
            self.l_q = nn.Linear(dim, l_dim, bias=bias)
            self.l_kv = nn.Linear(dim, 2 * l_dim, bias=bias)
            self.l_proj = nn.Linear(l_dim, l_dim)
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * h_dim, bias=bias)
            self.h_proj = nn.Linear(h_dim, h_dim)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        """The map attends to itself; any height and width. The window heads' channels come first."""
        check_map(x, self.dim)
        parts = [self.high(x)] if self.h_heads else []
        return torch.cat([*parts, self.low(x)] if self.l_heads else parts, -1)

    def high(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width high"]:
        """The window heads."""
        height, width = x.shape[1:3]
        windows, mask = into_windows(x, self.window)
        q, k, v = (split_heads(t, self.h_heads) for t in self.h_qkv(windows).chunk(3, -1))
        out = merge_heads(attention(q, k, v, mask=mask))
        return self.h_proj(out_of_windows(out, self.window, height, width))

    def low(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width low"]:
        """The heads that look at the pooled map."""
        pooled = x
        if self.window > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)
        q = split_heads(self.l_q(x).flatten(1, 2), self.l_heads)
        k, v = (split_heads(t, self.l_heads) for t in self.l_kv(pooled).flatten(1, 2).chunk(2, -1))
        return self.l_proj(merge_heads(attention(q, k, v)).view(*x.shape[:3], -1))


def into_windows(
    x: Float[Tensor, "batch height width dim"], side: int
) -> tuple[Float[Tensor, "windows cells dim"], Bool[Tensor, "windows cells"] | None]:
    """Square windows row by row, and which of their cells lie on the map (None where all do)."""
    batch, height, width, dim = x.shape
    down, right = -height % side, -width % side
    x = F.pad(x, (0, 0, 0, right, 0, down))
    rows, columns = (height + down) // side, (width + right) // side
    windows = x.view(batch, rows, side, columns, side, dim).transpose(2, 3).reshape(-1, side * side, dim)
    if not down and not right:
        return windows, None
    row = torch.arange(height + down, device=x.device) < height
    column = torch.arange(width + right, device=x.device) < width
    inside = (row[:, None] & column).view(rows, side, columns, side).transpose(1, 2).reshape(1, -1, side * side)
    return windows, inside.expand(batch, -1, -1).flatten(0, 1)


def out_of_windows(windows: Float[Tensor, "windows cells dim"], side: int, height: int, width: int) -> Float[Tensor, "batch height width dim"]:
    """The map that `into_windows` cut."""
    rows, columns = -(-height // side), -(-width // side)
    x = windows.view(-1, rows, columns, side, side, windows.shape[-1]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width]
