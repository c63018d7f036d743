"""Memes: dark humour, harm, target and intensity, scored with reasons from text, picture and a written explanation.

>>> from foveal.memes import Item, Scorer
>>> scorer = Scorer.from_pretrained()
>>> for verdict in scorer.score([Item("meme.png", Path("meme.png"))]):
...     print(verdict.decision, verdict.score, verdict.reason)

Names are loaded when first asked for, so that the command line's help need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveal.core.faces import loaded_when_asked

if TYPE_CHECKING:
    from foveal.memes.checkpoints import load_official, systems, to_official
    from foveal.memes.models.tcrnet import TCRNet, TCRNetConfig
    from foveal.memes.predict import Item, Scorer, Verdict

__all__ = ["Item", "Scorer", "TCRNet", "TCRNetConfig", "Verdict", "load_official", "systems", "to_official"]

_HOME = {
    "Item": "predict",
    "Scorer": "predict",
    "Verdict": "predict",
    "TCRNet": "models.tcrnet",
    "TCRNetConfig": "models.tcrnet",
    "load_official": "checkpoints",
    "systems": "checkpoints",
    "to_official": "checkpoints",
}

__getattr__, __dir__ = loaded_when_asked(__name__, _HOME)
