"""Linear attention over whole sequences, without positions or causality, and the pre-norm layers made of it.

Queries are softmaxed over their features and keys over the sequence, so a layer costs time and memory linear in length (Shen et al., "Efficient
Attention", WACV 2021; the form of the package linear-attention-transformer that the authors of TFM-Tokenizer use):

    out_n = D^-1/2 softmax_d(q_n) . sum_m softmax_m(k_m) v_m^T
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveal.eeg.models.pointwise import linear_add, linear_gelu
from foveal.kernels import efficient_attention


class LinearAttentionLayer(nn.Module):
    """x + dropout(attention(norm(x))), then x + feed_forward(norm(x)).

    Args:
        width: features of a token.
        heads: of the attention; they divide the width.
        dropout: behind the attention. The authors drop nothing in the feed-forward part.
        expansion: hidden width of the feed-forward part, in widths.
    """

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.2, expansion: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length width"]:
        """Tokens in, tokens out; positions where `mask` is false are not attended to."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = efficient_attention(q, k, v, mask=mask, layout="bnhd").flatten(2)
        x = x + self.dropout(self.project(attended)) if self.training else linear_add(attended, self.project, x)
        return linear_add(linear_gelu(self.feed_forward_norm(x), self.expand), self.contract, x)


class LinearAttentionStack(nn.Sequential):
    """Layers one after the other; there is no norm behind the last.

    Args:
        layers: their number.
        width: features of a token.
        heads: of every layer.
        dropout: of every layer.
    """

    def __init__(self, layers: int, width: int, heads: int = 8, dropout: float = 0.2) -> None:
        super().__init__(*(LinearAttentionLayer(width, heads, dropout) for _ in range(layers)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As the layers."""
        for layer in self:
            x = layer(x, mask)
        return x
