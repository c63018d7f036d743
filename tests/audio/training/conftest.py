"""Corpora of a few seconds, cut from the two real clips that ship with the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import foveal.audio

_CLIPS = sorted((Path(foveal.audio.__file__).parent / "demo").glob("*.flac"))
RATE = 16_000


@pytest.fixture(scope="session")
def speech() -> list[np.ndarray]:
    """Six cuts of two real speakers, 2.5 s each; tests treat them as six speakers."""
    clips = [soundfile.read(path, dtype="float32")[0] for path in _CLIPS]
    starts = np.linspace(0, min(map(len, clips)) - int(2.5 * RATE), 3).astype(int)
    return [clip[start : start + int(2.5 * RATE)] for start in starts for clip in clips]


@pytest.fixture(scope="session")
def librispeech(speech: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six speakers in LibriSpeech's names, three women and three men."""
    folder = tmp_path_factory.mktemp("librispeech")
    for number, cut in enumerate(speech):
        soundfile.write(folder / f"{100 + number}-7-0000.flac", cut, RATE)
    rows = [f"{100 + number}  | {'FM'[number % 2]} | test-other | 8.00 | Name" for number in range(len(speech))]
    (folder / "SPEAKERS.TXT").write_text("; comment | with | bars\n;ID  |SEX| SUBSET |MINUTES| NAME\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def write_mixtures(speech: list[np.ndarray]) -> Callable[..., None]:
    """Writes the sums of neighbouring speakers, and the speakers, to paths made by functions of (index, which)."""

    def write(path: Callable[[int, str], Path], count: int = 3, seconds: float = 2.5, rate: int = RATE) -> None:
        for index in range(count):
            first, second = (speech[(index + shift) % len(speech)][: round(seconds * RATE)] for shift in (0, 1))
            for which, signal in (("mix", first + second), ("s1", first), ("s2", second)):
                path(index, which).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path(index, which), signal, rate, subtype="FLOAT")

    return write
