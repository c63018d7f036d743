"""Corpora as vectors: every text, reason and picture goes through its frozen encoder once, and training reads vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.memes.data.records import Meme, read_dhumor, read_harmeme, read_hateful, read_mami, read_table, same_text, without_leaks
from foveal.memes.encoders import image_encoder, remembered, text_encoder
from foveal.memes.explain.rules import explain_by_rules
from foveal.memes.models.tcrnet import STREAMS
from foveal.memes.pictures import NEAR, open_picture
from foveal.memes.store import Store, cache_folder, key_of

#: A task's label where a meme has none.
NO_LABEL = -100
_WITH_IMAGES: dict[str, Callable[[str, str | None], list[Meme]]] = {"dhumor": read_dhumor, "harmeme": read_harmeme}
_BESIDE_IMAGES: dict[str, Callable[[str], list[Meme]]] = {"hateful": read_hateful, "mami": read_mami}


@dataclass(frozen=True)
class Corpus:
    """Where labelled memes are.

    Attributes:
        kind: dhumor, harmeme, hateful, mami or table; see `foveal.memes.data.records`.
        file: its table or jsonl.
        images: folder of its pictures, where the kind takes one.
        labels: of a table: task -> column.
        text: of a table: its column of texts.
        reason: of a table: its column of explanations.
        image: of a table: its column of pictures.
        classes: of a table whose labels are words: task -> names of its classes, class 0 first.
    """

    kind: str
    file: str
    images: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    text: str = "text"
    reason: str | None = None
    image: str = "image"
    classes: dict[str, list[str]] = field(default_factory=dict)

    def read(self) -> list[Meme]:
        """Its memes.

        Raises:
            UserError: an unknown kind, or what the reader says.
        """
        if self.kind == "table":
            return read_table(
                self.file, image=self.image, text=self.text, reason=self.reason, labels=self.labels, classes=self.classes, images=self.images
            )
        if self.kind in _WITH_IMAGES:
            return _WITH_IMAGES[self.kind](self.file, self.images)
        if self.kind in _BESIDE_IMAGES:
            return _BESIDE_IMAGES[self.kind](self.file)
        raise UserError(f"expected a corpus of kind {', '.join([*_WITH_IMAGES, *_BESIDE_IMAGES])} or table; got {self.kind!r}")


@dataclass(frozen=True)
class Encoding:
    """How memes become vectors. It is part of a model: a checkpoint carries it.

    Attributes:
        text: encoder of texts, see `foveal.memes.encoders.text_encoder`.
        image: encoder of pictures; None: pictures are not looked at.
        reason: ``rules`` for memes that have no written reason, or ``none``.
        reasons: encoder of reasons; None: texts and reasons share one, and one pass.
    """

    text: str = "minilm/mean/256"
    image: str | None = None
    reason: str = "rules"
    reasons: str | None = None

    def __post_init__(self) -> None:
        if self.reason not in ("rules", "none"):
            raise UserError(f"expected reason rules or none; got {self.reason!r}")

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that this gives."""
        return STREAMS if self.image else ("text", "reason")


class Batch(NamedTuple):
    """Vectors and labels of some memes.

    Attributes:
        vectors: stream -> (batch, width).
        present: stream -> whether the meme has it.
        labels: task -> class, or `NO_LABEL`.
        place: of the memes in their split.
    """

    vectors: dict[str, Float[Tensor, "batch width"]]
    present: dict[str, Bool[Tensor, " batch"]]
    labels: dict[str, Int[Tensor, " batch"]]
    place: Int[Tensor, " batch"]


def reason_of(meme: Meme, encoding: Encoding) -> str:
    """The reason that a meme's reason stream is made of."""
    return meme.reason or (explain_by_rules(meme.text) if encoding.reason == "rules" else "")


def encode(memes: Sequence[Meme], encoding: Encoding, store: Store | None = None, device: str = "cpu") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stream -> vectors (memes, width) and which memes have the stream. An empty text, and a picture that cannot be read, is an absent stream."""
    texts, reasons = [meme.text for meme in memes], [reason_of(meme, encoding) for meme in memes]
    if encoding.reasons in (None, encoding.text):
        # one pass for both streams: what stands in both is computed once, and lengths mix better
        vectors, there = _encode_texts(texts + reasons, encoding.text, store, device)
        found = {"text": (vectors[: len(memes)], there[: len(memes)]), "reason": (vectors[len(memes) :], there[len(memes) :])}
    else:
        found = {"text": _encode_texts(texts, encoding.text, store, device), "reason": _encode_texts(reasons, encoding.reasons, store, device)}
    if encoding.image:
        found["image"] = _encode_pictures(memes, encoding.image, store, device)
    return found


def _encode_texts(texts: Sequence[str], name: str, store: Store | None, device: str) -> tuple[np.ndarray, np.ndarray]:
    encoder = text_encoder(name, device)
    vectors = remembered(encoder, encoder.name, encoder.width, texts, texts, store)
    return vectors, np.array([bool(text.strip()) for text in texts], dtype=bool)


def _encode_pictures(memes: Sequence[Meme], name: str, store: Store | None, device: str) -> tuple[np.ndarray, np.ndarray]:
    encoder = image_encoder(name, device)
    vectors, there = np.zeros((len(memes), encoder.width), dtype=np.float32), np.zeros(len(memes), dtype=bool)
    for start in range(0, len(memes), 32):
        opened = {}
        for index in range(start, min(start + 32, len(memes))):
            path = memes[index].image
            if path is not None:
                try:
                    opened[index] = open_picture(path)
                except UserError:
                    continue  # the corpus lacks it: the stream is absent, as it may be in use
        if opened:
            images, keys = [picture.image for picture in opened.values()], [picture.sha256 for picture in opened.values()]
            vectors[list(opened)] = remembered(encoder, encoder.name, encoder.width, images, keys, store)
            there[list(opened)] = True
    return vectors, there


class MemeVectors(Dataset):
    """Encoded memes.

    Args:
        memes: what they are.
        encoding: how they are encoded.
        tasks: whose labels are given.
        store: of vectors.
    """

    def __init__(self, memes: Sequence[Meme], encoding: Encoding, tasks: Sequence[str], store: Store | None = None) -> None:
        self.memes = list(memes)
        found = encode(self.memes, encoding, store)
        self.vectors = {stream: torch.from_numpy(found[stream][0]) for stream in encoding.streams}
        self.present = {stream: torch.from_numpy(found[stream][1]) for stream in encoding.streams}
        self.labels = {task: torch.tensor([meme.labels.get(task, NO_LABEL) for meme in self.memes]) for task in tasks}

    def __len__(self) -> int:
        return len(self.memes)

    def __getitem__(self, index: int) -> Batch:
        pick = torch.tensor(index)
        vectors, present, labels = ({name: value[pick] for name, value in part.items()} for part in (self.vectors, self.present, self.labels))
        return Batch(vectors, present, labels, pick)


class MemeFeatures(pl.LightningDataModule):
    """Labelled memes as vectors.

    Args:
        train: corpora to learn from.
        test: corpora to measure on.
        tasks: whose labels are used.
        encoding: of the streams.
        validation: corpora to choose by; none: `validation_share` of the training memes.
        validation_share: memes with the same text stay on one side.
        drop_leaks: leave memes out of validation and test that stand in training, see `leaked`.
        batch_size: memes in a batch.
        seed: of the split and of the order.
        cache: file of vectors; None is one in the user's cache folder, the empty word none.
    """

    def __init__(
        self,
        train: list[Corpus],
        test: list[Corpus],
        tasks: list[str],
        encoding: Encoding = Encoding(),
        validation: list[Corpus] | None = None,
        validation_share: float = 0.1,
        drop_leaks: bool = False,
        batch_size: int = 64,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.corpora, self.test_corpora, self.validation_corpora = train, test, validation or []
        self.tasks, self.encoding, self.share, self.drop_leaks = tasks, encoding, validation_share, drop_leaks
        self.batch_size, self.seed, self.cache = batch_size, seed, cache

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what `stage` needs."""
        store = None if self.cache == "" else Store(Path(self.cache) if self.cache else cache_folder() / "memes.sqlite")
        train = [meme for corpus in self.corpora for meme in corpus.read()]
        validation = [meme for corpus in self.validation_corpora for meme in corpus.read()]
        if not validation:
            train, validation = split_by_text(train, self.share, self.seed)
        if stage in (None, "fit", "validate"):
            if self.drop_leaks:
                validation = [meme for meme, leak in zip(validation, leaked(train, validation, store), strict=True) if not leak]
            self.train = MemeVectors(train, self.encoding, self.tasks, store)
            self.validation = MemeVectors(validation, self.encoding, self.tasks, store)
        if stage in (None, "test", "predict"):
            test = [meme for corpus in self.test_corpora for meme in corpus.read()]
            leaks = leaked(train, test, store)
            if self.drop_leaks:
                test, leaks = [meme for meme, leak in zip(test, leaks, strict=True) if not leak], leaks[~leaks]
            self.leaks, self.test = torch.from_numpy(leaks), MemeVectors(test, self.encoding, self.tasks, store)

    def train_dataloader(self) -> DataLoader:
        """Resumable to the bit."""
        return ResumableDataLoader(self.train, self.batch_size, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.validation, batch_size=256)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.test, batch_size=256)

    predict_dataloader = test_dataloader


def leaked(train: Sequence[Meme], test: Sequence[Meme], store: Store | None = None) -> Bool[np.ndarray, " test"]:
    """Which memes of `test` stand in `train`: with the same words, or, where both have pictures, with nearly the same picture."""
    by_text = {id(meme) for meme in without_leaks(train, test)}
    found = np.array([id(meme) not in by_text for meme in test], dtype=bool)
    known, asked = (_hashes(memes, store) for memes in (train, test))
    bits = np.array([value for value in known if value is not None], dtype=np.uint64)
    for place, value in enumerate(asked):
        if value is not None and len(bits):
            found[place] |= bool((np.bitwise_count(bits ^ np.uint64(value)) <= NEAR).any())
    return found


def _hashes(memes: Sequence[Meme], store: Store | None) -> list[int | None]:
    """Perceptual hashes of the memes' pictures; None without one, or with one that cannot be read."""
    hashes: list[int | None] = []
    for meme in memes:
        if meme.image is None or not meme.image.is_file():
            hashes.append(None)
            continue
        state = meme.image.stat()
        key = key_of("perceptual hash", str(meme.image.resolve()), state.st_size, state.st_mtime_ns)
        known = store.get(key) if store is not None else None
        if known is None:
            try:
                known = open_picture(meme.image).perceptual_hash.encode()
            except UserError:
                known = b""
            if store is not None:
                store.put(key, known)
        hashes.append(int(known, 16) if known else None)
    return hashes


def split_by_text(memes: Sequence[Meme], share: float, seed: int) -> tuple[list[Meme], list[Meme]]:
    """Most memes and a share of them, memes of one text on one side.

    Raises:
        UserError: too few texts to split.
    """
    groups: dict[str, list[Meme]] = {}
    for meme in memes:
        groups.setdefault(same_text(meme.text) or meme.id, []).append(meme)
    if len(groups) < 2:
        raise UserError(f"expected memes of at least two different texts to hold some out; got {len(groups)}; name a validation corpus")
    names = sorted(groups)
    held = set(np.random.default_rng(seed).permutation(names)[: max(1, round(share * len(names)))].tolist())
    return [meme for name in names if name not in held for meme in groups[name]], [meme for name in sorted(held) for meme in groups[name]]
