"""The frame of every command on the user's files: which were named, what each result is called, what became of each, and the exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ase
from ase.calculators.calculator import Calculator

from foveal.core.errors import UserError
from foveal.core.files import collect_inputs, output_folder
from foveal.core.memory import keep_freed_memory
from foveal.core.reports import BatchReport, Entry
from foveal.graphs3d.calculator import FovealCalculator
from foveal.graphs3d.data.structures import SUFFIXES, read_structures
from foveal.graphs3d.methods import METHODS, labeller

#: Structures that could not be computed which are named; of more their number.
_TOLD = 5
#: Does a file's work: its structures, the path of its main result, and the entry of the report to fill in.
Work = Callable[[list[ase.Atoms], Path, Entry], None]


def calculator_of(checkpoint: Path | None, method: str | None, device: str, dtype: str) -> Calculator:
    """What a command computes with: a network's weights, the package's own where none are named, or a method of `METHODS` to compare with.

    Raises:
        UserError: weights that cannot be loaded, or an unknown method.
    """
    if method is not None:
        return labeller(method)
    keep_freed_memory()
    return FovealCalculator.from_pretrained(checkpoint, device=device, dtype=dtype)


def name_of(checkpoint: Path | None, method: str | None) -> str:
    """What to call the potential in pictures."""
    return METHODS[method] if method is not None else "bundled potential" if checkpoint is None else Path(checkpoint).stem


class Going:
    """Works on the structures of a file one by one and goes on past those that cannot be computed.

    >>> going = Going()
    >>> for index, atoms in enumerate(structures):
    ...     with going.past(index):
    ...         results.append(compute(atoms))
    >>> going.refuse_all(len(structures))
    >>> ...  # write the results
    >>> going.tell()
    """

    def __init__(self) -> None:
        self.left: list[str] = []

    @contextmanager
    def past(self, index: int) -> Iterator[None]:
        """What cannot be computed inside the block is noted with the structure's number."""
        try:
            yield
        except UserError as error:
            self.left.append(f"structure {index}: {error}")

    def number(self, numbers: Iterable[int], structures: Iterable[ase.Atoms]) -> None:
        """Write the number in the file into each structure's ``info``, where the place in the results does not tell it."""
        if self.left:
            for number, atoms in zip(numbers, structures, strict=True):
                atoms.info.setdefault("structure", number)

    def refuse_all(self, count: int) -> None:
        """Raise where nothing is left to write.

        Raises:
            UserError: none of `count` structures could be computed.
        """
        if len(self.left) == count:
            raise UserError("; ".join(self.left[:_TOLD]) + (f"; and {count - _TOLD} more" if count > _TOLD else ""))

    def tell(self) -> None:
        """Raise where structures were left out, after the others were written.

        Raises:
            UserError: names them.
        """
        if self.left:
            more = f"; and {len(self.left) - _TOLD} more" if len(self.left) > _TOLD else ""
            raise UserError(f"{'; '.join(self.left[:_TOLD])}{more}; the other structures are written")


def run_files(
    files: Sequence[Path], folder: Path, ending: str, work: Work, overwrite: bool, as_json: bool, columns: dict[str, str] | None = None
) -> int:
    """Do the work of every file, and go on past one that fails.

    Args:
        files: of any format that ASE reads, and folders of them.
        folder: for the results; it is made.
        ending: ``<stem>_<ending>`` is a file's main result; where it exists it is kept.
        work: of one file.
        overwrite: replace existing results.
        as_json: print the report for machines.
        columns: format of each number's column in the summary.

    Returns:
        The exit code: 2 where a file failed.

    Raises:
        UserError: no inputs, or an output folder that cannot be written.
    """
    inputs = collect_inputs(files, SUFFIXES, apart_from=folder)
    output_folder(folder, overwrite)
    report = BatchReport()
    for path, stem in zip(inputs, stems(inputs), strict=True):
        target = folder / f"{stem}_{ending}"
        if target.exists() and not overwrite:
            report.kept(path, [str(target)])
            continue
        with report.item(path) as entry:
            work(read_structures(path), target, entry)
    return report.finish(as_json, columns)


def stems(files: Sequence[Path]) -> list[str]:
    """A name for the results of every file: its stem; where two share it with suffix, and where they share that too with a number.

    >>> stems([Path("a/cu.cif"), Path("a/cu.xyz"), Path("a/al.cif")])
    ['cu_cif', 'cu_xyz', 'al']
    """
    counts = Counter(file.stem for file in files)
    names = [file.stem if counts[file.stem] == 1 else f"{file.stem}_{file.suffix.removeprefix('.')}" for file in files]
    again = Counter(names)
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = name if again[name] == 1 else f"{name}_{seen[name]}"
    return names
