"""What a tokenized recording looks like: spectrogram with its token strip, how often tokens occur, and the motifs that matter."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy import ndarray

from foveal.eeg.analysis import class_distinctiveness, codebook_use, frequency_content
from foveal.eeg.models.tfm_tokenizer import TFMTokenizer
from foveal.eeg.predict import Tokens

_COLUMNS = 1200  # of the spectrogram and the strip: more windows than that are averaged
_NAMES = 20  # of channels beside the strip, at most
_INK, _LINE = "#333333", "#3b6ea5"


def motif_table(tokens: Tokens, model: TFMTokenizer, labels: ndarray, classes: list[str]) -> pd.DataFrame:
    """One row a used token: how often, its frequency content, and with labels of two or more classes the class it speaks for (z as in `analysis`)."""
    counts = np.bincount(tokens.ids[tokens.ids >= 0].ravel(), minlength=model.config.codes)
    used = np.flatnonzero(counts)
    table = frequency_content(model, used)
    table.insert(1, "count", counts[used])
    if len(set(labels[labels >= 0].tolist())) > 1:
        best = class_distinctiveness(tokens.ids, labels, model.config.codes, classes).sort_values("z").groupby("token").tail(1).set_index("token")
        table["class"] = best["class"].reindex(used).to_numpy()
        table["z"] = best["z"].reindex(used).to_numpy()
        return table.sort_values("z", ascending=False, ignore_index=True)
    return table.sort_values("count", ascending=False, ignore_index=True)


def draw_report(tokens: Tokens, model: TFMTokenizer, motifs: pd.DataFrame, labels: ndarray, classes: list[str], title: str = "") -> Figure:
    """The picture of one recording.

    The strip and the spectrogram show the channel with the most diverse tokens; a token's colour is its place on the scale of spectral centroids,
    so that slow and fast activity differ at a glance.
    """
    config = model.config
    valid = np.asarray((tokens.ids >= 0).any((0, 2)))
    diversity = [len(np.unique(tokens.ids[:, c])) if valid[c] else 0 for c in range(len(tokens.channels))]
    channel = int(np.argmax(diversity))
    centroid = np.full(config.codes, np.nan)
    centroid[motifs["token"]] = motifs["centroid_hz"]
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    grid = figure.add_gridspec(4, 1, height_ratios=(2.2, 1.5, 1.7, 2.1))
    top = figure.add_subplot(grid[0])
    picture = _spectrogram(top, tokens, channel, config.sample_rate / config.window)
    top.set_title(f"{title}  {tokens.channels[channel]}", loc="left", fontsize=10)
    strip = figure.add_subplot(grid[1], sharex=top)
    image = _strip(strip, tokens, centroid)
    figure.colorbar(picture, ax=top, pad=0.01, fraction=0.03).set_label("log(1 + magnitude)" if config.mode == "fixed" else "Magnitude")
    figure.colorbar(image, ax=strip, pad=0.01, fraction=0.03).set_label("Centroid (Hz)")
    top.tick_params(labelbottom=False)
    _frequencies(figure.add_subplot(grid[2]), tokens, config.codes)
    _motifs(figure, grid[3], tokens, motifs, centroid, config.sample_rate)
    return figure


def _scale(tokens: Tokens) -> tuple[float, str]:
    return (3600.0, "h") if tokens.seconds > 7200 else (60.0, "min") if tokens.seconds > 300 else (1.0, "s")


def _spectrogram(axes: Axes, tokens: Tokens, channel: int, resolution: float) -> AxesImage:
    assert tokens.spectra is not None
    values: ndarray = tokens.spectra[:, channel].astype(np.float32)
    per_column = -(-len(values) // _COLUMNS)
    first = np.arange(0, len(values), per_column)
    values = np.add.reduceat(values, first) / np.diff(first, append=len(values))[:, None]
    unit, _ = _scale(tokens)
    shown = values[:, : int(45 / resolution) + 1].T
    step = (tokens.starts[1] - tokens.starts[0]) if len(tokens.starts) > 1 else tokens.window
    extent = (tokens.starts[0] / unit, (tokens.starts[-1] + step) / unit, 0, shown.shape[0] * resolution)
    axes.set_ylabel("Frequency (Hz)")
    low, high = np.quantile(shown, 0.02), np.quantile(shown, 0.98)
    return axes.imshow(shown, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high)


def _strip(axes: Axes, tokens: Tokens, centroid: ndarray) -> AxesImage:
    """All channels' tokens over time, coloured by their centroid; of many frames that fall on one column, the first."""
    per_column = -(-len(tokens.starts) * tokens.ids.shape[2] // _COLUMNS)
    line = tokens.ids.transpose(1, 0, 2).reshape(len(tokens.channels), -1)[:, ::per_column]
    colours = np.where(line >= 0, centroid[np.maximum(line, 0)], np.nan)
    unit, name = _scale(tokens)
    step = (tokens.starts[1] - tokens.starts[0]) if len(tokens.starts) > 1 else tokens.window
    extent = (tokens.starts[0] / unit, (tokens.starts[-1] + step) / unit, len(tokens.channels) - 0.5, -0.5)
    known = centroid[np.isfinite(centroid)]
    image = axes.imshow(
        colours, aspect="auto", interpolation="nearest", extent=extent, cmap="turbo", vmin=np.quantile(known, 0.02), vmax=np.quantile(known, 0.98)
    )
    axes.set_facecolor("#dddddd")
    shown = range(0, len(tokens.channels), -(-len(tokens.channels) // _NAMES))
    axes.set_yticks(shown, [tokens.channels[i] for i in shown], fontsize=6)
    axes.set_xlabel(f"Time ({name})")
    axes.set_ylabel("Tokens of channels")
    return image


def _frequencies(axes: Axes, tokens: Tokens, codes: int) -> None:
    counts = np.sort(np.bincount(tokens.ids[tokens.ids >= 0].ravel(), minlength=codes))[::-1]
    use = codebook_use(tokens.ids, codes)
    shown = counts[: max(int(use["used"]), 1)]
    axes.bar(np.arange(len(shown)), shown, width=1.0, color=_LINE)
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_xlabel("Token, most frequent first")
    axes.set_ylabel("Times")
    axes.set_title(f"{int(use['used'])} of {codes} ids in {int(use['tokens'])} tokens, perplexity {use['perplexity']:.0f}", loc="left", fontsize=10)


def _motifs(figure: Figure, place, tokens: Tokens, motifs: pd.DataFrame, centroid: ndarray, rate: float) -> None:
    """The motifs of the table that speak for a class, two to four of each class, or the most frequent ones."""
    if "class" in motifs:
        counts = motifs.groupby("class")["z"].max().nlargest(4).index
        per_class = max(1, 8 // max(len(counts), 1))
        chosen = pd.concat([motifs[(motifs["class"] == name) & (motifs["z"] > 0)].head(per_class) for name in counts]).head(8)
    else:
        chosen = motifs.head(8)
    grid = place.subgridspec(1, max(len(chosen), 1), wspace=0.05)
    known = centroid[np.isfinite(centroid)]
    low, high = np.quantile(known, 0.02), np.quantile(known, 0.98)
    for index, row in enumerate(chosen.rename(columns={"class": "speaks_for", "count": "times"}).itertuples(index=False)):
        axes = figure.add_subplot(grid[index])
        pieces = tokens.examples.get(int(row.token), [])
        for offset, piece in enumerate(pieces[:5]):
            shade = colormaps["turbo"](float(np.clip((row.centroid_hz - low) / max(high - low, 1e-9), 0, 1)))
            axes.plot(np.arange(len(piece)) / rate, piece / max(np.abs(piece).max(), 1e-9) - 2.1 * offset, color=shade, lw=0.8)
        axes.set_yticks([])
        axes.set_xticks([0, 0.5, 1.0])
        axes.tick_params(labelsize=7)
        axes.spines[["left", "right", "top"]].set_visible(False)
        said = f"for “{row.speaks_for}”, z {row.z:.1f}" if "class" in motifs else f"{row.times} times"
        axes.set_title(f"token {row.token}\n{said}\npeak {row.peak_hz:.0f} Hz", fontsize=8, color=_INK)
        if index == 0:
            axes.set_ylabel("Motifs", fontsize=9)
        axes.set_xlabel("s", fontsize=8, labelpad=1)


def draw_classes(table: pd.DataFrame, classes: tuple[str, ...], title: str = "") -> Figure:
    """Probabilities of every class over time, and what was said below."""
    unit, name = (3600.0, "h") if table["onset"].max() > 7200 else (60.0, "min") if table["onset"].max() > 300 else (1.0, "s")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middle = (table["onset"] + table["duration"] / 2) / unit
    palette = colormaps["tab10"]
    for index, label in enumerate(classes):
        top.plot(middle, table[f"p_{label}"], color=palette(index % 10), lw=1.0, label=label)
        chosen = table[table["trial_type"].str.split("+").map(lambda words, label=label: label in words)]
        bottom.broken_barh(
            [(a / unit, b / unit) for a, b in zip(chosen["onset"], chosen["duration"], strict=True)], (index - 0.4, 0.8), color=palette(index % 10)
        )
    top.set_ylim(0, 1)
    top.set_ylabel("Probability")
    top.set_title(title, loc="left", fontsize=10)
    top.legend(loc="upper left", bbox_to_anchor=(1.005, 1), frameon=False, fontsize=8)
    bottom.set_yticks(range(len(classes)), classes, fontsize=8)
    bottom.set_ylim(len(classes) - 0.4, -0.6)
    bottom.set_xlabel(f"Time ({name})")
    return figure
