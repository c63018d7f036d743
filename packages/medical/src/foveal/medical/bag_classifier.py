"""Bags in, classes out: what a practitioner calls from Python, and what `foveal medical slide` classifies slides with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.medical.checkpoints import model_from_weights
from foveal.medical.models.acmil import GatedACMIL, MultiHeadACMIL

_WEIGHTS = Path(__file__).with_name("weights")

SYSTEMS = ("acmil_ga", "acmil_mha")

#: Weights that ship with the package, by name; a card stands beside each.
BUNDLED = ("acmil_musk", "acmil_ucsb")


@dataclass(frozen=True)
class BagPrediction:
    """What a bag is taken for.

    Attributes:
        label: the likeliest class.
        probabilities: class -> probability.
        importance: share of each instance in the decision, mean of branches and heads; sums to 1.
    """

    label: str
    probabilities: dict[str, float]
    importance: Float[ndarray, " instances"]


class BagClassifier:
    """Classifies bags of any length.

    >>> classifier = BagClassifier.from_pretrained("acmil_ucsb")
    >>> classifier(features).probabilities  # features: (instances, 708)

    Args:
        network: trained ACMIL.
        class_names: of the classes.
        mean: of each feature in training, taken away first; None leaves them as they are.
        scale: of each feature, divided by.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        label: what the weights are called, in tables.
    """

    def __init__(
        self, network: GatedACMIL | MultiHeadACMIL, class_names: list[str], mean: Float[ndarray, " features"] | None = None,
        scale: Float[ndarray, " features"] | None = None, device: str | torch.device = "auto", label: str = "",
    ) -> None:  # fmt: skip
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.network, self.class_names, self.label = network.to(self.device).eval(), list(class_names), label
        self.width = network.config.features
        self.mean = torch.zeros(self.width) if mean is None else torch.as_tensor(np.asarray(mean, np.float32))
        self.scale = torch.ones(self.width) if scale is None else torch.as_tensor(np.asarray(scale, np.float32))

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "auto") -> BagClassifier:
        """Load trained weights: a ``.safetensors`` file, a folder with one, or the name of weights that ship (acmil_musk, acmil_ucsb).

        Raises:
            UserError: missing, corrupt or foreign weights.
        """
        place = _WEIGHTS / f"{source}.safetensors" if str(source) in BUNDLED and not Path(source).exists() else Path(source)
        weights = load_weights(place)
        if weights.system not in SYSTEMS:
            raise UserError(f"expected weights of ACMIL ({', '.join(SYSTEMS)}); {place} holds {weights.system}; choose another checkpoint")
        network: Any = model_from_weights(place, weights.system)
        about, count = weights.metadata, network.config.classes
        names = about["classes"].split("|") if about.get("classes") else [f"class {number}" for number in range(count)]
        if len(names) != count:
            raise UserError(f"expected {count} names of classes in the header of {place}; got {len(names)}; export the weights again")
        mean, scale = (np.array(json.loads(about[key])) if key in about else None for key in ("feature_mean", "feature_scale"))
        return cls(network, names, mean, scale, device, place.stem)

    @torch.inference_mode()
    def __call__(self, features: Float[ndarray, "instances features"]) -> BagPrediction:
        """Classify one bag.

        Raises:
            UserError: no instances, or features of another width than the network reads.
        """
        if features.ndim != 2 or not len(features) or features.shape[1] != self.width:
            raise UserError(
                f"expected features (tiles, {self.width}) with at least one tile for {self.label or 'the network'}; got {features.shape}; "
                "use the encoder that it was trained with"
            )
        values = (torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)) - self.mean) / self.scale
        output = self.network(values[None].to(self.device))
        shares = output.bag_logits[0].float().softmax(-1).tolist()
        probabilities = dict(zip(self.class_names, shares, strict=True))
        return BagPrediction(max(probabilities, key=lambda name: probabilities[name]), probabilities, output.importance.float().cpu().numpy())
