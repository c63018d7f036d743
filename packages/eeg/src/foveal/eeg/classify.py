"""Recordings in, classes out: every window's probabilities, and runs of windows as events in EDF+, TSV and CSV."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import torch

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import atomic_write, output_folder
from foveal.core.reports import BatchReport, Entry
from foveal.eeg import events as event_files
from foveal.eeg.checkpoints import model_from_weights
from foveal.eeg.models.tfm_encoder import TFMEncoder
from foveal.eeg.predict import Tokenizer, adjusted, batch, preparation_of
from foveal.eeg.recordings import open_recording
from foveal.eeg.report import draw_classes
from foveal.eeg.streaming import Preparation

#: The classifier that ships with the package; its card stands beside it.
BUNDLED_CLASSIFIER = Path(__file__).with_name("weights") / "tfm_classifier_small.safetensors"


class Classifier:
    """Tells the class of every window of a recording.

    >>> classifier = Classifier.from_pretrained()
    >>> table = classifier(raw)  # one row a window: onset, duration, trial_type, and a probability for each class

    Args:
        tokenizer: frozen; also says how recordings are cut.
        model: the classifier of its tokens.
        classes: names of the classes; of one logit, of the negative and the positive class.
        kind: ``single_label``, ``binary`` or ``multi_label``.
    """

    def __init__(self, tokenizer: Tokenizer, model: TFMEncoder, classes: Sequence[str], kind: str = "single_label") -> None:
        self.tokenizer, self.model, self.classes, self.kind = tokenizer, model.to(tokenizer.device).eval(), tuple(classes), kind
        expected = 2 if kind == "binary" else model.head.out_features
        if len(self.classes) != expected:
            raise UserError(f"expected the names of {expected} classes; got {', '.join(self.classes)}")
        if tokenizer.model.config.codes != model.config.codes:
            codes = model.config.codes, tokenizer.model.config.codes
            raise UserError(f"expected a tokenizer of the classifier's {codes[0]} codes; got one of {codes[1]}; name the one it was trained with")

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, device: str | torch.device = "auto", tokenizer: str | Path | None = None
    ) -> Classifier:
        """Load trained weights; the header names the classes and, unless `tokenizer` is given, the tokenizer's file beside it or in the package.

        Converted weights of the authors say neither: with `tokenizer` their classes are numbers, from 0.

        Raises:
            UserError: missing, corrupt or foreign weights, a header without classes, or a tokenizer of another vocabulary.
        """
        path = BUNDLED_CLASSIFIER if source is None else Path(source)
        if source is None and not path.exists():
            raise UserError(f"expected the package's own weights at {path}; they are missing; install foveal-eeg again or pass --checkpoint")
        model = model_from_weights(path, "tfm_encoder")
        assert isinstance(model, TFMEncoder)  # asked for by its system's name
        header = load_weights(path).metadata
        if tokenizer is None and not {"classes", "tokenizer"} <= header.keys():
            raise UserError(f"expected classes and tokenizer in the header of {path}; export it again, or pass --tokenizer: classes are numbers then")
        place = Path(tokenizer) if tokenizer is not None else (path if path.is_dir() else path.parent) / header["tokenizer"]
        if tokenizer is None and not place.exists() and (shipped := BUNDLED_CLASSIFIER.with_name(header["tokenizer"])).exists():
            place = shipped
        made = Tokenizer.from_pretrained(place, device if not isinstance(device, str) else resolve_device(device))
        made.preparation = preparation_of(path)
        logits = model.head.out_features
        kind = header.get("kind", "binary" if logits == 1 else "single_label")
        names = header["classes"].split("|") if "classes" in header else [str(index) for index in range(max(logits, 2))]
        return cls(made, model, names, kind)

    def __call__(
        self, raw: mne.io.BaseRaw, preparation: Preparation | None = None, progress: Callable[[float, float], None] | None = None
    ) -> pd.DataFrame:
        """One row a window: onset, duration (seconds), trial_type, probability, and ``p_<class>`` of each class.

        Windows in which every channel is flat or missing have trial_type ``n/a``. Of multi-label classifiers trial_type names all classes above
        0.5, joined by ``+``, or ``none``.

        Raises:
            UserError: as `Tokenizer`, or more channels than the classifier knows.
        """
        tokens = self.tokenizer(raw, preparation, progress)
        ids, most = tokens.ids, self.model.config.channels
        if ids.shape[1] > most:
            raise UserError(f"expected up to {most} channels; got {ids.shape[1]}; choose some with --channels")
        present = np.asarray((ids >= 0).all(-1))
        found = []
        with torch.inference_mode():
            for first in range(0, len(ids), 64):
                part = torch.from_numpy(np.maximum(ids[first : first + 64], 0)).long().to(self.tokenizer.device)
                logits = self.model(part, torch.from_numpy(present[first : first + 64]).to(self.tokenizer.device)).float()
                found.append((logits.softmax(-1) if self.kind == "single_label" else logits.sigmoid()).cpu().numpy())
        probability = np.concatenate(found)
        if self.kind == "binary":
            probability = np.concatenate([1 - probability, probability], axis=1)
        names = np.array(self.classes)
        if self.kind == "multi_label":
            words = ["+".join(names[row > 0.5]) or "none" for row in probability]
        else:
            words = names[probability.argmax(1)].tolist()
        heard = present.any(1)
        table = pd.DataFrame({"onset": tokens.starts, "duration": tokens.window, "trial_type": words, "probability": probability.max(1)})
        table.loc[~heard, "trial_type"] = "n/a"
        probability[~heard] = np.nan
        table.loc[~heard, "probability"] = np.nan
        for column, name in enumerate(self.classes):
            table[f"p_{name}"] = probability[:, column]
        table.attrs["notes"], table.attrs["seconds"], table.attrs["channels"] = tokens.notes, tokens.seconds, tokens.channels
        return table


def classify_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    tokenizer: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    seed: int = 0,
    step: float | None = None,
    montage: str = "auto",
    channels: Sequence[str] = (),
    band: tuple[float, float] | None = None,
    notch: float | None = None,
    as_json: bool = False,
) -> int:
    """What ``foveal eeg classify`` does: ``<stem>_windows.csv``, ``<stem>_events.tsv``, ``<stem>_annotations.edf`` and ``<stem>_classes.png``.

    Args:
        files: recordings, and folders of them.
        output: folder for the results; None is ``classes`` here.
        checkpoint: weights of a classifier; None is the package's own.
        tokenizer: weights of its tokenizer; None is the file that the classifier's header names.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: replace existing results instead of keeping them.
        seed: of torch; classifying draws nothing at random.
        step: seconds from one window to the next; None is the window.
        montage: ``auto``, ``bipolar`` or ``single``.
        channels: names to keep; none keeps all EEG.
        band: Hz of the band-pass; None is the weights' own.
        notch: Hz of mains hum; 0 takes none out, None looks for it.
        as_json: print the report as JSON.

    Returns:
        0, or 2 if a file could not be classified.

    Raises:
        UserError: nothing can be done at all: no file named, no output folder, no weights, no such device.
    """
    if not files:
        raise UserError("expected recordings to classify; got none; name some files or folders")
    torch.manual_seed(seed)
    folder = output_folder("classes" if output is None else output)
    classifier = Classifier.from_pretrained(checkpoint, device, tokenizer)
    preparation = adjusted(classifier.tokenizer.preparation, None, montage, channels, band, notch, step)
    report = BatchReport()
    suffixes = ("_windows.csv", "_events.tsv", "_annotations.edf", "_classes.png")

    def work(path: Path, stem: Path, entry: Entry, progress: Callable[[float, float], None]) -> None:
        raw, began = open_recording(path), time.perf_counter()
        table = classifier(raw, preparation, progress)
        runs = event_files.merge_runs(table[table["trial_type"] != "n/a"][["onset", "duration", "trial_type", "probability"]])
        seconds = table.attrs["seconds"]
        event_files.write_events(f"{stem}_windows.csv", table, seconds)
        event_files.write_events(f"{stem}_events.tsv", runs, seconds)
        event_files.write_events(f"{stem}_annotations.edf", runs, seconds)
        with atomic_write(f"{stem}_classes.png") as temporary:
            draw_classes(table, classifier.classes, path.name).savefig(temporary, dpi=130)
        entry.message = "; ".join(table.attrs["notes"])
        shares = table["trial_type"].value_counts(normalize=True)
        entry.numbers = {"seconds": seconds, "windows": len(table), **{f"share {name}": float(share) for name, share in shares.items()}}
        entry.numbers["real-time factor"] = (time.perf_counter() - began) / seconds

    batch(files, report, lambda stem: [folder / f"{stem}{suffix}" for suffix in suffixes], overwrite, work)
    return report.finish(as_json, {"seconds": ".1f", "windows": ".0f", "real-time factor": ".4f"})
