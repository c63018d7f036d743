"""``predictions/`` in the run's folder: what ``foveal <domain> predict`` computes, one safetensors file a batch.

    from safetensors.torch import load_file
    load_file("runs/eeg/mine/2026-01-31_12-00-00/predictions/batch_00000.safetensors")["prediction"]

What a network answers with, whatever it is made of, becomes tensors by name: an answer that is one tensor is ``prediction``, fields and keys go by
their own names and lists by numbers, joined by dots (``0.boxes``). The header holds ``items``, the numbers of the batch's items in the order of the
data, ``names``, where the data have names, and ``values``: what is said in numbers and words, as JSON.

Where several processes predict (``--trainer.devices 2``) they take turns at the items and each writes its own files, such as
``process_1_batch_00000.safetensors``; ``items`` says which they are, so that sorting by it gives the order of the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file
from torch import Tensor

from foveal.core.files import atomic_write
from foveal.core.processes import of_every_process


class WritePredictions(BasePredictionWriter):
    """Writes every batch's answer as it comes, and says at the end where they are.

    A module with a method ``write_prediction(answer, batch, folder)`` writes its answers itself, in its field's own format.

    Args:
        folder: to write into; it is made.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__("batch")
        self.folder = Path(folder)
        self._written = 0

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's."""
        if prediction is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._written += 1
        own = getattr(pl_module, "write_prediction", None)
        if own is not None:
            own(prediction, batch, self.folder)
            return
        parts = [f"loader_{dataloader_idx}"] if trainer.num_predict_batches[1:] else []
        parts += [f"process_{trainer.global_rank}"] if trainer.world_size > 1 else []
        said = dict(_parts_of(prediction, "prediction"))
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in said.items() if isinstance(value, Tensor)}
        header = {"items": batch_indices or None, "names": names_of(batch), "values": {name: said[name] for name in said.keys() - tensors.keys()}}
        with atomic_write(self.folder / "_".join([*parts, f"batch_{batch_idx:05d}.safetensors"])) as temporary:
            save_file(tensors, temporary, metadata={name: json.dumps(value) for name, value in header.items() if value})

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where they are."""
        written = sum(of_every_process(trainer, self._written))
        if trainer.is_global_zero:
            print(f"predictions of {written} batches: {self.folder}" if written else "nothing was predicted: the data have no batch")


def names_of(batch: Any) -> list[str]:
    """What the items of a batch are called, where it says so in ``names`` or ``name``."""
    found = getattr(batch, "names", None) or getattr(batch, "name", None)
    return [found] if isinstance(found, str) else [str(name) for name in found] if isinstance(found, (list, tuple)) else []


def _parts_of(answer: Any, name: str, inside: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and words of an answer by their names; `name` is that of an answer that is one of these."""
    if isinstance(answer, np.ndarray) and answer.dtype.kind in "biuf":
        yield inside or name, torch.from_numpy(np.ascontiguousarray(answer))
    elif answer is None or isinstance(answer, (Tensor, str, bool, int, float)):
        yield inside or name, answer
    elif isinstance(answer, np.generic):
        yield inside or name, answer.item()
    else:
        for key, part in _named(answer):
            yield from _parts_of(part, name, f"{inside}.{key}" if inside else str(key))


def _named(answer: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(answer, Mapping):
        yield from answer.items()
    elif isinstance(answer, tuple) and hasattr(answer, "_asdict"):
        yield from answer._asdict().items()
    elif is_dataclass(answer):
        yield from ((field.name, getattr(answer, field.name)) for field in fields(answer))
    elif isinstance(answer, (list, tuple)):
        yield from enumerate(answer)
    else:
        raise TypeError(f"{type(answer).__name__} in an answer of predict_step is neither a tensor, a number, a word nor made of such")
