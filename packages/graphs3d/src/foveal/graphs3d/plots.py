"""The pictures: one function a figure, numbers in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure


def draw_parity(pairs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], units: Mapping[str, str]) -> Figure:
    """Predictions against labels, a panel a property; properties without labels are left out.

    Args:
        pairs: property -> labels and predictions of each structure.
        units: property -> its unit.
    """
    shown = {name: rows for name, rows in pairs.items() if rows}
    figure = Figure(figsize=(3.6 * len(shown), 3.4), layout="constrained")
    for axes, (name, rows) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown.items(), strict=True):
        labels, predicted = (np.concatenate([row[side].ravel() for row in rows]) for side in (0, 1))
        low, high = min(labels.min(), predicted.min()), max(labels.max(), predicted.max())
        margin = 0.05 * (high - low) or 1.0
        axes.plot([low - margin, high + margin], [low - margin, high + margin], color="0.6", linewidth=1)
        axes.plot(labels, predicted, ".", markersize=3, rasterized=True)
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        axes.set_xlabel(f"Label ({units[name]})")
        axes.set_ylabel(f"Predicted ({units[name]})")
        axes.set_title(f"{name.capitalize()}, MAE {np.abs(labels - predicted).mean():.3g}", loc="left")
    return figure


def draw_relaxation(runs: Sequence[tuple[Sequence[float], Sequence[float]]], fmax: float) -> Figure:
    """Energy above the last one and largest force of each step, a line a structure.

    Args:
        runs: energies (eV) and largest forces (eV/A) of each structure.
        fmax: eV/A, that forces had to come below.
    """
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for energies, forces in runs:
        above = np.asarray(energies) - energies[-1]
        left.plot(above, linewidth=1)
        right.plot(forces, linewidth=1)
    left.axhline(0, color="0.7", linewidth=0.8)
    left.set(xlabel="Step", ylabel="Energy above the last (eV)")
    right.axhline(fmax, color="0.4", linewidth=0.8, linestyle="--")
    right.text(0.01, fmax, f"limit {fmax:g}", transform=right.get_yaxis_transform(), ha="left", va="bottom", fontsize=8, color="0.4")
    right.set(xlabel="Step", ylabel="Largest force (eV/A)", yscale="log")
    return figure


def draw_dynamics(runs: Mapping[str, np.ndarray], atoms: int, ensemble: str) -> Figure:
    """Total energy less its first value, and temperature, against time.

    Args:
        runs: name -> rows of time (ps), potential, kinetic and total energy (eV) and temperature (K).
        atoms: how many there are.
        ensemble: "nve" or "nvt"; the drift is written where energy should stay the same.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, rows in runs.items():
        change = 1000 * (rows[:, 3] - rows[0, 3]) / atoms
        text = name
        if ensemble == "nve" and len(rows) > 2:
            text = f"{name}: {np.polyfit(rows[:, 0], change, 1)[0]:+.2g} meV/atom/ps"
        above.plot(rows[:, 0], change, linewidth=1, label=text)
        below.plot(rows[:, 0], rows[:, 4], linewidth=0.8)
    above.axhline(0, color="0.7", linewidth=0.8)
    above.set_ylabel("Change of total energy\n(meV/atom)")
    above.legend(frameon=False, fontsize=8)
    below.set(xlabel="Time (ps)", ylabel="Temperature (K)", ylim=(0, None))
    return figure


def draw_bands(
    distances: Sequence[np.ndarray],
    frequencies: Sequence[np.ndarray],
    marks: Sequence[tuple[float, str]],
    dos: tuple[np.ndarray, np.ndarray],
    title: str,
) -> Figure:
    """Phonon bands along a path, and the density of states beside them.

    Args:
        distances: along the path, of each segment.
        frequencies: THz, (points, bands) of each segment; imaginary ones negative.
        marks: place and name of special points.
        dos: frequencies and densities.
        title: of the figure.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for places, rows in zip(distances, frequencies, strict=True):
        left.plot(places, rows, color="C0", linewidth=1)
    for place, _ in marks:
        left.axvline(place, color="0.8", linewidth=0.8, zorder=0)
    left.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    left.set_xticks([place for place, _ in marks], ["Γ" if name == "G" else name.replace("G", "Γ") for _, name in marks])
    left.set_ylim(min(0.0, 1.1 * min(rows.min() for rows in frequencies)) - 0.05, 1.05 * max(rows.max() for rows in frequencies))
    left.set(xlim=(distances[0][0], distances[-1][-1]), ylabel="Frequency (THz)")
    left.set_title(title, loc="left")
    right.fill_betweenx(dos[0], dos[1], color="C0", alpha=0.3, linewidth=0)
    right.plot(dos[1], dos[0], color="C0", linewidth=1)
    right.set(xlabel="States (1/THz)", xlim=(0, None))
    return figure


def draw_modes(wavenumbers: np.ndarray, rigid: np.ndarray, title: str) -> Figure:
    """Normal modes of a molecule as lines, imaginary ones left of zero, those of its motion as a whole in grey.

    Args:
        wavenumbers: 1/cm.
        rigid: whether each is the motion of the whole.
        title: of the figure.
    """
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    axes = figure.subplots()
    inside = wavenumbers[~rigid]
    axes.vlines(wavenumbers[rigid], 0, 1, linewidth=1, color="0.75")
    axes.vlines(inside[inside >= 0], 0, 1, linewidth=1)
    axes.vlines(inside[inside < 0], 0, 1, linewidth=1, color="C3")
    axes.set(xlabel="Wavenumber (1/cm; negative: imaginary)", ylim=(0, 1.1), yticks=[])
    axes.set_title(f"{title}, {len(inside)} vibrations (grey: the {rigid.sum()} motions of the whole)", loc="left")
    return figure


def draw_equation_of_state(
    volumes: np.ndarray, energies: np.ndarray, curve: tuple[np.ndarray, np.ndarray], volume: float, bulk_modulus: float, atoms: int
) -> Figure:
    """Energies against volume, the fitted curve, and its minimum.

    Args:
        volumes: A^3.
        energies: eV.
        curve: volumes and energies of the fit.
        volume: of lowest energy.
        bulk_modulus: GPa.
        atoms: how many there are; both axes are an atom's.
    """
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve[0] / atoms, curve[1] / atoms, color="C0", linewidth=1)
    axes.plot(volumes / atoms, energies / atoms, "o", color="C0", markersize=4)
    axes.axvline(volume / atoms, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(xlabel="Volume (A³/atom)", ylabel="Energy (eV/atom)")
    axes.set_title(f"{volume / atoms:.3f} A³/atom, bulk modulus {bulk_modulus:.1f} GPa", loc="left", fontsize=10)
    return figure
