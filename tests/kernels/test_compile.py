"""Every shipped kernel compiles for every GPU architecture, and takes no more than the resource ledger says. No GPU is needed.

The compilations run in another process: triton's interpreter, which other tests switch on, leaves its marks on a process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveal.kernels.testing.compile import TARGETS, CompileCase, Resources, excess, families, read_ledger, write_ledger

LEDGER = Path(__file__).parents[2] / "kernels" / "resource_ledger"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TRAP = """
import triton, triton.language as tl
from foveal.kernels.testing.compile import CompileCase, CompileCheckError, compile_case

@triton.jit
def hungry(source, target, WIDTH: tl.constexpr):
    row = tl.arange(0, WIDTH)
    tile = tl.load(source + row[:, None] * WIDTH + row[None, :])
    tl.store(target + row[:, None] * WIDTH + row[None, :], tl.dot(tile, tl.trans(tile)))

def told(width, **options):
    try:
        print(compile_case(CompileCase("hungry", hungry, {"source": "*fp32", "target": "*fp32"}, {"WIDTH": width}, **options), "gfx942").matrix)
    except CompileCheckError as error:
        print(error)

told(64, matrix=True)
told(256)
told(24)  # not a power of two
"""


def in_a_clean_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def holds_the_ledger(*arguments: str) -> None:
    done = in_a_clean_process("-m", "foveal.kernels.testing.compile", "--check", str(LEDGER), *arguments)
    failures = [line for line in done.stdout.splitlines() if "FAILS" in line]
    assert done.returncode == 0, "\n".join(failures) or done.stderr[-3000:]


def test_short_list_of_kernels_compiles_for_every_architecture_within_the_ledger() -> None:
    holds_the_ledger("--quick")


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_kernel_compiles_for_every_architecture_within_the_ledger(family: str) -> None:
    holds_the_ledger("--family", family, "--jobs", str(os.cpu_count() or 1))


def test_kernel_that_cannot_be_launched_is_refused_with_the_reason(tmp_path: Path) -> None:
    script = tmp_path / "trap.py"
    script.write_text(TRAP)
    lines = in_a_clean_process(str(script)).stdout.splitlines()
    assert lines[0] == "v_mfma"
    assert "bytes of shared memory, gfx942 has 65536" in lines[1]
    assert "hungry does not compile for gfx942" in lines[2]


@pytest.mark.parametrize("family", families())
def test_family_that_ships_triton_kernels_has_a_ledger_of_every_target(family: str) -> None:
    _, entries = read_ledger(LEDGER, family)
    assert {target for targets in entries.values() for target in targets} == set(TARGETS)


@pytest.mark.parametrize("family", families())
def test_no_shipped_kernel_spills_128_bytes_of_registers_a_thread(family: str) -> None:
    _, entries = read_ledger(LEDGER, family)
    assert [(name, target) for name, targets in entries.items() for target, entry in targets.items() if entry["spilled_bytes"] >= 128] == []


def test_ledger_keeps_no_family_that_is_gone() -> None:
    assert "dense" in families()
    assert {path.stem for path in LEDGER.glob("*")} == set(families())


def test_written_ledger_is_read_back(tmp_path: Path) -> None:
    entries = {"forward d64": {"sm_90": {"registers": 10, "spilled_bytes": 0, "shared_bytes": 5, "matrix": None}}, "a": {"gfx942": {"registers": 1}}}
    write_ledger(tmp_path / "new", "dense", entries, "3.6.0")
    assert read_ledger(tmp_path / "new", "dense") == ("3.6.0", entries)
    assert read_ledger(tmp_path / "new", "scan") == (None, {})


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        (Resources(255, 8, 1000, "wgmma"), None),
        (Resources(255, 12, 1000, "wgmma"), "spills 12 bytes a thread, the ledger allows 8"),
        (Resources(10, 0, 1001, "wgmma"), "takes 1001 bytes of shared memory, the ledger allows 1000"),
        (Resources(10, 0, 1000, "mma.sync"), "lost its matrix instruction wgmma, uses mma.sync"),
    ],
)
def test_more_than_the_ledger_allows_is_named(measured: Resources, says: str | None) -> None:
    assert excess(measured, {"registers": 10, "spilled_bytes": 8, "shared_bytes": 1000, "matrix": "wgmma"}) == says
    assert "not in the ledger" in str(excess(measured, None))


def test_case_without_a_type_for_an_argument_is_refused() -> None:
    from foveal.kernels.testing.compile import CompileCheckError, compile_case

    class Kernel:
        arg_names = ("source", "length")

    with pytest.raises(CompileCheckError, match=r"arguments without a type or value: \['length'\]; not arguments of the kernel: \['size'\]"):
        compile_case(CompileCase("odd", Kernel(), {"source": "*fp32", "size": "i32"}), "sm_90")
