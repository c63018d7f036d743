"""Opt-in tuning: time candidate tilings of a kernel on this GPU, and keep the fastest of those whose numbers are right.

A family says in ``<family>/triton.py``'s ``tunables()`` what may be tuned: kernel, sizes, candidates, and a call that launches it. Before a
candidate is timed, every result of that call is held against float64 by the error rule of the tests: a tiling that compiles and is fast,
but wrong on this pair of compiler and card, is refused and named. The winner must beat the shipped tiling by 3 % to be written.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveal.kernels import configurations
from foveal.kernels.configurations import Tiling
from foveal.kernels.testing.errors import BACKWARD, FORWARD, assert_close_to_definition

#: (tensors, backend) -> results of the forward pass, gradients.
Run = Callable[[Sequence[Tensor], str], tuple[Sequence[Tensor], Sequence[Tensor]]]

#: How much faster than the shipped tiling a candidate must be, to be worth a line in the user's cache.
_WORTH = 0.97


@dataclass(frozen=True)
class Tunable:
    """One entry of a family's table, and how to find a better one.

    Attributes:
        family: folder of foveal.kernels.
        kernel: name that the launcher asks `configurations.tiling` with.
        dtype: of the inputs.
        width: as the launcher gives it.
        candidates: tilings to try, beside the shipped one.
        inputs: (device) -> the tensors of one call, in the dtypes of a real call.
        run: (tensors, backend) -> results and gradients; called with float64 tensors and backend "reference" for the definition.
    """

    family: str
    kernel: str
    dtype: torch.dtype
    width: int
    candidates: Sequence[Tiling]
    inputs: Callable[[torch.device], Sequence[Tensor]]
    run: Run

    @property
    def entry(self) -> str:
        """Key of its line in the tuned file."""
        return configurations.entry(self.kernel, self.dtype, self.width)


@dataclass(frozen=True)
class Outcome:
    """What tuning found: `refused` maps a candidate, as text, to why it may not run; `milliseconds` has the others and "shipped"."""

    tunable: Tunable
    chosen: Tiling | None
    milliseconds: dict[str, float]
    refused: dict[str, str]


def families() -> list[str]:
    """Families whose triton.py says what may be tuned."""
    return [file.parent.name for file in sorted(Path(__file__).parent.glob("*/triton.py")) if "\ndef tunables(" in file.read_text(encoding="utf-8")]


def tunables(family: str, *, toy: bool = False) -> list[Tunable]:
    """What a family lets be tuned; `toy` gives its smallest sizes, for the interpreter."""
    return importlib.import_module(f"foveal.kernels.{family}.triton").tunables(toy=toy)


def label(candidate: Tiling) -> str:
    """A tiling as text, such as ``BLOCK_E=16 num_warps=4``."""
    return " ".join(f"{name}={value}" for name, value in candidate.items())


def _wider(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor for tensor in tensors]


def why_wrong(tunable: Tunable, candidate: Tiling, tensors: Sequence[Tensor], eager: tuple[Sequence[Tensor], ...], definition: tuple) -> str | None:
    """Why the candidate may not run: it does not compile, does not launch, or its numbers break the error rule. None where it may."""
    try:
        with configurations.trying(tunable.family, tunable.kernel, candidate):
            found = tunable.run(tensors, "triton")
        for part, (factor, results) in enumerate(zip((FORWARD, BACKWARD), found, strict=True)):
            for index, result in enumerate(results):
                name = f"{'gradient' if part else 'result'} {index}"
                assert_close_to_definition(result, eager[part][index], definition[part][index], factor=factor, name=name)
    except AssertionError as error:
        return str(error)
    except Exception as error:  # triton raises types of its own for what does not fit on the card
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
    return None


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def tune_one(tunable: Tunable, device: torch.device, rounds: int = 20) -> Outcome:
    """Check every candidate, time those that are right beside the shipped tiling, one after the other in each round."""
    tensors = tunable.inputs(device)
    eager, definition = tunable.run(tensors, "reference"), tunable.run(_wider(tensors), "reference")
    refused: dict[str, str] = {}
    right: list[Tiling] = [{}]  # nothing replaced: the shipped tiling
    for candidate in tunable.candidates:
        reason = why_wrong(tunable, candidate, tensors, eager, definition)
        if reason is None:
            right.append(candidate)
        else:
            refused[label(candidate)] = reason
    seconds: list[list[float]] = [[] for _ in right]
    for _ in range(rounds):
        for place, candidate in enumerate(right):
            with configurations.trying(tunable.family, tunable.kernel, candidate):
                seconds[place].append(_seconds(lambda: tunable.run(tensors, "triton"), device))
    medians = [statistics.median(times) for times in seconds]
    best = min(range(len(right)), key=medians.__getitem__)
    chosen = right[best] if best and medians[best] < _WORTH * medians[0] else None
    milliseconds = {label(candidate) or "shipped": round(1e3 * median, 4) for candidate, median in zip(right, medians, strict=True)}
    return Outcome(tunable, chosen, milliseconds, refused)


def tune(chosen: Sequence[str], device: torch.device, *, rounds: int = 20, toy: bool = False, save: bool = True) -> Iterator[Outcome]:
    """Tune the families, one entry after the other; a winner is written at once, so that an interrupted run keeps what it found."""
    for family in chosen:
        for tunable in tunables(family, toy=toy):
            outcome = tune_one(tunable, device, rounds)
            if save and outcome.chosen is not None:
                configurations.save(family, configurations.device_name(device), {tunable.entry: outcome.chosen})
            yield outcome
