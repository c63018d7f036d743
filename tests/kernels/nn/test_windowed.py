"""Windowed attentions beside their papers' formulas in float64, cell by cell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveal.kernels.nn import AreaAttention, HaloAttention, HiLoAttention


@pytest.mark.parametrize("beyond", ["masked", "zeros"])
@pytest.mark.parametrize(("block", "halo"), [(4, 1), (3, 2), (2, 0)])
@pytest.mark.parametrize(("height", "width"), [(8, 4), (5, 7), (1, 3)])
def test_halo_attention_is_the_papers_formula(lively, draw, block, halo, height, width, beyond) -> None:
    layer = lively(HaloAttention(8, 2, block=block, halo=halo, beyond=beyond))
    x = draw(2, height, width, 8)
    q, k, v = layer.qkv(x).chunk(3, -1)
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    expected = torch.zeros(2, height, width, 8, dtype=torch.float64)
    for y in range(height):
        for c in range(width):
            top, left = y // block * block - halo, c // block * block - halo
            window = [(ky, kx) for ky in range(top, top + block + 2 * halo) for kx in range(left, left + block + 2 * halo)]
            on_map = {(ky, kx): 0 <= ky < height and 0 <= kx < width for ky, kx in window}
            seen = [place for place in window if on_map[place] or beyond == "zeros"]
            for h in range(2):
                own = slice(4 * h, 4 * h + 4)
                rows, columns = (
                    layer.rel_height[[p[0] - y + block + halo - 1 for p in seen]],
                    layer.rel_width[[p[1] - c + block + halo - 1 for p in seen]],
                )
                keys, values = (torch.stack([t[:, ky, kx, own] if on_map[ky, kx] else nothing for ky, kx in seen], 1) for t in (k, v))
                weights = torch.softmax(((keys + rows + columns) @ q[:, y, c, own, None]).squeeze(-1) / 2, -1)
                expected[:, y, c, own] = (weights[:, None] @ values).squeeze(1)
    torch.testing.assert_close(layer(x), layer.proj(expected))


def test_halo_attention_moves_with_the_map_by_whole_blocks(lively, draw) -> None:
    layer = lively(HaloAttention(8, 2, block=3, halo=1))
    x = draw(1, 15, 15, 8)
    shifted = layer(x.roll((3, 3), (1, 2)))
    torch.testing.assert_close(shifted[:, 6:12, 6:12], layer(x)[:, 3:9, 3:9])


def test_halo_attention_sees_nothing_beyond_its_halo(lively, draw) -> None:
    layer = lively(HaloAttention(8, 2, block=2, halo=1))
    x = draw(1, 8, 8, 8)
    changed = x.clone()
    changed[:, 5:] = 7.0
    torch.testing.assert_close(layer(changed)[:, :4], layer(x)[:, :4])


@pytest.mark.parametrize(("window", "alpha", "height", "width"), [(2, 0.5, 4, 6), (3, 0.5, 7, 5), (2, 0.0, 5, 4), (2, 1.0, 3, 5), (1, 0.5, 3, 4)])
def test_hilo_attention_is_the_papers_formula(lively, draw, softmax_weights, heads_of, tokens_of, window, alpha, height, width) -> None:
    layer = lively(HiLoAttention(16, 4, window=window, alpha=alpha))
    x = draw(2, height, width, 16)
    parts = []
    if layer.h_heads:
        high = torch.zeros(2, height, width, 4 * layer.h_heads, dtype=torch.float64)
        for top in range(0, height, window):
            for left in range(0, width, window):
                cut = (slice(None), slice(top, top + window), slice(left, left + window))
                q, k, v = (heads_of(t, layer.h_heads) for t in layer.h_qkv(x[cut]).chunk(3, -1))
                high[cut] = tokens_of(softmax_weights(q, k) @ v).view(high[cut].shape)
        parts.append(layer.h_proj(high))
    if layer.l_heads:
        pooled = [
            [x[:, top : top + window, left : left + window].mean((1, 2)) for left in range(0, width, window)] for top in range(0, height, window)
        ]
        pooled = torch.stack([torch.stack(row, 1) for row in pooled], 1)
        q = heads_of(layer.l_q(x), layer.l_heads)
        k, v = (heads_of(t, layer.l_heads) for t in layer.l_kv(pooled).chunk(2, -1))
        parts.append(layer.l_proj(tokens_of(softmax_weights(q, k) @ v).view(2, height, width, -1)))
    torch.testing.assert_close(layer(x), torch.cat(parts, -1))


def test_hilo_parameters_have_the_names_and_shapes_of_the_authors_code() -> None:
    shapes = {name: tuple(value.shape) for name, value in HiLoAttention(32, 8, alpha=0.25, bias=True).state_dict().items()}
    assert shapes == {
        "l_q.weight": (8, 32),
        "l_q.bias": (8,),
        "l_kv.weight": (16, 32),
        "l_kv.bias": (16,),
        "l_proj.weight": (8, 8),
        "l_proj.bias": (8,),
        "h_qkv.weight": (72, 32),
        "h_qkv.bias": (72,),
        "h_proj.weight": (24, 24),
        "h_proj.bias": (24,),
    }


@pytest.mark.parametrize(("areas", "height", "width"), [(4, 8, 3), (4, 5, 5), (1, 3, 4), (5, 2, 2)])
def test_area_attention_is_the_papers_formula(lively, draw, softmax_weights, heads_of, tokens_of, areas, height, width) -> None:
    layer = lively(AreaAttention(12, 3, areas=areas, kernel_size=5))
    x = draw(2, height, width, 12)
    q, k, v = layer.qkv(x).flatten(1, 2).chunk(3, -1)
    size = -(-height * width // areas)
    strips = []
    for start in range(0, height * width, size):
        cut = slice(start, start + size)
        strips.append(tokens_of(softmax_weights(heads_of(q[:, cut], 3), heads_of(k[:, cut], 3)) @ heads_of(v[:, cut], 3)))
    out = torch.cat(strips, 1).view(2, height, width, 12)
    position = F.conv2d(v.view(2, height, width, 12).permute(0, 3, 1, 2), layer.position.weight, layer.position.bias, padding=2, groups=12)
    torch.testing.assert_close(layer(x), layer.proj(out + position.permute(0, 2, 3, 1)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HaloAttention(16, 2, block=0), "block must be positive"),
        (lambda: HaloAttention(400, 2, block=30, halo=3), "must be at most 256; got 272"),
        (lambda: HaloAttention(16, 2, beyond="mirror"), "beyond must be .zeros. or .masked."),
        (lambda: HiLoAttention(16, 4, alpha=1.5), "alpha from 0 to 1"),
        (lambda: HiLoAttention(16, 4, head_dim=8), "head_dim must be dim // heads = 4"),
        (lambda: AreaAttention(16, 4, areas=0), "areas must be positive"),
    ],
)
def test_numbers_that_do_not_fit_are_named(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()
