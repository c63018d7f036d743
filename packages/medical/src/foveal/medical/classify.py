"""Films in, probabilities out: what a practitioner calls, from Python and from the command line. No weights ship: MEDUSA's authors published none."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import atomic_write, identity_of, output_folder, without_results
from foveal.core.reports import BatchReport
from foveal.medical.film_net import FilmNet, FilmNetConfig
from foveal.medical.film_plots import film_attention_figure
from foveal.medical.films import Film, FilmPreparation, collect_films, film_from_array, read_film
from foveal.medical.volumes import names_of

TABLE = "probabilities.csv"


class FilmClassifier:
    """Classifies films.

    >>> classifier = FilmClassifier.from_pretrained("runs/medical/medusa_small/2026-11-21_19-30-00")
    >>> classifier("film.png")  # {"normal": 0.93, "pneumonia": 0.07}

    Args:
        network: films to logits.
        preparation: that it was trained with.
        class_names: of its outputs.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
    """

    def __init__(self, network: FilmNet, preparation: FilmPreparation, class_names: Sequence[str], device: str | torch.device = "auto") -> None:
        if len(class_names) != network.config.classes:
            raise UserError(f"expected {network.config.classes} names of classes; got {len(class_names)}: {', '.join(class_names)}")
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.network, self.preparation, self.class_names = network.to(self.device).eval(), preparation, tuple(class_names)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "auto") -> FilmClassifier:
        """Load trained weights: a run's folder (its best checkpoint), a checkpoint in one, or an exported ``.safetensors``.

        Raises:
            UserError: missing, corrupt or foreign weights.
        """
        place = Path(source)
        if (place / "checkpoints").is_dir() or place.suffix == ".ckpt":
            from foveal.medical.tasks.export import trained

            system, config, state, about = trained(checkpoint_of(place))
            if system != "medusa":
                raise UserError(f"expected a run that trains a classifier of films (FilmNet); {place} trains {system}; choose another run")
        else:
            weights = load_weights(place, "medusa")
            config, state, about = FilmNetConfig(**weights.config), weights.state, weights.metadata
        network = FilmNet(config)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"expected weights that fit their config in {place}: {' '.join(str(error).split())[:200]}") from None
        return cls(network, FilmPreparation(**json.loads(about["preparation"])), about["classes"].split("|"), device)

    def __call__(self, film: str | Path | Film | Any) -> dict[str, float]:
        """Class -> probability.

        Args:
            film: a file (PNG, JPEG, TIFF, DICOM), a `Film`, or an array (rows, columns).

        Raises:
            UserError: nothing that can be read, or no film.
        """
        return self._named(self._run(self._read(film)))

    def attention(self, film: str | Path | Film | Any) -> dict[str, Float[Tensor, "rows columns"]]:
        """Stage -> how much of each place the network lets through there, from 0 to 1. Empty for a backbone without MEDUSA's attention."""
        image = self.preparation(self._read(film))[None].to(self.device)
        return {stage: weights[0].float().cpu() for stage, weights in self.network.attended(image).items()}

    def figure(self, film: str | Path | Film | Any, title: str = "") -> Any:
        """The film, what each scale lets through, and the probabilities."""
        read = self._read(film)
        maps = {stage: weights.numpy() for stage, weights in self.attention(read).items()}
        return film_attention_figure(self.preparation.shown(read), maps, self(read), title)

    def save(self, path: str | Path, card: str | None = None, dtype: torch.dtype | None = None) -> Path:
        """Write the network with its preparation and class names, as `from_pretrained` reads them."""
        metadata = {"preparation": json.dumps(self.preparation.to_dict()), "classes": "|".join(self.class_names)}
        state, config = self.network.state_dict(), self.network.config
        return save_weights(path, state, system="medusa", config=config, card=card, dtype=dtype, metadata=metadata)

    @torch.no_grad()
    def _run(self, film: Film) -> Float[Tensor, " classes"]:
        return self.network(self.preparation(film)[None].to(self.device))[0].cpu().double().softmax(0)  # not every GPU has float64

    def _named(self, probabilities: Tensor) -> dict[str, float]:
        return dict(zip(self.class_names, probabilities.tolist(), strict=True))

    def _read(self, film: Any) -> Film:
        if isinstance(film, Film):
            return film
        return read_film(film) if isinstance(film, (str, Path)) else film_from_array(film)


def checkpoint_of(place: Path) -> Path:
    """The checkpoint that a run's folder means: the best one, else the last; or the file itself.

    Raises:
        UserError: a run without any.
    """
    if place.suffix == ".ckpt":
        return place
    found = [place / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    there = [path for path in found if path.exists()]
    if not there:
        raise UserError(f"expected checkpoints/best.ckpt or last.ckpt in run {place}; there is none; train it, or name another run")
    return there[0]


def classify_command(
    films: Sequence[Path], *, output: Path | None, checkpoint: Path | None, device: str, truth: Path | None = None, pictures: bool = True,
    overwrite: bool = False, seed: int = 0, as_json: bool = False,
) -> int:  # fmt: skip
    """Classify files; one that fails does not stop the others. Returns the exit code."""
    torch.manual_seed(seed)
    if checkpoint is None:
        raise UserError(
            "expected --checkpoint: no weights of MEDUSA exist that could ship; train them on your films with: "
            "foveal medical fit --config configs/medical/medusa_small.yaml, and name the run"
        )
    folder = output or Path("classified")
    places = without_results(collect_films(films, folder), names_of, lambda name: [folder / f"{name}_attention.png"], films)
    classifier = FilmClassifier.from_pretrained(checkpoint, device)
    labels = None
    if truth is not None:
        from foveal.medical.film_truth import report_scores, truth_of  # torchmetrics takes seconds to import

        labels = truth_of(truth, places, classifier.class_names)
    output_folder(folder, overwrite=True)
    known = _known(folder / TABLE, classifier.class_names)
    report = BatchReport()
    named = list(zip(places, names_of(places), strict=True))
    for place, name in track(named, "classifying", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()):
        target = folder / f"{name}_attention.png"
        if identity_of(place) in known and not overwrite and (not pictures or target.exists()):
            report.kept(place, [str(folder / TABLE), *([str(target)] if target.exists() else [])])
            continue
        with report.item(place) as entry:
            started = time.perf_counter()
            film = read_film(place)
            shares = classifier(film)
            likeliest = max(shares, key=lambda label: shares[label])
            known[identity_of(place)] = {"film": str(place), "patient": film.patient, "likeliest": likeliest, **shares}
            entry.message = likeliest
            entry.numbers |= shares
            entry.outputs.append(str(folder / TABLE))
            if pictures:
                with atomic_write(target) as temporary:
                    classifier.figure(film, name).savefig(temporary, dpi=110)
                entry.outputs.append(str(target))
            entry.numbers["seconds"] = time.perf_counter() - started
    if known:
        with atomic_write(folder / TABLE) as temporary:
            pd.DataFrame(list(known.values())).to_csv(temporary, index=False, float_format="%.6f")
    if labels is not None:
        shares_of = {
            place: {name: float(known[key][name]) for name in classifier.class_names} for place in places if (key := identity_of(place)) in known
        }
        report_scores(report, shares_of, labels, classifier.class_names, folder / "scores.json")
    return report.finish(as_json, {"seconds": ".1f"} | dict.fromkeys(classifier.class_names, ".3f"))


def _known(table: Path, class_names: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """Rows that an earlier call left, by file; none where it knew other classes."""
    if not table.exists():
        return {}
    try:
        frame = pd.read_csv(table, dtype={"film": str, "patient": str}, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise UserError(f"expected {table} as an earlier call wrote it; it cannot be read: {error}; remove it, or choose another -o") from None
    if list(frame.columns) != ["film", "patient", "likeliest", *class_names]:
        raise UserError(f"expected {table} to be of the same classes ({', '.join(class_names)}); it is not; choose another -o/--output")
    return {identity_of(row["film"]): dict(row) for _, row in frame.iterrows()}
