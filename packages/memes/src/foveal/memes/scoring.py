"""A trained network with all that its scores depend on: classes, encoders, calibration. Vectors in, probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.special import softmax

from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.memes.calibration import Calibration
from foveal.memes.data.features import Encoding, encode
from foveal.memes.data.records import Meme
from foveal.memes.models.tcrnet import TCRNet, TCRNetConfig, Tokens
from foveal.memes.store import Store
from foveal.memes.tasks.classification import log_odds

#: The small trained model that ships with the package; its card stands beside it.
BUNDLED_WEIGHTS = Path(__file__).with_name("weights") / "harmeme_small.safetensors"
#: What the header of its file calls such a model.
SYSTEM = "meme_scorer"


@dataclass(frozen=True)
class ScorerConfig:
    """All that a scorer is made of but its weights.

    Attributes:
        network: sizes.
        classes: task -> names of its classes, class 0 first. The first task of two classes is the one that is decided.
        encoding: how memes become vectors.
        calibration: of the decided task.
    """

    network: TCRNetConfig
    classes: Mapping[str, Sequence[str]]
    encoding: Encoding = field(default_factory=Encoding)
    calibration: Calibration | None = None

    @property
    def decided(self) -> str:
        """The task that decisions are about.

        Raises:
            UserError: no task has two classes.
        """
        found = next((task for task, names in self.classes.items() if len(names) == 2), None)
        if found is None:
            sizes = ", ".join(f"{task} has {len(names)}" for task, names in self.classes.items())
            raise UserError(f"expected a task of two classes, which decisions are about; {sizes}; train one beside them")
        return found


class Network:
    """Scores memes by their vectors.

    Args:
        model: in eval mode.
        config: what goes with it.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
    """

    def __init__(self, model: TCRNet, config: ScorerConfig, device: str = "auto") -> None:
        self.config, self.device = config, resolve_device(device)
        self.model = model.to(self.device).eval()
        self.calibration = config.calibration or Calibration(config.decided)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, device: str = "auto") -> Network:
        """A network of a file of ours.

        Args:
            path: a ``.safetensors`` file, or a folder with one; None is the bundled model.
            device: ``auto``, ``cpu`` or ``cuda[:N]``.

        Raises:
            UserError: the file is missing, damaged, or of another system.
        """
        weights = load_weights(BUNDLED_WEIGHTS if path is None else path, SYSTEM)
        try:
            content = dict(weights.config)
            calibration = content.get("calibration")
            config = ScorerConfig(
                TCRNetConfig(**content["network"]),
                {task: tuple(names) for task, names in content["classes"].items()},
                Encoding(**content["encoding"]),
                None if calibration is None else Calibration(**calibration),
            )
            model = TCRNet(config.network)
            model.load_state_dict(weights.state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"expected weights written by foveal memes; those in {path} do not fit their header: {reason}; export them again"
            ) from None
        return cls(model.float(), config, device)

    def save(self, path: str | Path, card: str | None = None, dtype: torch.dtype | None = torch.float16) -> Path:
        """Write weights and config.

        Raises:
            UserError: it cannot be written.
        """
        return save_weights(path, self.model.state_dict(), system=SYSTEM, config=asdict(self.config), card=card, dtype=dtype)

    @torch.inference_mode()
    def probabilities(self, memes: Sequence[Meme], store: Store | None = None) -> tuple[dict[str, Float[ndarray, "memes classes"]], ndarray]:
        """Probabilities of every task, and the calibrated one of the decided task's class 1.

        Args:
            memes: with their texts and reasons as they are; nothing is read or asked here.
            store: of vectors.
        """
        logits = self.logits(memes, store)
        score = self.calibration.probability(log_odds(logits[self.config.decided]))
        return {task: softmax(values, -1) for task, values in logits.items()}, score

    @torch.inference_mode()
    def logits(self, memes: Sequence[Meme], store: Store | None = None) -> dict[str, Float[ndarray, "memes classes"]]:
        """Logits of every task."""
        found = encode(memes, self.config.encoding, store, str(self.device))
        streams = {
            stream: Tokens(torch.from_numpy(vectors).to(self.device).unsqueeze(1), torch.from_numpy(there).to(self.device).unsqueeze(1))
            for stream, (vectors, there) in found.items()
            if stream in self.config.network.streams
        }
        logits = self.model(**streams).logits
        return {task: values.float().cpu().numpy().astype(np.float64) for task, values in logits.items()}
