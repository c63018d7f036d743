"""Medical images: segmentation, restoration, classification of films, vision-language adapters; predictions in the input's exact geometry.

>>> from foveal.medical import Segmenter
>>> labels = Segmenter.from_pretrained()("scan.nii.gz")  # a volume of labels with the scan's own geometry

Names are loaded when first asked for, so that the command line's help need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveal.core.faces import loaded_when_asked

if TYPE_CHECKING:
    from foveal.medical.bag_classifier import BagClassifier, BagPrediction
    from foveal.medical.checkpoints import load_official, systems, to_official
    from foveal.medical.classify import FilmClassifier
    from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig, AdaptedCLIP, label_guided_loss
    from foveal.medical.models.acmil import GatedACMIL, GatedACMILConfig, MultiHeadACMIL, MultiHeadACMILConfig, acmil_loss
    from foveal.medical.models.biomed_clip import BiomedCLIP, BiomedCLIPConfig
    from foveal.medical.models.clip import CLIP, CLIPConfig
    from foveal.medical.models.guided_attention import GuidedAttentionConfig, GuidedAttentionNet
    from foveal.medical.models.medusa import Medusa, MedusaConfig
    from foveal.medical.models.mhs_vm import MHSVM, MHSVMConfig
    from foveal.medical.models.rat import RAT, RATConfig
    from foveal.medical.preparation import Preparation
    from foveal.medical.restore import Restorer
    from foveal.medical.segment import Segmenter
    from foveal.medical.slide import extract_features
    from foveal.medical.slide_encoders import TileEncoder
    from foveal.medical.slides import open_slide
    from foveal.medical.tissue import Tiling
    from foveal.medical.vision_language import BaseChoice
    from foveal.medical.volumes import Volume, read_volume, write_volume
    from foveal.medical.zero_shot import ZeroShot

__all__ = [
    "CLIP",
    "MHSVM",
    "RAT",
    "ACELoRA",
    "ACELoRAConfig",
    "AdaptedCLIP",
    "BagClassifier",
    "BagPrediction",
    "BaseChoice",
    "BiomedCLIP",
    "BiomedCLIPConfig",
    "CLIPConfig",
    "FilmClassifier",
    "GatedACMIL",
    "GatedACMILConfig",
    "GuidedAttentionConfig",
    "GuidedAttentionNet",
    "MHSVMConfig",
    "Medusa",
    "MedusaConfig",
    "MultiHeadACMIL",
    "MultiHeadACMILConfig",
    "Preparation",
    "RATConfig",
    "Restorer",
    "Segmenter",
    "TileEncoder",
    "Tiling",
    "Volume",
    "ZeroShot",
    "acmil_loss",
    "extract_features",
    "label_guided_loss",
    "load_official",
    "open_slide",
    "read_volume",
    "systems",
    "to_official",
    "write_volume",
]

_HOME = {
    "ACELoRA": "models.ace_lora",
    "ACELoRAConfig": "models.ace_lora",
    "AdaptedCLIP": "models.ace_lora",
    "BagClassifier": "bag_classifier",
    "BagPrediction": "bag_classifier",
    "BaseChoice": "vision_language",
    "BiomedCLIP": "models.biomed_clip",
    "BiomedCLIPConfig": "models.biomed_clip",
    "CLIP": "models.clip",
    "CLIPConfig": "models.clip",
    "FilmClassifier": "classify",
    "GatedACMIL": "models.acmil",
    "GatedACMILConfig": "models.acmil",
    "GuidedAttentionConfig": "models.guided_attention",
    "GuidedAttentionNet": "models.guided_attention",
    "MHSVM": "models.mhs_vm",
    "MHSVMConfig": "models.mhs_vm",
    "Medusa": "models.medusa",
    "MedusaConfig": "models.medusa",
    "MultiHeadACMIL": "models.acmil",
    "MultiHeadACMILConfig": "models.acmil",
    "Preparation": "preparation",
    "RAT": "models.rat",
    "RATConfig": "models.rat",
    "Restorer": "restore",
    "Segmenter": "segment",
    "TileEncoder": "slide_encoders",
    "Tiling": "tissue",
    "Volume": "volumes",
    "ZeroShot": "zero_shot",
    "acmil_loss": "models.acmil",
    "extract_features": "slide",
    "label_guided_loss": "models.ace_lora",
    "load_official": "checkpoints",
    "open_slide": "slides",
    "read_volume": "volumes",
    "systems": "checkpoints",
    "to_official": "checkpoints",
    "write_volume": "volumes",
}

__getattr__, __dir__ = loaded_when_asked(__name__, _HOME)
