"""QuatRoPE in language models of Hugging Face transformers, put in and taken out again without touching their weights.

    patch = add_quatrope(model, mode="official")
    with patch.objects(points):                       # (batch, prompt tokens, 3) metres; rows of zeros for text
        model.generate(input_ids, attention_mask=mask)
    patch.remove()

Any decoder whose attention calls transformers' attention interface (Llama, Vicuna, Mistral, Qwen, ...) takes it, with ``sdpa`` or ``eager``.
Outside `objects` the model runs its own attention, to the bit. With a cache the places of the prompt are kept; tokens that are generated are text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveal.graphs3d.models.quatrope import QuatRoPEConfig, extension, object_logits

_PREFIX = "foveal_quatrope_"


class QuatRoPEPatch:
    """A model with QuatRoPE in its attention; made by `add_quatrope`.

    Attributes:
        model: the patched model.
        config: how points become logits.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module], config: QuatRoPEConfig, original: str) -> None:
        self.model, self.config = model, config
        self._layers, self._original = layers, original
        self._vectors: Tensor | None = None

    @contextmanager
    def objects(self, points: Float[Tensor, "batch length 3"], mask: Bool[Tensor, "batch length"] | None = None) -> Iterator[None]:
        """Inside the block the first tokens of every sequence lie at `points`; calls that continue a cache go on behind them.

        Args:
            points: centres of boxes in metres, one row a token of the prompt, rows of zeros for text. Left padding counts as text.
            mask: paper mode: which tokens are objects, where one may lie at the origin.

        Raises:
            ValueError: not such a shape.
        """
        if points.dim() != 3 or points.shape[-1] != 3:
            raise ValueError(f"points must have shape (batch, tokens, 3); got {tuple(points.shape)}")
        self._vectors = extension(points, self.config, mask)
        try:
            yield
        finally:
            self._vectors = None

    def remove(self) -> None:
        """Give the model its own attention back."""
        for layer in self._layers:
            del layer.foveal_quatrope
        self.model.config._attn_implementation = self._original  # type: ignore[union-attr]

    def logits(self, batch: int, queries: int, keys: int, like: Tensor) -> Tensor | None:
        """What objects add, (batch, 1, queries, keys), for the last `queries` of `keys` tokens; None without objects."""
        if self._vectors is None:
            return None
        vectors = self._vectors.to(like.device)
        if batch % len(vectors):
            raise ValueError(f"points were given for {len(vectors)} sequences; the model is called with {batch}")
        vectors = vectors.repeat_interleave(batch // len(vectors), 0)  # beams, and sequences that share a prompt, stand next to each other
        room = vectors.new_zeros(batch, max(0, keys - vectors.shape[1]), vectors.shape[2])
        vectors = torch.cat((vectors, room), 1)[:, :keys]
        return object_logits(vectors[:, keys - queries :], vectors, self.config).to(like.dtype)


def add_quatrope(model: nn.Module, mode: str = "paper", **settings: Any) -> QuatRoPEPatch:
    """Put QuatRoPE into the attention of a transformers model.

    Args:
        model: a decoder of transformers with ``sdpa`` or ``eager`` attention.
        mode: "paper", or "official" for the authors' checkpoints.
        **settings: of `QuatRoPEConfig`; `head_dim` and the base of the rotary embedding are the model's own.

    Raises:
        ValueError: an attention that takes no additional logits, a model that is patched already, or none that can be patched.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    original: str = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    if str(original).startswith(_PREFIX):
        raise ValueError("expected a model without QuatRoPE; this one has it: call remove() of its patch first")
    if original not in ("sdpa", "eager"):
        raise ValueError(f"expected attention 'sdpa' or 'eager', which take additional logits; the model has {original!r}; load it with one of them")
    layers = [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    if not layers:
        raise ValueError(f"expected a decoder whose attention layers have q_proj, layer_idx and scaling; {type(model).__name__} has none")
    parameters = getattr(model.config, "rope_parameters", None) or {}
    base = float(parameters.get("rope_theta", getattr(model.config, "rope_theta", None) or 10_000.0))
    config = QuatRoPEConfig(**{"mode": mode, "head_dim": int(layers[0].head_dim), "base": base, **settings})  # type: ignore[arg-type]
    patch = QuatRoPEPatch(model, layers, config, original)
    for layer in layers:
        layer.foveal_quatrope = patch  # type: ignore[assignment]
    AttentionInterface.register(_PREFIX + original, _attention(original))
    AttentionMaskInterface.register(_PREFIX + original, ALL_MASK_ATTENTION_FUNCTIONS[original])
    model.config._attn_implementation = _PREFIX + original  # type: ignore[union-attr]
    return patch


def _attention(original: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        run = _own_attention(module, original)
        patch: QuatRoPEPatch = module.foveal_quatrope  # type: ignore[assignment]
        added = patch.logits(query.shape[0], query.shape[2], key.shape[2], query)
        if added is None:
            return run(module, query, key, value, attention_mask, scaling=scaling, **options)
        if patch.config.mode == "official":
            scaling = patch.config.scale
        return run(module, query, key, value, _joined(added, attention_mask, key.shape[2]), scaling=scaling, **options)

    return attend


def _own_attention(module: nn.Module, original: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original == "eager":  # each model's file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[original]


def _joined(added: Tensor, mask: Tensor | None, keys: int) -> Tensor:
    """One additive mask of what objects add and of what a token may see."""
    lowest = torch.finfo(added.dtype).min
    if mask is None:  # transformers leaves it out where the kernel's own causal form would do
        rows = torch.arange(keys - added.shape[2], keys, device=added.device)
        mask = torch.arange(keys, device=added.device) <= rows[:, None]
    if mask.dtype == torch.bool:
        return torch.where(mask, added, lowest)
    return added + mask[..., :keys]
