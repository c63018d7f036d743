"""Libri2Mix: two LibriSpeech speakers, clean or with WHAM! noise; 16 kHz.

Cosentino et al., "LibriMix: An Open-Source Dataset for Generalizable Speech Separation", 2020. Made by the scripts of
https://github.com/JorisCos/LibriMix from LibriSpeech (CC BY 4.0) and WHAM! noise (CC BY-NC 4.0): 270 h (train-360 and train-100), 430 GB with
all its variants; 16 kHz "min" alone about 80 GB. Layout: ``Libri2Mix/wav16k/{min,max}/{train-100,train-360,dev,test}/{mix_clean,mix_both,s1,s2}``.
Where the audio was moved or only listed, ``metadata/mixture_<part>_<mixture>.csv`` beside the parts names the files.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

from foveal.audio.data.folders import MixtureFile, MixtureFolders, beside, complete

_HOW_TO_GET = "make it with the scripts of https://github.com/JorisCos/LibriMix and name the folder that holds wav16k"


class Libri2Mix(MixtureFolders):
    """Two speakers of Libri2Mix.

    Args:
        root: folder ``Libri2Mix``, which holds ``wav16k``.
        mixture: ``mix_clean``, or ``mix_both`` with noise, which belongs to no source.
        length: ``min`` cuts mixtures to the shorter speaker, ``max`` pads to the longer.
        train_part: ``train-100`` or ``train-360``.
        **kwargs: as of `MixtureFolders`.
    """

    def __init__(
        self,
        root: str,
        mixture: Literal["mix_clean", "mix_both"] = "mix_clean",
        length: Literal["min", "max"] = "min",
        train_part: Literal["train-100", "train-360"] = "train-100",
        seconds: float = 3.0,
        batch_size: int = 1,
        sample_rate: int = 16_000,
        workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(root, seconds, batch_size, sample_rate, workers, seed)
        self.mixture, self.length, self.parts = mixture, length, (train_part, "dev", "test")

    def find(self, part: str) -> list[MixtureFile]:
        """The mixtures of ``train-100``, ``dev`` and so on.

        Raises:
            UserError: neither folders nor a list of files, or files missing.
        """
        folder = Path(self.root) / f"wav{self.sample_rate // 1000}k" / self.length
        table = folder / "metadata" / f"mixture_{part}_{self.mixture}.csv"
        if (folder / part).is_dir() or not table.exists():
            return beside(folder / part, self.mixture, ("s1", "s2"), _HOW_TO_GET)
        with table.open(newline="", encoding="utf-8") as file:
            # paths are absolute as the scripts write them; relative ones count from the corpus
            rows = [{key: Path(self.root) / value for key, value in row.items() if key.endswith("_path")} for row in csv.DictReader(file)]
        return complete([MixtureFile(row["mixture_path"], (row["source_1_path"], row["source_2_path"])) for row in rows], folder, _HOW_TO_GET)
