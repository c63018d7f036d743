"""Speech separation and enhancement: TIGER and MambAttention from wav to wav, trained, converted and applied.

>>> from foveal.audio import Separator
>>> separator = Separator.from_pretrained()
>>> speakers = separator(waveform, sample_rate)  # (sources, [channels,] time), numpy in, numpy out

Names are loaded when first asked for, so that the command line's help need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveal.core.faces import loaded_when_asked

if TYPE_CHECKING:
    from foveal.audio.checkpoints import load_official, systems, to_official
    from foveal.audio.enhance import Enhancer
    from foveal.audio.models.mambattention import MambAttention, MambAttentionConfig
    from foveal.audio.models.tiger import TIGER, TIGERCinematic, TIGERConfig
    from foveal.audio.models.transformer_tts import TransformerTTS, TransformerTTSConfig
    from foveal.audio.predict import Separator
    from foveal.audio.speak import Speaker

__all__ = [
    "TIGER",
    "Enhancer",
    "MambAttention",
    "MambAttentionConfig",
    "Separator",
    "Speaker",
    "TIGERCinematic",
    "TIGERConfig",
    "TransformerTTS",
    "TransformerTTSConfig",
    "load_official",
    "systems",
    "to_official",
]

_HOME = {
    "Enhancer": "enhance",
    "MambAttention": "models.mambattention",
    "MambAttentionConfig": "models.mambattention",
    "Separator": "predict",
    "Speaker": "speak",
    "TIGER": "models.tiger",
    "TIGERCinematic": "models.tiger",
    "TIGERConfig": "models.tiger",
    "TransformerTTS": "models.transformer_tts",
    "TransformerTTSConfig": "models.transformer_tts",
    "load_official": "checkpoints",
    "systems": "checkpoints",
    "to_official": "checkpoints",
}

__getattr__, __dir__ = loaded_when_asked(__name__, _HOME)
