"""EchoSet: two LibriSpeech speakers in simulated furnished rooms with noise, reverberant targets; 16 kHz, 6 s each.

Published with TIGER (Xu et al., ICLR 2025), https://huggingface.co/datasets/JusperLee/EchoSet , about 34 h; see its card for the licence.
Layout: ``{train,val,test}/**/mix*.wav`` and, beside each, ``spk1_reverb*.wav`` and ``spk2_reverb*.wav`` with the same ending.
"""

from __future__ import annotations

from pathlib import Path

from foveal.audio.data.folders import MixtureFile, MixtureFolders, complete

_HOW_TO_GET = "get it from https://huggingface.co/datasets/JusperLee/EchoSet and name the folder that holds train, val and test"


class EchoSet(MixtureFolders):
    """Two speakers in a room; the targets are as reverberant as the mixture, whose noise belongs to no source."""

    parts = ("train", "val", "test")

    def find(self, part: str) -> list[MixtureFile]:
        """The mixtures of ``train``, ``val`` or ``test``, in whatever folders below.

        Raises:
            UserError: none, or a source missing.
        """
        folder = Path(self.root) / part
        found = [
            MixtureFile(path, tuple(path.with_name(f"spk{number}_reverb{path.name.removeprefix('mix')}") for number in (1, 2)))
            for path in sorted(folder.rglob("mix*.wav"))
        ]
        return complete(found, folder, _HOW_TO_GET)
