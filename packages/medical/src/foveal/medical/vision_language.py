"""Vision-language models to adapt and to ask: from a folder, a file, open_clip's names or a hub, with the tokenizer and the preparation they need.

A hub is asked only where the user names one. Two makes of open_clip's are known: CLIP's ViTs, and BiomedCLIP's ViT with BERT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from foveal.core.errors import UserError
from foveal.core.official import read_official, state_dict_of
from foveal.medical.checkpoints import load_official
from foveal.medical.films import FilmPreparation
from foveal.medical.models.biomed_clip import BiomedCLIP, BiomedCLIPConfig
from foveal.medical.models.clip import CLIP, CLIPConfig

BIOMED_CLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"

#: Tokens of a text that BiomedCLIP reads.
BIOMED_CONTEXT = 256

#: Files of a hub's folder that are read, and no others are fetched.
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_FETCHED = (*_WEIGHTS, "open_clip_config.json", "tokenizer.json", "vocab.txt")

Tokenizer = Callable[[Sequence[str]], Tensor]
Make = Literal["biomed_clip", "open_clip"]


@dataclass(frozen=True)
class BaseChoice:
    """Which model to adapt.

    Attributes:
        source: a folder as a hub publishes it (weights, open_clip_config.json, tokenizer.json or vocab.txt), a file of weights, hf-hub:OWNER/NAME,
            open_clip's NAME/TAG such as ViT-B-32/laion2b_s34b_b79k (TAG may be a file), or random:biomed_clip and random:open_clip for trials.
        tokenizer: tokenizer.json or vocab.txt of BiomedCLIP's make, or a folder with one; the source's folder is looked into first.
        sizes: of the towers (names of `BiomedCLIPConfig` and `CLIPConfig`) that the weights do not tell, or of random ones.
    """

    source: str = BIOMED_CLIP
    tokenizer: str | None = None
    sizes: Mapping[str, int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """A vision-language model with what goes in front of it.

    Attributes:
        network: its towers.
        tokenizer: texts to numbers.
        preparation: of images.
        name: where it is from.
    """

    network: BiomedCLIP | CLIP
    tokenizer: Tokenizer
    preparation: FilmPreparation
    name: str


def load_base(choice: BaseChoice) -> Base:
    """The model that is chosen, in eval mode.

    Raises:
        UserError: nothing there, a hub that cannot be reached, weights of another make, or no tokenizer.
    """
    source = choice.source
    place = Path(source)
    if source.startswith("random:"):
        network: BiomedCLIP | CLIP = _random(source.removeprefix("random:"), choice.sizes)
        folder = None
    elif place.exists():
        network, folder = _from_files(place, choice.sizes), place if place.is_dir() else place.parent
    elif source.startswith("hf-hub:"):
        folder = _fetched(source.removeprefix("hf-hub:"))
        network = _from_files(folder, choice.sizes)
    else:
        network, folder = _from_open_clip(source), None
    size = network.config.image_size
    tokenizer = open_clip_tokenizer(network.config.context) if isinstance(network, CLIP) else _word_pieces_of(choice, folder, network)
    return Base(network.eval(), tokenizer, FilmPreparation(size=size, normalise="clip"), source)


def open_clip_tokenizer(context: int) -> Tokenizer:
    """CLIP's byte pairs, which come with open_clip."""
    tokenizer: Any = _open_clip().SimpleTokenizer(context_length=context)
    return lambda texts: tokenizer(list(texts))


def word_pieces(file: Path, context: int) -> Tokenizer:
    """BERT's word pieces, from tokenizer.json or vocab.txt: filled up with 0 to `context` numbers, longer texts cut.

    Raises:
        UserError: neither, or the library is missing.
    """
    try:
        from tokenizers import Tokenizer as Loaded
        from tokenizers.implementations import BertWordPieceTokenizer
    except ModuleNotFoundError:
        raise UserError("expected tokenizers to read texts; install foveal-medical[clip]") from None
    try:
        loaded: Any = Loaded.from_file(str(file)) if file.suffix == ".json" else BertWordPieceTokenizer(str(file), lowercase=True)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"expected tokenizer.json or vocab.txt of a BERT; {file} cannot be read as one: {str(error).splitlines()[0]}") from None
    loaded.enable_truncation(context)
    loaded.enable_padding(pad_id=0, pad_token="[PAD]", length=context)

    def encode(texts: Sequence[str]) -> Int[Tensor, "texts context"]:
        return torch.tensor([encoded.ids for encoded in loaded.encode_batch(list(texts))])

    return encode


def sizes_of(state: Mapping[str, Tensor], make: Make) -> dict[str, int]:
    """Sizes of both towers that the shapes of open_clip's weights tell; heads are taken for 64 wide, as all published ones are.

    Raises:
        UserError: weights of another make.
    """
    try:
        if make == "biomed_clip":
            image, text = "visual.trunk.blocks.", "text.transformer.encoder.layer."
            patch, positions = state["visual.trunk.patch_embed.proj.weight"], state["visual.trunk.pos_embed"].shape[1]
            words, places = (state[f"text.transformer.embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
            sizes = {"width": state["visual.head.proj.weight"].shape[0], "text_inner": state[f"{text}0.intermediate.dense.weight"].shape[0]}
        else:
            image, text = "visual.transformer.resblocks.", "transformer.resblocks."
            patch, positions = state["visual.conv1.weight"], state["visual.positional_embedding"].shape[0]
            words, places = state["token_embedding.weight"], state["positional_embedding"]
            sizes = {"width": state["visual.proj"].shape[1]}
    except KeyError as error:
        raise UserError(
            f"expected weights of CLIP's ViTs or of BiomedCLIP's make, as open_clip saves them; {error.args[0]} is missing; choose another model"
        ) from None
    side = round((positions - 1) ** 0.5) * patch.shape[-1]
    for name, prefix, width in (("image", image, patch.shape[0]), ("text", text, words.shape[1])):
        layers = {key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)}
        sizes |= {f"{name}_width": width, f"{name}_layers": len(layers), f"{name}_heads": max(1, width // 64)}
    return {**sizes, "image_size": side, "patch": patch.shape[-1], "vocabulary": words.shape[0], "context": places.shape[0]}


def _random(make: str, sizes: Mapping[str, Any]) -> BiomedCLIP | CLIP:
    if make not in ("biomed_clip", "open_clip"):
        raise UserError(f"expected random:biomed_clip or random:open_clip; got random:{make}")
    try:
        return BiomedCLIP(BiomedCLIPConfig(**sizes)) if make == "biomed_clip" else CLIP(CLIPConfig(**sizes))
    except (TypeError, ValueError) as error:
        raise UserError(f"expected sizes of a {make}: {error}") from None


def _from_files(place: Path, given: Mapping[str, Any]) -> BiomedCLIP | CLIP:
    file, described = place, {}
    if place.is_dir():
        found = [place / name for name in _WEIGHTS if (place / name).is_file()] or sorted((*place.glob("*.bin"), *place.glob("*.pt")))
        if not found:
            raise UserError(f"expected weights ({', '.join(_WEIGHTS)}) in {place}; found none; name the file")
        file, described = found[0], _described(place / "open_clip_config.json")
    state = {key.removeprefix("module."): value for key, value in state_dict_of(read_official(file)).items()}
    make: Make = "biomed_clip" if any(key.startswith("visual.trunk.") for key in state) else "open_clip"
    if make == "open_clip":  # newer models keep their text tower under a name of its own
        state = {key.removeprefix("text."): value for key, value in state.items()}
    sizes = {**sizes_of(state, make), **(described if make == "open_clip" else {}), **given}
    network: Any = load_official(make, state, **sizes)
    return network.float()


def _described(file: Path) -> dict[str, Any]:
    """What only open_clip_config.json tells: heads and the activation. What our towers do not do is refused."""
    if not file.is_file():
        return {}
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        model, images = whole["model_cfg"], whole.get("preprocess_cfg", {})
        vision, text = model["vision_cfg"], model["text_cfg"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"expected open_clip's configuration in {file}; {error} is wrong in it; download it again") from None
    mean = images.get("mean")
    if mean is not None and abs(mean[0] - 0.48145466) > 1e-4:
        raise UserError(f"expected a model of images with CLIP's mean and spread; {file} says mean {mean}; choose another model")
    out: dict[str, Any] = {"quick": bool(model.get("quick_gelu", False))}
    if "heads" in text:
        out["text_heads"] = text["heads"]
    if "head_width" in vision and "width" in vision:
        out["image_heads"] = vision["width"] // vision["head_width"]
    return out


def _fetched(repository: str) -> Path:
    """The hub's folder, fetched or from an earlier time."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise UserError("expected huggingface-hub to fetch a model; install foveal-medical[clip], or name a folder with its files") from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(_FETCHED)))
    except Exception as error:  # the network has many ways to fail
        reason = shorten(str(error), 120, placeholder=" ...") or type(error).__name__
        raise UserError(
            f"expected to fetch {repository} from its hub; {reason}; download {', '.join(_FETCHED[2:])} elsewhere and name their folder"
        ) from None


def _from_open_clip(source: str) -> CLIP:
    name, _, tag = source.partition("/")
    library = _open_clip()
    if name not in library.list_models() or not tag:
        raise UserError(
            f"expected a folder, a file, hf-hub:OWNER/NAME, or open_clip's NAME/TAG such as ViT-B-32/laion2b_s34b_b79k; {source} is none of them"
        )
    try:
        model: Any = library.create_model(name, pretrained=tag)
    except Exception as error:  # the network has many ways to fail, and tags may be mistyped
        raise UserError(f"expected open_clip to load {name} with {tag}; {shorten(str(error), 160, placeholder=' ...')}") from None
    state = {key.removeprefix("text."): value for key, value in model.state_dict().items()}
    sizes: dict[str, Any] = sizes_of(state, "open_clip")
    quick = type(next(iter(model.visual.transformer.resblocks)).mlp.gelu).__name__ == "QuickGELU"
    heads = {f"{tower}_heads": next(iter(blocks)).attn.num_heads for tower, blocks in _blocks(model)}
    network: Any = load_official("open_clip", state, **{**sizes, **heads, "quick": quick})
    return network.float()


def _blocks(model: Any) -> list[tuple[str, Any]]:
    text = model.text if hasattr(model, "text") else model
    return [("image", model.visual.transformer.resblocks), ("text", text.transformer.resblocks)]


def _word_pieces_of(choice: BaseChoice, folder: Path | None, network: BiomedCLIP) -> Tokenizer:
    given = None if choice.tokenizer is None else Path(choice.tokenizer)
    if given is not None and not given.exists():
        raise UserError(f"expected a tokenizer; {given} does not exist; check the path")
    places = [given] if given is not None else [folder] if folder is not None else []
    files = [file for place in places for file in ([place / "tokenizer.json", place / "vocab.txt"] if place.is_dir() else [place]) if file.is_file()]
    if not files:
        raise UserError(
            f"expected the tokenizer of {choice.source} (tokenizer.json or vocab.txt); there is none beside the weights; name it with --tokenizer"
        )
    return word_pieces(files[0], min(BIOMED_CONTEXT, network.config.context))


def _open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError:
        raise UserError("expected open_clip for models of CLIP's make; install foveal-medical[clip]") from None
    return open_clip
