"""How often the right partner is among the nearest: Recall@k of images for texts and of texts for images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ranks(similarity: Float[Tensor, "queries candidates"], fitting: Bool[Tensor, "queries candidates"]) -> Int[Tensor, " queries"]:
    """Place of the best fitting candidate of each query, from 1. Candidates of equal similarity count before it: a model that cannot tell is wrong.

    Raises:
        ValueError: a query that nothing fits.
    """
    if not bool(fitting.any(1).all()):
        raise ValueError("expected a fitting candidate for every query")
    best = similarity.masked_fill(~fitting, float("-inf")).amax(1, keepdim=True)
    return 1 + ((similarity >= best) & ~fitting).sum(1)


def same_text(texts: Sequence[str]) -> Bool[Tensor, "texts texts"]:
    """Which pairs say the same: a text that stands beside several images fits each of them."""
    number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    numbers = torch.tensor([number[text] for text in texts])
    return numbers[:, None] == numbers[None]


def recalls(
    image: Float[Tensor, "pairs width"], text: Float[Tensor, "pairs width"], texts: Sequence[str], at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k in both directions, and the median rank.

    Args:
        image: unit vectors.
        text: unit vectors, one for each image.
        texts: what they say; equal ones fit each other's images.
        at: the k; one that is not below the number of pairs says nothing and is left out.
    """
    similarity, fitting = image @ text.mT, same_text(texts).to(image.device)
    out: dict[str, float] = {}
    for direction, found in (("image_to_text", ranks(similarity, fitting)), ("text_to_image", ranks(similarity.mT, fitting))):
        out |= {f"{direction}_recall_at_{k}": float((found <= k).double().mean()) for k in at if k < len(texts)}
        out[f"{direction}_median_rank"] = float(found.double().quantile(0.5))
    return out
