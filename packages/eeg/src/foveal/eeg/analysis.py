"""What a vocabulary is like: how much of it is used, which ids tell classes apart, what frequencies each motif has, how consistent a class is.

The paper shows these without defining them in code; the definitions here are our own and stand in each docstring.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from foveal.eeg.models.tfm_tokenizer import TFMTokenizer

#: Hz; the clinical bands.
BANDS = {"delta": (0.5, 4.0), "theta": (4.0, 8.0), "alpha": (8.0, 13.0), "beta": (13.0, 30.0), "gamma": (30.0, 100.0)}


def codebook_use(ids: Int[ndarray, "..."], codes: int) -> dict[str, float]:
    """Used ids, their share of the codebook, and perplexity (exp of the entropy of the ids); ids below 0 are left out."""
    counts = np.bincount(ids[ids >= 0].ravel(), minlength=codes)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return {
        "tokens": float(counts.sum()),
        "used": float((counts > 0).sum()),
        "utilisation": float((counts > 0).mean()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def histograms(ids: Int[ndarray, "windows channels frames"], codes: int) -> Float[ndarray, "windows codes"]:
    """How often each id occurs in each window, as shares of the window's tokens."""
    flat = ids.reshape(len(ids), -1)
    counts = np.zeros((len(flat), codes), dtype=np.float32)
    rows = np.repeat(np.arange(len(flat)), flat.shape[1])[flat.ravel() >= 0]
    np.add.at(counts, (rows, flat.ravel()[flat.ravel() >= 0]), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def class_distinctiveness(
    ids: Int[ndarray, "windows channels frames"], labels: Int[ndarray, " windows"], codes: int, classes: list[str], prior: float = 20.0
) -> pd.DataFrame:
    """For each used id and class, how much more often the class has it than the others do.

    `log_odds` is log(odds in the class / odds outside of it) with the overall share of the id as prior of weight `prior`, `z` is it in standard
    errors (Monroe, Colaresi, Quinn, "Fightin' Words", 2008). `unique` ids occur in one class only. Sorted by z within each class.
    """
    counts = np.stack([np.bincount(ids[labels == c][ids[labels == c] >= 0].ravel(), minlength=codes) for c in range(len(classes))]).astype(float)
    share = prior * counts.sum(0) / max(counts.sum(), 1)
    rows = []
    for c, name in enumerate(classes):
        inside, outside = counts[c] + share, counts.sum(0) - counts[c] + share
        n_in, n_out = inside.sum(), outside.sum()
        used = counts.sum(0) > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            odds = np.log(inside / (n_in - inside)) - np.log(outside / (n_out - outside))
            z = odds / np.sqrt(1 / inside + 1 / outside)
        unique = (counts[c] > 0) & (counts.sum(0) == counts[c])
        part = {
            "class": name,
            "token": np.flatnonzero(used),
            "count": counts[c, used].astype(int),
            "log_odds": odds[used],
            "z": z[used],
            "unique": unique[used],
        }
        rows.append(pd.DataFrame(part).sort_values("z", ascending=False))
    return pd.concat(rows, ignore_index=True)


def class_token_uniqueness(table: pd.DataFrame) -> pd.Series:
    """Share of a class' used ids that occur in no other class."""
    used = table[table["count"] > 0]
    return used.groupby("class")["unique"].mean()


def consistency(
    ids: Int[ndarray, "windows channels frames"], labels: Int[ndarray, " windows"], codes: int, classes: list[str], neighbours: int = 5
) -> pd.DataFrame:
    """Precision at `neighbours`: of a window's nearest others by the cosine of token histograms, the share of its own class; chance is beside it.

    Windows without a label are left out. Memory grows with the windows, not with their square.
    """
    known = labels >= 0
    histogram, label = np.sqrt(histograms(ids[known], codes)), labels[known]
    histogram /= np.maximum(np.linalg.norm(histogram, axis=1, keepdims=True), 1e-12)
    count = min(neighbours, len(label) - 1)
    hits = np.zeros(len(label))
    for start in range(0, len(label), 512):
        likeness = histogram[start : start + 512] @ histogram.T
        likeness[np.arange(len(likeness)), np.arange(start, start + len(likeness))] = -np.inf
        nearest = np.argpartition(-likeness, max(count - 1, 0), axis=1)[:, :count]
        hits[start : start + 512] = (label[nearest] == label[start : start + 512, None]).mean(1) if count else np.nan
    rows = [
        {"class": name, "windows": int((label == c).sum()), f"precision@{neighbours}": hits[label == c].mean(), "chance": (label == c).mean()}
        for c, name in enumerate(classes)
        if (label == c).any()
    ]
    return pd.DataFrame(rows)


@torch.no_grad()
def frequency_content(tokenizer: TFMTokenizer, tokens: Int[ndarray, " tokens"]) -> pd.DataFrame:
    """What spectrum the decoder gives each id standing alone: its peak in Hz, its centroid, and the share of power of each clinical band.

    The peak is where its magnitude stands out most from the mean of all codes, because the spectrum of every EEG falls with frequency.
    """
    every = tokenizer.decode(tokenizer.codebook.weight[:, None].float())[:, :, 0].clamp(min=0).double()
    magnitude = (every.expm1() if tokenizer.config.mode == "fixed" else every).cpu().numpy()
    usual = magnitude.mean(0)
    magnitude = magnitude[np.asarray(tokens)]
    frequency = np.arange(magnitude.shape[1]) * tokenizer.config.sample_rate / tokenizer.config.window
    power = magnitude**2
    total = np.maximum(power[:, frequency >= 0.5].sum(1), 1e-12)
    table = {
        "token": np.asarray(tokens),
        "peak_hz": frequency[(magnitude / (usual + 0.05 * usual.max())).argmax(1)],
        "centroid_hz": (power * frequency).sum(1) / np.maximum(power.sum(1), 1e-12),
    }
    for band, (low, high) in BANDS.items():
        table[band] = power[:, (frequency >= low) & (frequency < high)].sum(1) / total
    return pd.DataFrame(table)


def sequence_entropy(ids: Int[ndarray, "windows channels frames"]) -> Float[ndarray, "windows channels"]:
    """Entropy in bits of the ids within each window and channel: 0 says one thing over and over."""
    result = np.zeros(ids.shape[:2])
    for place in np.ndindex(*ids.shape[:2]):
        _, counts = np.unique(ids[place][ids[place] >= 0], return_counts=True)
        share = counts / max(counts.sum(), 1)
        result[place] = -(share * np.log2(share)).sum() + 0.0
    return result
