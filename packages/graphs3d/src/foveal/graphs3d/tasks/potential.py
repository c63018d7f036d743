"""Learning an interatomic potential from energies, forces and stress, and measuring it.

The recipe of EquiformerV3 (Liao et al., arXiv 2604.09130, 2026): labels less element references and divided by one scale; mean absolute error of the
energy, mean length of the force errors, mean absolute error of the stress, each with its weight; AdamW with a cosine to a hundredth of the rate;
averaged weights by Lightning's EMAWeightAveraging. Denoising (DeNS) moves atoms and asks how far, telling the network the forces they had.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import ase
import lightning.pytorch as pl
import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from foveal.core.checkpoint import save_weights, start_from
from foveal.core.errors import UserError
from foveal.core.muon import Muon
from foveal.core.run_folder import current
from foveal.graphs3d.checkpoints import bundled_weights, energy_terms, model_from_weights
from foveal.graphs3d.checkpoints.terms import EnergyTerms
from foveal.graphs3d.data.labelled import Labelled
from foveal.graphs3d.data.structures import UNITS, labels_of, without_labels
from foveal.graphs3d.models.equiformer_v3 import Denoising, EquiformerV3, Prediction
from foveal.graphs3d.models.equivariant import DegreeLinear
from foveal.graphs3d.plots import draw_parity
from foveal.graphs3d.tasks.references import element_references, force_scale

#: Parts that one form has and another has not: the paper trains the direct form with denoising first, and then goes on in the gradient form.
HEADS = ("force_head.", "stress_head.", "denoising_head.", "force_embedding.")
#: Structures whose energies a fine-tuned network's references are fitted to.
_FITTED = 500
#: Further ones that are looked for of an element that is rare among them.
_OF_AN_ELEMENT = 8


class PotentialTask(pl.LightningModule):
    """Trains and tests an interatomic potential on `Labelled` batches.

    Logged: ``train/loss``; ``val/energy_mae`` (eV an atom), ``val/forces_mae`` (eV/A, a component), ``val/stress_mae`` (eV/A^3) and ``val/loss``,
    with a parity plot; ``test/<set>/...`` the same. When fitting ends the network is written to ``potential.safetensors`` in the run's folder,
    ready for ``foveal graphs3d relax`` and for `FovealCalculator`.

    Args:
        network: to train; None takes that of `weights`.
        weights: a ``.safetensors`` file of ours to start from (fine-tuning), or "bundled"; None starts anew. It may be of another form of `network`,
            with other heads: those that it lacks start from random weights.
        learning_rate: of AdamW, at its largest.
        matrix_learning_rate: trains the matrices with `Muon` at this rate, at its largest; None trains all parameters with AdamW, as the paper does.
        weight_decay: not on embeddings, biases and norms; with `matrix_learning_rate` on matrices alone.
        betas: of AdamW.
        eps: of AdamW.
        warmup: share of all steps in which the rate rises.
        warmup_factor: of the rate in the first step.
        final_rate: share of the rate at the end of the cosine.
        energy_weight: of its loss.
        forces_weight: of its loss.
        stress_weight: of its loss.
        energy_per_atom: the energy's error is divided by the number of atoms, as on OMat24; not so on OC20.
        denoising_weight: of the loss of atoms that were moved, in place of `forces_weight`.
        scale: eV that labels are divided by; None: the root mean square of the training forces, or with `weights` theirs, which in the direct form
            may be another one for forces and stress.
        references: "fit" takes each element's energy from the training set by least squares, for fine-tuning so that the network's start is
            right on average; "keep" takes those of `weights`.

    Raises:
        UserError: neither network nor weights, both of different sizes, or references to keep without weights.
    """

    references: Tensor
    scale: Tensor
    forces_scale: Tensor
    prepared: Tensor

    def __init__(
        self,
        network: EquiformerV3 | None = None,
        weights: str | None = None,
        learning_rate: float = 2e-4,
        matrix_learning_rate: float | None = None,
        weight_decay: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        warmup: float = 0.01,
        warmup_factor: float = 0.0,
        final_rate: float = 0.01,
        energy_weight: float = 20.0,
        forces_weight: float = 20.0,
        stress_weight: float = 5.0,
        energy_per_atom: bool = True,
        denoising_weight: float = 10.0,
        scale: float | None = None,
        references: Literal["fit", "keep"] = "fit",
    ) -> None:
        super().__init__()
        self.started_from = str(bundled_weights()) if weights == "bundled" else weights
        self.network = _network(network, self.started_from)
        self.learning_rate, self.matrix_learning_rate = learning_rate, matrix_learning_rate
        self.weight_decay, self.betas, self.eps = weight_decay, (betas[0], betas[1]), eps
        self.warmup, self.warmup_factor, self.final_rate = warmup, warmup_factor, final_rate
        self.loss_weights = {"energy": energy_weight, "forces": forces_weight, "stress": stress_weight, "denoising": denoising_weight}
        self.energy_per_atom, self.wanted_scale, self.fitted_references = energy_per_atom, scale, references
        if references == "keep" and self.started_from is None:
            raise UserError("expected weights whose references are kept; got references: keep without weights; set references: fit")
        self.register_buffer("references", torch.zeros(self.network.config.max_elements, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("forces_scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("prepared", torch.zeros((), dtype=torch.bool))
        if self.started_from is not None:
            self._take_terms(energy_terms(self.started_from))
        self._pairs: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}

    def _take_terms(self, known: EnergyTerms) -> None:
        """Those of the weights, until training data say otherwise: what is measured without training is measured in eV."""
        self.scale.fill_(known.scale)
        # Where forces are derivatives there is one scale.
        own = known.forces_scale if self.network.config.direct else None
        self.forces_scale.fill_(known.scale if own is None else own)
        for symbol, value in known.references.items():
            self.references[chemical_symbols.index(symbol)] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}scale" in state_dict:  # checkpoints from before forces had a scale of their own
            state_dict.setdefault(f"{prefix}forces_scale", state_dict[f"{prefix}scale"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the network's sizes, which a config that names `weights` alone does not say."""
        checkpoint["network_config"] = asdict(self.network.config)

    def on_fit_start(self) -> None:
        """Fit references and scale to the training data, once; a resumed run has them."""
        if bool(self.prepared):
            return
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        structures = datamodule.sample()
        if self.wanted_scale or self.started_from is None:
            scale = self.wanted_scale or force_scale(structures)
            self.scale.fill_(scale)
            self.forces_scale.fill_(scale)
        if self.fitted_references == "fit":
            if self.started_from is not None:
                structures = _with_every_element(structures, _FITTED)
            energies = np.array([float(labels_of(atoms).get("energy", np.nan)) for atoms in structures])
            if self.started_from is not None:
                energies = energies - float(self.scale) * self._raw_energies(datamodule, structures)
            self.references.copy_(torch.from_numpy(element_references(structures, energies, len(self.references))))
        self.prepared.fill_(True)

    def _raw_energies(self, datamodule: Any, structures: list) -> np.ndarray:
        graphs = datamodule.graphs([without_labels(atoms) for atoms in structures])
        dtype = next(self.network.parameters()).dtype
        self.network.eval()
        with torch.no_grad():
            energies = [self.network(*graphs[index].graph.to(self.device, dtype)).energy.item() for index in range(len(structures))]
        self.network.train()
        return np.array(energies)

    def forward(self, batch: Labelled) -> Prediction:
        """Energy, forces and stress in network units, of float32 geometry."""
        dtype = next(self.network.parameters()).dtype
        graph, denoising = batch.graph.to(self.device, dtype), None
        if batch.noise is not None:
            # Where forces are not known nothing was moved.
            forces = torch.nan_to_num(batch.forces / self.forces_scale).to(dtype)
            denoising = Denoising(forces, batch.noise.corrupted, batch.noise.structures)
        return self.network(*graph, denoising=denoising)

    def _losses(self, batch: Labelled, prediction: Prediction) -> dict[str, Tensor]:
        graph, losses = batch.graph, {}
        sizes = torch.bincount(graph.batch, minlength=len(batch.energy))
        wanted = (batch.energy - self._reference_energy(batch)) / self.scale
        known = torch.isfinite(wanted)
        if known.any():
            error = (prediction.energy - wanted.to(prediction.energy.dtype)).abs() / (sizes if self.energy_per_atom else 1)
            losses["energy"] = self.loss_weights["energy"] * error[known].mean()
        if prediction.forces is not None:
            losses |= self._forces_loss(batch, prediction.forces)
        if prediction.stress is not None:
            known = torch.isfinite(batch.stress).flatten(1).all(1)
            if batch.noise is not None:
                known = known & ~batch.noise.structures
            if known.any():
                target = (batch.stress[known] / self.forces_scale).to(prediction.stress.dtype)
                losses["stress"] = self.loss_weights["stress"] * (prediction.stress[known] - target).abs().mean()
        return losses

    def _forces_loss(self, batch: Labelled, forces: Tensor) -> dict[str, Tensor]:
        """One mean over atoms of the length of the error; atoms that were moved have the noise as target and a weight of their own."""
        target, known = batch.forces / self.forces_scale, batch.free & torch.isfinite(batch.forces).all(1)
        weight = torch.full_like(forces[:, 0], self.loss_weights["forces"])
        if batch.noise is not None:
            target = torch.where(batch.noise.corrupted.unsqueeze(1), batch.noise.shift, target)
            weight = torch.where(batch.noise.corrupted, self.loss_weights["denoising"], weight)
        if not known.any():
            return {}
        error = torch.linalg.vector_norm(forces[known] - target[known].to(forces.dtype), dim=1)
        return {"forces": (weight[known] * error).mean()}

    def _reference_energy(self, batch: Labelled) -> Tensor:
        return torch.zeros_like(batch.energy).index_add(0, batch.graph.batch, self.references[batch.graph.numbers])

    def training_step(self, batch: Labelled, index: int) -> Tensor:
        """Sum of the weighted losses."""
        losses = self._losses(batch, self(batch))
        if not losses:
            raise UserError("expected a batch with labels to learn from; none of its structures has energy, forces or stress; check the data")
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.energy))
        return loss

    def validation_step(self, batch: Labelled, index: int) -> None:
        """Errors in eV and A."""
        prediction = self(batch).detach()
        losses = self._losses(batch, prediction)
        if losses:
            self.log("val/loss", torch.stack(list(losses.values())).sum(), batch_size=len(batch.energy), sync_dist=True)
        self._measure("val", batch, prediction)

    def test_step(self, batch: Labelled, index: int, dataloader_idx: int = 0) -> None:
        """Errors in eV and A, of each test set."""
        name = list(self.trainer.datamodule.tests)[dataloader_idx]  # type: ignore[attr-defined]
        self._measure(f"test/{name}", batch, self(batch).detach())

    def predict_step(self, batch: Labelled, index: int) -> dict[str, Tensor | None]:
        """Energy (eV), forces (eV/A), stress (eV/A^3), and how many atoms each structure has, which says where one ends in the forces.

        >>> kept["forces"].split(kept["atoms"].tolist())  # an array for each structure
        """
        sizes = torch.bincount(batch.graph.batch, minlength=len(batch.energy))
        return {**self._in_units(batch, self(batch).detach())._asdict(), "atoms": sizes, "numbers": batch.graph.numbers}

    def _in_units(self, batch: Labelled, prediction: Prediction) -> Prediction:
        forces, stress = (None if part is None else self.forces_scale * part.double() for part in (prediction.forces, prediction.stress))
        energy = self.scale * prediction.energy.double() + self._reference_energy(batch)
        return Prediction(energy, forces, stress, self.scale * prediction.node_energy.double() + self.references[batch.graph.numbers])

    def _measure(self, stage: str, batch: Labelled, prediction: Prediction) -> None:
        found = self._in_units(batch, prediction)
        sizes = torch.bincount(batch.graph.batch, minlength=len(batch.energy))
        compared = {"energy": (batch.energy / sizes, found.energy / sizes)}
        if found.forces is not None:
            compared["forces"] = (batch.forces[batch.free], found.forces[batch.free])
        if found.stress is not None:
            compared["stress"] = (batch.stress, found.stress)
        pairs = self._pairs.setdefault(stage, {name: [] for name in UNITS})
        for name, (label, predicted) in compared.items():
            known = torch.isfinite(label)
            if known.any():
                error = (predicted - label)[known].abs().mean()
                options = {"sync_dist": True, "add_dataloader_idx": False, "prog_bar": stage == "val" and name != "stress"}
                self.log(f"{stage}/{name}_mae", error.float(), batch_size=int(known.sum()), **options)  # type: ignore[arg-type]
                pairs[name].append((label[known].cpu().numpy(), predicted[known].cpu().numpy()))

    def on_validation_epoch_end(self) -> None:
        """Draw predictions against labels."""
        self._draw()

    def on_test_epoch_end(self) -> None:
        """Draw predictions against labels, a picture a test set."""
        self._draw()

    def _draw(self) -> None:
        measured, self._pairs = self._pairs, {}
        if not self.trainer.is_global_zero or self.trainer.sanity_checking or getattr(self.trainer, "fast_dev_run", False):
            return
        from foveal.core.tracking import log_figure

        for stage, pairs in measured.items():
            if any(pairs.values()):
                log_figure(self, f"{stage}/parity", draw_parity(pairs, UNITS))

    def on_fit_end(self) -> None:
        """Write the potential."""
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            self.write(current(self.trainer.default_root_dir) / "potential.safetensors", {"steps": str(self.trainer.global_step)})

    def write(self, target: str | Path, about: dict[str, str] | None = None, dtype: torch.dtype | None = None, card: str | None = None) -> Path:
        """The network with references and scale as `FovealCalculator` reads them."""
        config = self.network.config
        references = {chemical_symbols[number]: float(value) for number, value in enumerate(self.references) if number and value != 0}
        separate = config.direct and bool(self.forces_scale != self.scale)
        terms = EnergyTerms(float(self.scale), references, True, float(self.forces_scale) if separate else None)
        metadata = {**(about or {}), **terms.header()}
        return save_weights(target, self.network.state_dict(), system="equiformer_v3", config=config, metadata=metadata, dtype=dtype, card=card)

    def configure_optimizers(self) -> Any:
        """AdamW, or Muon for matrices; warm-up, then a cosine over the whole run."""
        optimizer = self._optimizer()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate), "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        plain = {id(parameter) for module in self.network.modules() for parameter in _undecayed(module)}
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if self.matrix_learning_rate is not None:
            matrices = [parameter for parameter in _matrices(self.network) if parameter.requires_grad]
            chosen = {id(parameter) for parameter in matrices}
            others = [parameter for parameter in parameters if id(parameter) not in chosen]
            return Muon(matrices, others, self.matrix_learning_rate, self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)
        groups = [
            {"params": [parameter for parameter in parameters if id(parameter) not in plain], "weight_decay": self.weight_decay},
            {"params": [parameter for parameter in parameters if id(parameter) in plain], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps)

    def _rate(self, step: int) -> float:
        # The trainer is asked each time: a resumed run may be told to end at another step.
        total = max(float(self.trainer.estimated_stepping_batches), 1.0)
        if not math.isfinite(total):
            return 1.0
        rising = self.warmup * total
        if step < rising:
            return self.warmup_factor + (1 - self.warmup_factor) * (step + 1) / (rising + 1)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))


def _with_every_element(structures: Sequence[ase.Atoms], most: int) -> list[ase.Atoms]:
    """Evenly spaced ones, and a few more of each element that is rare among them."""
    places = np.linspace(0, len(structures) - 1, min(most, len(structures))).astype(int).tolist()
    chosen, taken = [structures[place] for place in places], set(places)
    held = Counter(number for atoms in chosen for number in set(atoms.numbers.tolist()))
    for place, atoms in enumerate(structures):
        elements = set(atoms.numbers.tolist())
        if place not in taken and any(held[number] < _OF_AN_ELEMENT for number in elements):
            chosen.append(atoms)
            held.update(elements)
    return chosen


def _undecayed(module: nn.Module) -> list[nn.Parameter]:
    """Of a module's own parameters those that weight decay would only harm: embeddings, norms, biases."""
    everything = isinstance(module, (nn.Embedding, nn.LayerNorm)) or type(module).__name__ == "MergedLayerNorm"
    return [parameter for name, parameter in module.named_parameters(recurse=False) if everything or name == "bias"]


def _matrices(network: EquiformerV3) -> list[Tensor]:
    """Maps between channels; one to or from a single number is no matrix."""
    maps = [module.weight for module in network.modules() if isinstance(module, (nn.Linear, DegreeLinear))]
    return [weight for weight in maps if min(weight.shape[-2:]) > 1]


def _network(network: EquiformerV3 | None, weights: str | None) -> EquiformerV3:
    if weights is None:
        if network is None:
            raise UserError("expected a network to train, or weights to start from; got neither; set model.network or model.weights")
        return network
    if network is None:
        loaded = model_from_weights(weights)
        assert isinstance(loaded, EquiformerV3)  # asked for by its system's name
        return loaded.train()
    start_from(network, weights, "equiformer_v3", heads=HEADS)
    return network
