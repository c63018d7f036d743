"""LSceneLLM's adaptive magnifier: a text token looks closer at the places of a scene that the layer before attended to.

Zhi et al., arXiv 2412.01292, CVPR 2025, from the published idea (its code has no licence). A scene is a row of coarse tokens; each has a few dense
ones, features of its own neighbourhood. A query may attend to the dense tokens of scene token t where its attention to t in the previous layer,
summed over heads and stretched to 0..1 over the scene's tokens, exceeds a threshold.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveal.kernels import attention

#: The released setting: 96 of 0..255.
THRESHOLD = 96 / 255


def admitted(
    previous: Float[Tensor, "batch heads query key"], scene: slice, dense_tokens: int, threshold: float = THRESHOLD
) -> Bool[Tensor, "batch query dense"]:
    """Which dense tokens a query may attend to.

    Args:
        previous: attention probabilities of the layer before.
        scene: columns of the scene's tokens.
        dense_tokens: how many each of them has, standing together.
        threshold: 0 to 1; a query whose attention is the same everywhere admits nothing.
    """
    paid = previous[..., scene].sum(1)
    low, high = paid.aminmax(dim=-1, keepdim=True)
    stretched = (paid - low) / (high - low).clamp(min=torch.finfo(paid.dtype).tiny)
    return (stretched > threshold).repeat_interleave(dense_tokens, -1)


class AdaptiveMagnifier(nn.Module):
    r"""Attention of text over a sequence and the admitted dense tokens, blended with attention over the sequence alone.

    .. math:: o = (1 - \alpha) \, attention(q, K, V) + \alpha \, attention(q, [K; K_d], [V; V_d])

    Args:
        width: of the model.
        heads: of its attention.
        dense_width: of the dense features.
        dense_tokens: of each scene token.
        threshold: of admission.
        warm_up: calls in training over which alpha grows from 0 to 1.
    """

    def __init__(self, width: int, heads: int, dense_width: int, dense_tokens: int = 4, threshold: float = THRESHOLD, warm_up: int = 1000) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads; got {width} and {heads}")
        self.heads, self.dense_tokens, self.threshold, self.warm_up = heads, dense_tokens, threshold, warm_up
        self.project = nn.Sequential(nn.Linear(dense_width, width), nn.GELU(), nn.Linear(width, 2 * width))
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def alpha(self) -> float:
        """Share of the extended attention."""
        return 1.0 if self.warm_up <= 0 else min(1.0, float(self.steps) / self.warm_up)

    def forward(
        self,
        q: Float[Tensor, "batch heads query dim"],
        k: Float[Tensor, "batch kv_heads key dim"],
        v: Float[Tensor, "batch kv_heads key dim"],
        dense: Float[Tensor, "batch dense dense_width"],
        previous: Float[Tensor, "batch heads query key"],
        scene: slice,
        visible: Bool[Tensor, "batch 1 query key"],
        text: Bool[Tensor, "batch query"],
    ) -> Float[Tensor, "batch heads query dim"]:
        """The layer's attention.

        Args:
            q: queries.
            k: keys of the sequence.
            v: values of the sequence.
            dense: features, `dense_tokens` for each scene token in turn.
            previous: probabilities of the layer before.
            scene: columns of the scene's tokens in the sequence.
            visible: what a query may see of the sequence.
            text: queries that are text; all others keep the sequence alone.
        """
        tokens = len(range(*scene.indices(k.shape[2])))
        if dense.shape[1] != tokens * self.dense_tokens:
            raise ValueError(f"dense must have {self.dense_tokens} rows for each of {tokens} scene tokens; got {tuple(dense.shape)}")
        plain = attention(q, k, v, mask=visible)
        if self.training:
            self.steps += 1
        if self.alpha == 0:
            return plain
        dense_k, dense_v = self.project(dense).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        groups = self.heads // k.shape[1]
        keys, values = (torch.cat((own.repeat_interleave(groups, 1), more), 2) for own, more in ((k, dense_k), (v, dense_v)))
        closer = admitted(previous, scene, self.dense_tokens, self.threshold).unsqueeze(1)
        extended = attention(q, keys, values, mask=torch.cat((visible.expand(len(q), 1, -1, -1), closer), -1))
        share = self.alpha * text[:, None, :, None].to(plain.dtype)
        return plain + share * (extended - plain)
