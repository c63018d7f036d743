"""EEG as tokens: TFM-Tokenizer from any recording to tokens and classes, MPTSNet, and envelope-following responses.

>>> from foveal.eeg import Tokenizer
>>> tokens = Tokenizer.from_pretrained()(raw)  # an mne.io.Raw of any montage and rate in, ids with times and channel names out

Names are loaded when first asked for, so that the command line's help need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveal.core.faces import loaded_when_asked

if TYPE_CHECKING:
    from foveal.eeg.checkpoints import load_official, systems, to_official
    from foveal.eeg.classify import Classifier
    from foveal.eeg.models.mptsnet import MPTSNet, MPTSNetConfig
    from foveal.eeg.models.tfm_encoder import EncoderConfig, TFMEncoder
    from foveal.eeg.models.tfm_tokenizer import TFMTokenizer, TokenizerConfig
    from foveal.eeg.predict import Tokenizer, Tokens
    from foveal.eeg.streaming import Preparation

__all__ = [
    "Classifier",
    "EncoderConfig",
    "MPTSNet",
    "MPTSNetConfig",
    "Preparation",
    "TFMEncoder",
    "TFMTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "Tokens",
    "load_official",
    "systems",
    "to_official",
]

_HOME = {
    "Classifier": "classify",
    "EncoderConfig": "models.tfm_encoder",
    "MPTSNet": "models.mptsnet",
    "MPTSNetConfig": "models.mptsnet",
    "Preparation": "streaming",
    "TFMEncoder": "models.tfm_encoder",
    "TFMTokenizer": "models.tfm_tokenizer",
    "Tokenizer": "predict",
    "TokenizerConfig": "models.tfm_tokenizer",
    "Tokens": "predict",
    "load_official": "checkpoints",
    "systems": "checkpoints",
    "to_official": "checkpoints",
}

__getattr__, __dir__ = loaded_when_asked(__name__, _HOME)
