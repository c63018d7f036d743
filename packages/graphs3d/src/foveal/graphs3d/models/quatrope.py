"""QuatRoPE with its isolated gated extension (IGRE): what objects' places add to the logits of a language model's attention.

arXiv 2603.24721, CVPR 2026. Object tokens get a vector u; the logit of two object tokens gains u_i . u_j, that of any other pair exactly 0.

`official` is what the released code computes: three numbers from one frequency in which x has no part, not invariant under translations, and with
the scale ``1 / sqrt(head_dim + 3)`` for all logits. It is for the authors' checkpoints. `paper` is what the paper states: unit quaternions turned by
the point, several frequencies, so that u_i . u_j depends on the difference of two points alone, in all of x, y and z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveal.kernels.positions import quatrope_extension, rotary_quaternion

MODES = ("official", "paper")


@dataclass(frozen=True)
class QuatRoPEConfig:
    """How points become logits.

    Attributes:
        mode: "official" or "paper".
        head_dim: of the attention that is extended.
        base: official: of the rotary embedding beside it.
        fused_scale: official: all logits times ``1 / sqrt(head_dim + 3)``, as the released fused attention has it; otherwise text keeps
            ``1 / sqrt(head_dim)``, as in its eager form.
        dims: paper: channels, a multiple of 12, so that every coordinate has its share; 12 channels are one frequency.
        shortest: paper: shortest period in metres.
        longest: paper: longest period; scenes that are larger alias.
        strength: paper: the logit that an object's token gains with itself; half the spread between near and far.
    """

    mode: str = "paper"
    head_dim: int = 128
    base: float = 10_000.0
    fused_scale: bool = True
    dims: int = 48
    shortest: float = 1.0
    longest: float = 24.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.dims < 12 or self.dims % 12:
            raise ValueError(f"dims must be a positive multiple of 12; got {self.dims}")

    @property
    def scale(self) -> float:
        """Factor of the logits of text."""
        return (self.head_dim + 3) ** -0.5 if self.mode == "official" and self.fused_scale else self.head_dim**-0.5


def objects_of(points: Float[Tensor, "batch length 3"]) -> Bool[Tensor, "batch length"]:
    """Tokens that are objects: rows that are not all zero."""
    return (points != 0).any(-1)


def centred(points: Float[Tensor, "batch length 3"], objects: Bool[Tensor, "batch length"]) -> Float[Tensor, "batch length 3"]:
    """Points about their scene's mean: differences stay as they are, and single precision is spent on the scene and not on where it lies."""
    wide = points.double()
    mean = (wide * objects.unsqueeze(-1)).sum(1, keepdim=True) / objects.sum(1).clamp(min=1)[:, None, None]
    return ((wide - mean) * objects.unsqueeze(-1)).to(torch.promote_types(points.dtype, torch.float32))


def extension(
    points: Float[Tensor, "batch length 3"], config: QuatRoPEConfig, objects: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "batch length dims"]:
    """The vectors u of all tokens: zeros where there is no object.

    Args:
        points: centres of boxes in metres; rows of zeros for text.
        config: how.
        objects: paper: which tokens are objects, where one may lie at the origin; default: rows that are not zero.
    """
    if config.mode == "official":
        return quatrope_extension(points, config.head_dim, base=config.base)
    objects = objects_of(points) if objects is None else objects
    places = centred(points, objects)
    unit = torch.full((*places.shape[:2], config.dims), (2 / config.dims) ** 0.5, dtype=places.dtype, device=places.device)
    unit[..., 1::2] = 0  # each pair of channels starts at angle 0, and together they have length 1
    turned = rotary_quaternion(unit.unsqueeze(1), None, places, shortest=config.shortest, longest=config.longest).squeeze(1)
    return turned * objects.unsqueeze(-1)


def object_logits(
    query: Float[Tensor, "batch query dims"], key: Float[Tensor, "batch key dims"], config: QuatRoPEConfig
) -> Float[Tensor, "batch 1 query key"]:
    """What is added to the scaled logits of all heads, exactly 0 where one of two tokens is text."""
    return (query @ key.transpose(-1, -2)).unsqueeze(1) * (config.scale if config.mode == "official" else config.strength)


class LearnedExtension(nn.Module):
    """IGRE for a network that is trained with it: u is a projection of the token's own state, turned by its point, times a gate of each head.

    With states in it the logit can say "the chair looks for what stands to its left"; it still sees differences of points alone.

    Args:
        width: of the states.
        heads: of the attention.
        config: frequencies and channels of `paper`.
    """

    def __init__(self, width: int, heads: int, config: QuatRoPEConfig) -> None:
        super().__init__()
        self.heads, self.config = heads, config
        self.query = nn.Linear(width, heads * config.dims)
        self.key = nn.Linear(width, heads * config.dims)
        self.gate = nn.Parameter(torch.ones(heads))

    def forward(
        self, states: Float[Tensor, "batch length width"], points: Float[Tensor, "batch length 3"], objects: Bool[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch heads length dims"], Float[Tensor, "batch heads length dims"]]:
        """Channels to append to q and k."""
        q, k = (project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key))
        q, k = rotary_quaternion(q, k, centred(points, objects), shortest=self.config.shortest, longest=self.config.longest)
        isolated = objects[:, None, :, None]
        return q * isolated * self.gate[:, None, None], k * isolated
