"""LRS2-2Mix: two speakers of BBC television at -5 to 5 dB; 16 kHz, 2 s each; 11 h, 3 h and 1.5 h.

Li et al., "An efficient encoder-decoder architecture with top-down attention for speech separation", ICLR 2023 (TDANet);
https://huggingface.co/datasets/JusperLee/LRS2-2Mix . LRS2 is for research under the BBC's agreement.
Layout: ``{train,val,test}/{mix,s1,s2}/ID.wav``, or ``tr``, ``cv`` and ``tt`` as in WSJ0-2mix.
"""

from __future__ import annotations

from pathlib import Path

from foveal.audio.data.folders import MixtureFile, MixtureFolders, beside

_HOW_TO_GET = "get it from https://huggingface.co/datasets/JusperLee/LRS2-2Mix and name the folder that holds the three parts"
_SHORT = {"train": "tr", "val": "cv", "test": "tt"}


class LRS2Mix(MixtureFolders):
    """Two speakers of LRS2-2Mix."""

    parts = ("train", "val", "test")

    def find(self, part: str) -> list[MixtureFile]:
        """The mixtures of ``train``, ``val`` or ``test``.

        Raises:
            UserError: a folder or a source is missing.
        """
        folder = Path(self.root) / part
        if not folder.is_dir() and (Path(self.root) / _SHORT[part]).is_dir():
            folder = Path(self.root) / _SHORT[part]
        return beside(folder, "mix", ("s1", "s2"), _HOW_TO_GET)
