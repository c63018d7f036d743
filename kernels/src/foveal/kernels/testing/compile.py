"""Compile kernels for GPUs that are not here, and read what they cost: registers, spilled bytes, shared memory, matrix instructions.

triton compiles without a driver. A family lists what it ships in ``<family>/triton.py``'s ``compile_cases()``; this module compiles each
for each target, refuses what cannot be launched there, and compares the rest with a ledger kept under review, one file a family::

    python -m foveal.kernels.testing.compile --family dense --target sm_90
    python -m foveal.kernels.testing.compile --family dense --update kernels/resource_ledger
    python -m foveal.kernels.testing.compile --check kernels/resource_ledger
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def families() -> tuple[str, ...]:
    """Folders of foveal.kernels that ship Triton kernels: those that hold a triton.py."""
    return tuple(sorted(file.parent.name for file in Path(__file__).parents[1].glob("*/triton.py")))


@dataclass(frozen=True)
class Target:
    """A GPU architecture: triton's (backend, arch, lanes of a warp) and the shared memory that one block can have, in bytes."""

    backend: str
    arch: int | str
    lanes: int
    shared_limit: int
    matrix: tuple[str, ...]  # its matrix instructions, the widest first


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, ("mma.sync",)),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, ("wgmma", "mma.sync")),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, ("tcgen05.mma", "mma.sync")),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, ("v_mfma",)),
}


@dataclass(frozen=True)
class CompileCase:
    """One configuration of one kernel, as the launcher would run it.

    Attributes:
        name: unique in its family; what the ledger and the messages call it, such as ``forward-d64-bias-fp16``.
        kernel: the `triton.jit` function.
        signature: types of its run-time arguments, such as ``{"q": "*fp16", "length": "i32"}``; a named tuple of types for an argument that
            is one, with ``"constexpr"`` for a field that the launcher leaves None.
        constants: values of its constexpr arguments, and of arguments the launcher leaves None.
        num_warps: warps of one block.
        num_stages: stages of software pipelining.
        divisible: integer arguments known to be multiples of 16 (pointers always are); a field of a tuple as ``"argument.field"``.
        matrix: whether the kernel must use the matrix units.
        targets: names of the targets it ships for; empty: all.
        quick: whether it belongs to the short list that every run of the tests compiles.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    divisible: Sequence[str] = ()
    matrix: bool = False
    targets: Sequence[str] = ()
    quick: bool = False


#: {case: {target: entry}} of one family's ledger.
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Resources:
    """What one thread and one block of a compiled kernel take.

    `spilled_bytes` is the stack of a thread: these kernels have no arrays of their own, so it is what did not fit into registers.
    `matrix` is the widest matrix instruction in use, None without one.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix: str | None


class CompileCheckError(AssertionError):
    """A kernel does not compile for a target, cannot be launched there, or takes more than its ledger allows."""


def _bundled(tool: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise CompileCheckError("triton is not installed: nothing can be compiled")
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / tool)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_bundled("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise CompileCheckError(f"cuobjdump said nothing about registers: {text.strip()[:200]}")
    return int(found[1]), int(found[2])


def _amd_resources(amdgcn: str) -> tuple[int, int]:
    registers = max(int(value) for value in re.findall(r"\.vgpr_count:\s+(\d+)", amdgcn))
    stack = max(int(value) for value in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", amdgcn))
    return registers, stack


def _leaves(kind: Any, path: tuple[int, ...], name: str) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """(path, dotted name, type) of every argument, those inside named tuples included."""
    if isinstance(kind, str):
        yield path, name, kind
        return
    for position, (field_name, inner) in enumerate(zip(kind._fields, kind, strict=True)):
        yield from _leaves(inner, (*path, position), f"{name}.{field_name}")


def compile_case(case: CompileCase, target: str) -> Resources:
    """Compile `case` for `target` (a key of `TARGETS`), no GPU needed, and read its resources.

    Raises:
        CompileCheckError: it does not compile, needs more shared memory than the target has, or lacks the matrix instructions it must use.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    machine = TARGETS[target]
    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.signature and name not in case.constants]
    unknown = [name for name in (*case.signature, *case.constants) if name not in names]
    if missing or unknown:
        raise CompileCheckError(f"{case.name}: arguments without a type or value: {missing}; not arguments of the kernel: {unknown}")
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    leaves = [leaf for position, name in enumerate(names) for leaf in _leaves(signature[name], (position,), name)]
    attributes = {path: [["tt.divisibility", 16]] for path, name, kind in leaves if kind.startswith("*") or name in case.divisible}
    absent: dict[tuple[int, ...], Any] = {path: None for path, _, kind in leaves if kind == "constexpr" and len(path) > 1}
    constants: dict[Any, Any] = {**case.constants, **absent}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget(machine.backend, machine.arch, machine.lanes), options=options)
    except Exception as error:
        raise CompileCheckError(f"{case.name} does not compile for {target}: {str(error).strip()[:2000]}") from error
    if machine.backend == "cuda":
        registers, stack = _nvidia_resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers, stack = _amd_resources(assembly)
    matrix = next((instruction for instruction in machine.matrix if instruction in assembly), None)
    resources = Resources(registers, stack, int(compiled.metadata.shared), matrix)
    if resources.shared_bytes > machine.shared_limit:
        raise CompileCheckError(f"{case.name} needs {resources.shared_bytes} bytes of shared memory, {target} has {machine.shared_limit}")
    if case.matrix and resources.matrix is None:
        raise CompileCheckError(f"{case.name} does not use the matrix units of {target}")
    return resources


def family_cases(family: str) -> list[CompileCase]:
    """What ``foveal.kernels.<family>.triton`` ships."""
    cases: list[CompileCase] = importlib.import_module(f"foveal.kernels.{family}.triton").compile_cases()
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CompileCheckError(f"family {family} lists cases of the same name: {twice}")
    return cases


def _compile_named(family: str, name: str, target: str) -> Resources | str:
    case = next(case for case in family_cases(family) if case.name == name)
    try:
        return compile_case(case, target)
    except CompileCheckError as error:
        return str(error)


def compile_families(
    chosen: Sequence[str], targets: Sequence[str], *, quick: bool = False, jobs: int = 1, known: Mapping[str, Entries] | None = None
) -> Iterator[tuple[str, str, str, Resources | str]]:
    """Compile every case of the families but those of `known`; gives (family, case name, target, resources, or the reason why not)."""
    have = known or {}
    wanted = [
        (family, case.name, target)
        for family in chosen
        for case in family_cases(family)
        if case.quick or not quick
        for target in targets
        if target in (case.targets or TARGETS) and target not in have.get(family, {}).get(case.name, {})
    ]
    if jobs == 1:
        yield from ((*key, _compile_named(*key)) for key in wanted)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [(key, pool.submit(_compile_named, *key)) for key in wanted]
        yield from ((*key, future.result()) for key, future in futures)


def excess(resources: Resources, entry: Mapping[str, Any] | None) -> str | None:
    """What `resources` takes beyond its ledger entry, in words, or None. Registers are recorded, not held: only spilling costs."""
    if entry is None:
        return "is not in the ledger; run with --update and review the difference"
    if resources.spilled_bytes > entry["spilled_bytes"]:
        return f"spills {resources.spilled_bytes} bytes a thread, the ledger allows {entry['spilled_bytes']}"
    if resources.shared_bytes > entry["shared_bytes"]:
        return f"takes {resources.shared_bytes} bytes of shared memory, the ledger allows {entry['shared_bytes']}"
    if entry["matrix"] and resources.matrix != entry["matrix"]:
        return f"lost its matrix instruction {entry['matrix']}, uses {resources.matrix}"
    return None


def write_ledger(folder: Path, family: str, entries: Entries, triton: str) -> None:
    """Write <folder>/<family>.json: one line a case and target, sorted, so that a review shows what changed."""
    rows = sorted((f"{name} {target}", entry) for name, targets in entries.items() for target, entry in targets.items())
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{family}.json").write_text('{\n "triton": ' + json.dumps(triton) + ',\n "cases": {\n' + lines + "\n }\n}\n")


def read_ledger(folder: Path, family: str) -> tuple[str | None, Entries]:
    """The triton version that a family's entries were measured with, and the entries; (None, {}) where the family has no ledger."""
    path = folder / f"{family}.json"
    if not path.exists():
        return None, {}
    raw = json.loads(path.read_text(encoding="utf-8"))
    entries: Entries = {}
    for key, entry in raw["cases"].items():
        name, _, target = key.rpartition(" ")
        entries.setdefault(name, {})[target] = entry
    return raw["triton"], entries


def _shipped(family: str, entries: Entries) -> Entries:
    """The entries without those of configurations that no longer ship."""
    cases = {case.name: case.targets or tuple(TARGETS) for case in family_cases(family)}
    return {name: {target: entry for target, entry in found.items() if target in cases[name]} for name, found in entries.items() if name in cases}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 where a kernel fails its check."""
    parser = argparse.ArgumentParser(prog="python -m foveal.kernels.testing.compile", description="Compile every kernel for every GPU, without one.")
    parser.add_argument("--family", nargs="+", choices=families(), default=families())
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--quick", action="store_true", help="the short list only")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at the same time")
    parser.add_argument("--update", type=Path, metavar="FOLDER", help="write what was measured into the ledger (entries not compiled are kept)")
    parser.add_argument("--missing", action="store_true", help="with --update: compile only what the ledger lacks, and write after each")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="fail where a kernel takes more than the ledger says")
    asked = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: nothing can be compiled; install foveal-kernels[triton]", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: an interpreted kernel cannot be compiled
    import triton

    allowed: dict[str, Entries | None] = dict.fromkeys(asked.family)
    for family in asked.family if asked.check else ():
        version, entries = read_ledger(asked.check, family)
        if version is None or version == triton.__version__:
            allowed[family] = entries
        else:
            print(f"{family}'s ledger was written with triton {version}, this is {triton.__version__}: only the targets' own limits are held")
    if asked.missing and not asked.update:
        parser.error("--missing goes with --update FOLDER: the ledger says what is missing")
    whole = not asked.quick and not asked.missing and set(asked.target) == set(TARGETS)
    measured_now: dict[str, Entries] = {family: {} if whole or not asked.update else read_ledger(asked.update, family)[1] for family in asked.family}
    for family in asked.family if asked.missing else ():
        measured_now[family] = _shipped(family, measured_now[family])
    known = {family: {name: dict(entry) for name, entry in entries.items()} for family, entries in measured_now.items()} if asked.missing else None
    failures = 0
    for family, name, target, result in compile_families(asked.family, asked.target, quick=asked.quick, jobs=asked.jobs, known=known):
        reason: str | None
        if isinstance(result, str):
            reason, measured = result, ""
        else:
            entries_of_family = allowed[family]
            reason = None if entries_of_family is None else excess(result, entries_of_family.get(name, {}).get(target))
            measured = f"registers {result.registers:3d}  spilled {result.spilled_bytes:4d}  shared {result.shared_bytes:6d}"
            measured += f"  {result.matrix or ''}"
            measured_now[family].setdefault(name, {})[target] = asdict(result)
            if asked.missing:  # hours of compiling are not lost to an interruption
                write_ledger(asked.update, family, measured_now[family], triton.__version__)
        failures += reason is not None
        print(f"{family:8s} {name:44s} {target:7s} {measured}{'  FAILS: ' + reason if reason else ''}", flush=True)
    for family, entries in measured_now.items() if asked.update else ():
        write_ledger(asked.update, family, entries, triton.__version__)
    return 1 if failures else 0


if __name__ == "__main__":
    # The families import this module by its name: run that copy, not a second one called __main__.
    from foveal.kernels.testing.compile import main as run

    sys.exit(run())
