"""Asking a vision-language model: which of these classes is the image, which text belongs to it. With ACE-LoRA's adapter or without."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import atomic_write, output_folder
from foveal.core.reports import BatchReport
from foveal.medical.checkpoints import load_official, model_from_weights
from foveal.medical.data.image_texts import PairCase, find_pairs
from foveal.medical.films import Film, collect_films, film_from_array, read_film
from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig, AdaptedCLIP
from foveal.medical.retrieval_metrics import ranks, recalls, same_text
from foveal.medical.vision_language import Base, BaseChoice, load_base

#: What the released evaluation says of a class.
TEMPLATES = ("a chest X-ray image of {}.", "Findings suggesting {}.")

TABLE, RETRIEVAL = "zero_shot.csv", "retrieval.csv"


class ZeroShot:
    """A vision-language model with its adapter.

    >>> asked = ZeroShot.from_pretrained(BaseChoice("biomed_clip_folder"), "ACE_LoRA.pt")
    >>> asked.classify("film.png", {"pneumonia": ["Findings suggesting pneumonia."], "no finding": ["a normal chest X-ray."]})

    Args:
        base: the model.
        adapter: None asks the model as it is.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.

    Raises:
        UserError: an adapter of another model's sizes.
    """

    def __init__(self, base: Base, adapter: ACELoRA | None = None, device: str | torch.device = "auto") -> None:
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.base = base
        self.network = base.network.to(self.device).eval()
        self.adapted: AdaptedCLIP | None = None
        if adapter is not None:
            try:
                self.adapted = AdaptedCLIP(base.network, adapter).to(self.device).eval()
            except ValueError as error:
                raise UserError(f"{error}; choose the base model that the adapter was trained on") from None

    @classmethod
    def from_pretrained(cls, base: BaseChoice, adapter: str | Path | None = None, device: str | torch.device = "auto") -> ZeroShot:
        """Load a model and an adapter: ours (.safetensors, a run or its checkpoint) or the authors' file.

        Raises:
            UserError: anything missing, corrupt or foreign.
        """
        loaded = None if adapter is None else load_adapter(adapter)
        return cls(load_base(base), loaded, device)

    @torch.no_grad()
    def image_vectors(self, images: Sequence[Any], batch: int = 16) -> Float[Tensor, "images width"]:
        """Unit vectors of images: files, `Film`s or arrays."""
        out = []
        for first in range(0, len(images), batch):
            pixels = torch.stack([self.base.preparation(_film(image)) for image in images[first : first + batch]]).to(self.device)
            out.append(self.network.image(pixels).tokens[:, 0] if self.adapted is None else self.adapted.images(pixels))
        return torch.cat(out).cpu()

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str], batch: int = 16) -> Float[Tensor, "texts width"]:
        """Unit vectors of texts."""
        return torch.cat([self._said([[text] for text in texts[first : first + batch]]) for first in range(0, len(texts), batch)])

    @torch.no_grad()
    def class_vectors(self, prompts: Mapping[str, Sequence[str]]) -> Float[Tensor, "classes width"]:
        """Unit vectors of classes, each said in one or several sentences."""
        return torch.cat([self._said([list(sentences)]) for sentences in prompts.values()])

    def classify(self, image: Any, prompts: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Class -> probability among those asked for."""
        return self.likeness(self.image_vectors([image]), self.class_vectors(prompts), list(prompts))

    def likeness(self, image: Float[Tensor, "1 width"], classes: Float[Tensor, "classes width"], names: Sequence[str]) -> dict[str, float]:
        """Class -> probability, with the model's own scale, as in the released evaluation."""
        scale = float(self.network.log_scale.detach().exp())
        return dict(zip(names, (scale * (image @ classes.mT)[0].cpu().double()).softmax(0).tolist(), strict=True))

    def _said(self, sentences: list[list[str]]) -> Float[Tensor, "classes width"]:
        """Each class' sentences as one vector: with the adapter tokens are averaged place by place, without it the sentences' vectors."""
        numbers = torch.stack([self.base.tokenizer(several) for several in sentences]).to(self.device)
        if self.adapted is not None:
            return self.adapted.classes(numbers).cpu()
        each = self.network.text(numbers.flatten(0, 1)).tokens[:, 0].unflatten(0, numbers.shape[:2])
        return torch.nn.functional.normalize(each.mean(1), dim=-1).cpu()


def load_adapter(source: str | Path) -> ACELoRA:
    """An adapter: exported weights, a run's folder or checkpoint, or the authors' file.

    Raises:
        UserError: none of these.
    """
    place = Path(source)
    if not place.exists():
        raise UserError(f"expected an adapter; {place} does not exist; check --adapter")
    if (place / "checkpoints").is_dir() or place.suffix == ".ckpt":
        from foveal.medical.classify import checkpoint_of
        from foveal.medical.tasks.export import trained

        system, config, state, _ = trained(checkpoint_of(place))
        if system != "ace_lora" or not isinstance(config, ACELoRAConfig):
            raise UserError(f"expected a run that trains an adapter (AdaptationTask); {place} trains {system}; choose another run")
        adapter = ACELoRA(config)
        adapter.load_state_dict(state)
        return adapter.eval()
    if place.is_dir() or place.suffix == ".safetensors":
        load_weights(place, "ace_lora")
        model = model_from_weights(place, "ace_lora")
    else:
        model = load_official("ace_lora", place).float()
    assert isinstance(model, ACELoRA)  # asked for by its system's name
    return model


def read_prompts(path: str | Path) -> dict[str, list[str]]:
    """Classes and their sentences from a file.

    A text file names a class a line, which is said in the released evaluation's two sentences. YAML or JSON is a list of such names, or maps
    names to a sentence or several.

    Raises:
        UserError: no such file, or fewer than two classes, or one without a sentence.
    """
    place = Path(path)
    if not place.is_file():
        raise UserError(f"expected a file of classes; {place} does not exist; check --prompts")
    try:
        text = place.read_text(encoding="utf-8")
        content: Any = (
            yaml.safe_load(text) if place.suffix in (".yaml", ".yml", ".json") else [line.strip() for line in text.splitlines() if line.strip()]
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"expected classes in {place}; it cannot be read: {' '.join(str(error).split())[:160]}") from None
    if isinstance(content, list):
        content = {str(name): [template.format(name) for template in TEMPLATES] for name in content}
    if not isinstance(content, dict) or len(content) < 2:
        raise UserError(f"expected at least two classes in {place}, a name a line, or YAML of names and sentences; got {_counted(content)}")
    prompts = {str(name): [said] if isinstance(said, str) else [str(one) for one in said or []] for name, said in content.items()}
    empty = [name for name, said in prompts.items() if not said]
    if empty:
        raise UserError(f"expected a sentence for every class in {place}; {', '.join(empty)} has none")
    return prompts


def _counted(content: Any) -> str:
    return f"{len(content)}: {', '.join(map(str, content))[:60]}" if isinstance(content, dict) else repr(content)[:60]


def _film(image: Any) -> Film:
    if isinstance(image, Film):
        return image
    return read_film(image) if isinstance(image, (str, Path)) else film_from_array(image)


def zero_shot_command(
    images: Sequence[Path], *, prompts: Path | None, pairs: Path | None, output: Path | None, base: str, tokenizer: str | None, adapter: Path | None,
    truth: Path | None = None, device: str = "auto", overwrite: bool = False, seed: int = 0, as_json: bool = False,
) -> int:  # fmt: skip
    """Classify images by sentences, or measure retrieval on a table of pairs. Returns the exit code."""
    torch.manual_seed(seed)
    if (prompts is None) == (pairs is None):
        raise UserError("expected one of --prompts FILE, to classify images, and --pairs TABLE, to find texts for images and images for texts")
    if pairs is not None and (images or truth is not None):
        raise UserError("expected neither images nor --truth beside --pairs: its table names them")
    said = None if prompts is None else read_prompts(prompts)
    if said is not None and not images:
        raise UserError("expected images to classify: files or folders before --prompts")
    folder = output or Path("zero_shot")
    places, cases = (collect_films(images, folder), []) if said is not None else ([], _pairs_of(pairs))
    labels = None
    if truth is not None and said is not None:
        from foveal.medical.film_truth import report_scores, truth_of  # torchmetrics takes seconds to import

        labels = truth_of(truth, places, list(said))
    report = BatchReport()
    target = folder / (TABLE if said is not None else RETRIEVAL)
    if target.exists() and not overwrite:  # the model, which may be large, is not even read
        report.kept(target, [str(target)])
        return report.finish(as_json)
    asked = ZeroShot.from_pretrained(BaseChoice(base, tokenizer), adapter, device)
    output_folder(folder, overwrite=True)
    note = "the base model is random: its answers mean nothing" if base.startswith("random:") else ""
    if said is not None:
        shares = _classify(asked, places, said, target, report, note)
        if labels is not None:
            report_scores(report, shares, labels, list(said), target.with_suffix(".json"))
        return report.finish(as_json, {"seconds": ".1f"} | dict.fromkeys(said, ".3f"))
    with report.item(str(pairs)) as entry:
        found = _retrieve(asked, cases, target)
        entry.numbers |= {name.replace("_", " ").replace("recall at ", "R@"): value for name, value in found.items()}
        entry.message = "; ".join(part for part in (f"{len(cases)} pairs", note) if part)
        entry.outputs += [str(target), str(target.with_suffix(".json"))]
    return report.finish(as_json)


def _pairs_of(table: Path | None) -> list[PairCase]:
    assert table is not None  # the command has looked
    cases, _ = find_pairs(table)
    if len(cases) < 2:
        raise UserError(f"expected at least two pairs in {table}; it has {len(cases)}")
    return cases


def _classify(
    asked: ZeroShot, places: Sequence[Path], prompts: Mapping[str, Sequence[str]], target: Path, report: BatchReport, note: str
) -> dict[Path, dict[str, float]]:
    """Probabilities of every image that could be read, also as a table."""
    classes, names = asked.class_vectors(prompts), list(prompts)
    found: dict[Path, dict[str, float]] = {}
    for place in track(places, "classifying", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()):
        with report.item(place) as entry:
            started = time.perf_counter()
            found[place] = shares = asked.likeness(asked.image_vectors([place]), classes, names)
            entry.numbers |= {**shares, "seconds": time.perf_counter() - started}
            entry.message = "; ".join(part for part in (_likeliest(shares), note) if part)
            entry.outputs.append(str(target))
    if found:
        rows = [{"film": str(place), "likeliest": _likeliest(shares), **shares} for place, shares in found.items()]
        with atomic_write(target) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6f")
    return found


def _likeliest(shares: Mapping[str, float]) -> str:
    return max(shares, key=lambda name: shares[name])


def _retrieve(asked: ZeroShot, cases: Sequence[PairCase], target: Path) -> dict[str, float]:
    """Ranks of every pair into a table, Recall@k into JSON beside it."""
    texts = [case.text for case in cases]
    image, text = asked.image_vectors([case.read() for case in cases]), asked.text_vectors(texts)
    similarity, fitting = image @ text.mT, same_text(texts)
    nearest, place = similarity.argmax(1).tolist(), ranks(similarity, fitting).tolist()
    nearest_image, place_of_text = similarity.argmax(0).tolist(), ranks(similarity.mT, fitting).tolist()
    rows = [
        {"image": case.name, "text": case.text, "rank of its text": place[index], "nearest text": texts[nearest[index]],
         "rank of its image": place_of_text[index], "nearest image": cases[nearest_image[index]].name}
        for index, case in enumerate(cases)
    ]  # fmt: skip
    found = recalls(image, text, texts)
    with atomic_write(target) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    with atomic_write(target.with_suffix(".json")) as temporary:
        adapter = None if asked.adapted is None else asdict(asked.adapted.adapter.config)
        about = {"pairs": len(cases), "base": asked.base.name, "adapter": adapter}
        temporary.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    return found
