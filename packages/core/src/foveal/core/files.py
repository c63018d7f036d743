"""The user's files: which ones were named, where results go, and writing so that an interruption leaves no half file."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from foveal.core.errors import UserError


def collect_inputs(paths: Iterable[str | Path], suffixes: Iterable[str], apart_from: str | Path | None = None) -> list[Path]:
    """Files that the user named, and those with one of `suffixes` in the folders that the user named (subfolders too), sorted, each once.

    A file named directly is taken whatever its suffix: its content decides. Hidden files of a folder (``.name``) are not: programs leave them.

    Args:
        paths: files and folders.
        suffixes: with their dot, in lower case, such as ``{".wav", ".flac"}``; the case of a file's own suffix does not matter.
        apart_from: folder that results go to: where it lies below a folder that the user named, what an earlier run wrote there is no input.

    Raises:
        UserError: a path does not exist, or a folder holds no such file, or nothing was named.
    """
    wanted = {suffix.lower() for suffix in suffixes}
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            fitting = (file for file in path.rglob("*") if file.suffix.lower() in wanted and file.is_file() and not _is_hidden(file, path))
            inside = outside(fitting, path, apart_from)
            if not inside:
                raise UserError(
                    f"expected files ending in {', '.join(sorted(wanted))} in folder {path}; found none; name another folder or the files"
                )
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"expected an existing file or folder; {path} does not exist; check the path")
    if not found:
        raise UserError("expected at least one input file or folder; none was named")
    return sorted(each_once(found))


def each_once(files: Iterable[Path]) -> list[Path]:
    """Every file as it was named first, however often and however it is named again: from here, from the root, or by a folder that holds it.

    Two names of one file in a folder, as links are, stay two.
    """
    found: dict[Path, Path] = {}
    for file in files:
        found.setdefault(identity_of(file), file)
    return list(found.values())


def identity_of(file: str | Path) -> Path:
    """What a file is the same by: its folder, wherever a link to this lies, and its own name."""
    path = Path(file)
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def outside(files: Iterable[Path], named: Path, folder: str | Path | None) -> list[Path]:
    """Of the files in a folder that was named those that do not lie in `folder`, where this is a folder inside it."""
    results = None if folder is None else Path(folder).resolve()
    if results is None or named.resolve() not in results.parents:
        return list(files)
    return [file for file in files if results not in file.resolve().parents]


def without_results(
    inputs: Sequence[Path],
    names_of: Callable[[Sequence[Path]], list[str]],
    targets_of: Callable[[str], Iterable[Path]],
    named: Iterable[str | Path] = (),
) -> list[Path]:
    """`inputs` without those that are results of others among them, as an earlier call left them where ``-o`` is the folder of the inputs itself.

    Args:
        inputs: of a call.
        names_of: their results' names, as `output_names` gives them.
        targets_of: of such a name the files that may be written.
        named: what the user named; a file named directly is an input, whatever it looks like.
    """
    directly = {Path(path).resolve() for path in named}
    made = {target.resolve(): path for path, name in zip(inputs, names_of(inputs), strict=True) for target in targets_of(name)}
    return [path for path in inputs if path.resolve() in directly or made.get(path.resolve(), path) == path]


def refuse_replacing(sources: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Make sure that no result is written over a file that it is made of.

    Raises:
        UserError: one would be, with or without ``--overwrite``.
    """
    named = {source.resolve() for source in sources}
    for output in outputs:
        if output.resolve() in named:
            raise UserError(f"expected results beside what they are made of; {output} would be replaced by its own; choose another -o/--output")


def output_names(files: Sequence[Path]) -> list[str]:
    """A stem for the outputs of every file: its own; where two share it, with the suffix; where that is shared too, with its folders.

    >>> output_names([Path("a/call.wav"), Path("b/call.wav"), Path("b/talk.mp3")])
    ['a_call_wav', 'b_call_wav', 'talk']
    """
    names = [file.stem for file in files]
    depth = 0
    while repeated := {name for name, count in Counter(names).items() if count > 1}:
        for index, file in enumerate(files):
            if names[index] in repeated:
                folders = file.resolve().parent.parts[1:][-depth:] if depth else ()
                names[index] = "_".join([*folders, file.stem, file.suffix.removeprefix(".")]).rstrip("_")
        depth += 1
        if depth > 1 + max(len(file.resolve().parts) for file in files):
            return [f"{index + 1}_{name}" for index, name in enumerate(names)]
    return names


def output_folder(path: str | Path, overwrite: bool = False, names: Iterable[str] = ()) -> Path:
    """Make sure that files can be written into the folder `path`; where it does not exist yet, the first that `atomic_write` writes makes it.

    A command that refuses what it was given leaves no empty folder then.

    Args:
        path: the folder.
        overwrite: whether existing outputs may be replaced.
        names: files that the caller must not find there unless `overwrite`; a command that keeps existing outputs and goes on names none.

    Raises:
        UserError: `path` is a file, cannot be created or written, or holds one of `names` and `overwrite` is false.
    """
    folder = Path(path)
    there = _there(folder)
    if not there.is_dir():
        raise UserError(f"expected a folder for the output; {folder} is, or lies below, a file; choose another -o/--output")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        wanted = "written" if there == folder else "created"
        raise UserError(f"expected an output folder that can be {wanted}; {folder}: {error.strerror}; choose another -o/--output") from None
    if not overwrite:
        for name in names:
            if (folder / name).exists():
                raise UserError(f"{folder / name} already exists; pass --overwrite to replace it, or choose another -o/--output")
    return folder


def _there(folder: Path) -> Path:
    """`folder`, or of those above it the nearest one that exists: on the same disk, so that what is written there can be moved to `folder`."""
    return next(place for place in (folder, *folder.parents, Path()) if os.path.lexists(place))


@contextmanager
def all_or_none(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write several results into, which are moved to `folder` together when the block ends well; otherwise nothing is left.

    An interrupted run has no half set of results then, which a later one would take for a whole. `folder` is made when there is something to move.

    Raises:
        UserError: `folder` cannot be written.
    """
    target = Path(folder)
    try:
        made = tempfile.TemporaryDirectory(prefix=".results-", dir=_there(target))
    except OSError as error:
        raise UserError(f"expected to be able to write into {target}; {error.strerror}; choose another output") from None
    with made as place:
        yield Path(place)
        try:
            for file in sorted(Path(place).iterdir()):
                target.mkdir(parents=True, exist_ok=True)
                os.replace(file, target / file.name)
        except OSError as error:
            raise UserError(f"expected to be able to write into {target}; {error.strerror}; choose another output") from None


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, and rename it to `path`, whose folder is made, when the block ends well; otherwise nothing is left.

    The temporary name keeps the suffix of `path`, because writers of sounds and pictures choose the format by it.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=_there(target.parent))
    except OSError as error:
        raise UserError(f"expected to be able to write {target}; {error.strerror}; choose another output") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files that only the owner may read
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"expected to be able to write {target}; {error.strerror or error}; free some space or choose another output") from error
    finally:
        temporary.unlink(missing_ok=True)
