"""How well does ACMIL classify musk1 and the UCSB breast set, beside attention-based MIL and mi-SVM on the very same folds?

Musk1 by the protocol of the published figures (Ilse et al., ICML 2018, table 1): ten folds, five times. UCSB breast: four folds, as often. Folds
are stratified. No fold chooses anything: every network trains to its end by the configuration's recipe, and nothing was tuned by fold. ABMIL is the
same network with one branch and nothing hidden, by the same recipe. mi-SVM (Andrews et al., 2002) is scikit-learn's SVC with an RBF kernel.

Scores are over all bags of a repetition, each predicted by the network that had not seen it; their mean and standard deviation over repetitions.

python benchmarks/bags.py [--sets musk1 ucsb_breast] [--repetitions 5] [--root FOLDER] writes benchmarks/results/bags.json after every repetition and
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from sklearn.svm import SVC

from foveal.kernels.bench import machine
from foveal.medical.bag_metrics import bag_scores
from foveal.medical.data.bag_sources import NAMED, BagItem
from foveal.medical.data.bags import LabelledBags
from foveal.medical.models.acmil import GatedACMIL, GatedACMILConfig
from foveal.medical.tasks.bags import BagTask

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "bags.json"
CONFIGS = {"musk1": "acmil_musk", "ucsb_breast": "acmil_ucsb"}
METHODS = ("ACMIL", "ABMIL", "mi-SVM")


def network_predictions(settings: dict[str, Any], data: LabelledBags, method: str, seed: int) -> torch.Tensor:
    """Probabilities of the test bags by a network trained on the others."""
    model = settings["model"]["init_args"]
    config = model["network"]["init_args"]["config"] | ({} if method == "ACMIL" else {"branches": 1, "hide": 0.0})
    pl.seed_everything(seed, verbose=False)
    task = BagTask(GatedACMIL(GatedACMILConfig(**config)), **{name: value for name, value in model.items() if name != "network"})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=settings["trainer"]["max_epochs"], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return torch.cat(trainer.predict(task, datamodule=data))  # type: ignore[arg-type]


def svm_predictions(data: LabelledBags) -> torch.Tensor:
    """The same by mi-SVM: instances of positive bags take the sign they are given, at least one of each stays positive, until none changes."""
    mean, scale = (part.numpy() for part in data.statistics())

    def read(items: Sequence[BagItem]) -> tuple[np.ndarray, np.ndarray]:
        bags = [(item.read() - mean) / scale for item in items]
        return np.concatenate(bags), np.repeat(np.arange(len(bags)), list(map(len, bags)))

    train = data.items("train")
    instances, bag = read(train)
    positive = np.array([data.class_of[item.label] for item in train])[bag] == 1
    signs = positive.copy()
    for _ in range(50):
        machine_ = SVC(C=1.0, kernel="rbf", gamma="scale").fit(instances, signs)
        values = machine_.decision_function(instances)
        found = positive & (values > 0)
        for number in np.unique(bag[positive]):
            inside = bag == number
            if not found[inside].any():
                found[np.flatnonzero(inside)[values[inside].argmax()]] = True
        if (found == signs).all():
            break
        signs = found
    held, of_bag = read(data.items("test"))
    values = machine_.decision_function(held)
    highest = torch.tensor([float(values[of_bag == number].max()) for number in range(of_bag.max() + 1)])
    return torch.stack([torch.zeros_like(highest), highest], 1).softmax(1)


def repetition(name: str, settings: dict[str, Any], number: int, root: str | None, methods: Sequence[str]) -> dict[str, Any]:
    """Every bag of a set predicted once by each method."""
    options = settings["data"]["init_args"] | ({} if root is None else {"root": str(Path(root) / NAMED[name])})
    predicted: dict[str, list[torch.Tensor]] = {method: [] for method in methods}
    seconds = dict.fromkeys(methods, 0.0)
    labels = []
    for fold in range(options["folds"]):
        data = LabelledBags(**options | {"fold": fold, "repetition": number})
        labels += [data.class_of[item.label] for item in data.items("test")]
        for method in methods:
            started = time.process_time()
            predicted[method].append(
                svm_predictions(data) if method == "mi-SVM" else network_predictions(settings, data, method, 1000 * number + fold)
            )
            seconds[method] += time.process_time() - started
    truth = torch.tensor(labels)
    return {
        method: {key: round(value, 4) for key, value in bag_scores(torch.cat(predicted[method]), truth)._asdict().items()}
        | {"cpu_seconds": round(seconds[method], 1)}
        for method in methods
    }


def summary(repetitions: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over repetitions."""
    table: dict[str, dict[str, list[float]]] = {}
    for method in repetitions[0]:
        for key in repetitions[0][method]:
            values = [one[method][key] for one in repetitions]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            table.setdefault(method, {})[key] = [round(float(np.mean(values)), 4), round(spread, 4)]
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--root", help="folder with musk1.csv and ucsb_breast_cancer.csv; default: an installed mil")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    report: dict[str, Any] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"sets": {}}
    for chosen in asked.sets:
        recipe = yaml.safe_load((ROOT / "configs" / "medical" / f"{CONFIGS[chosen]}.yaml").read_text(encoding="utf-8"))
        entry = report["sets"].setdefault(chosen, {"config": CONFIGS[chosen], "folds": recipe["data"]["init_args"]["folds"], "repetitions": []})
        while len(entry["repetitions"]) < asked.repetitions:
            entry["repetitions"].append(repetition(chosen, recipe, len(entry["repetitions"]), asked.root, asked.methods))
            entry["mean and standard deviation"] = summary(entry["repetitions"])
            report["machine"] = machine()
            asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"{chosen} repetition {len(entry['repetitions'])}: {entry['repetitions'][-1]}", flush=True)
