"""C kernels without an extension module: compiled once, never required, and shipped in the wheel."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foveal.kernels import native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C compiler")

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C file beside nothing, a cache of its own, and no library remembered."""
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FOVEAL_NATIVE", raising=False)
    native.load.cache_clear()
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "native").glob("*"))


@needs_compiler
def test_a_source_is_compiled_once_and_found_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load(str(source))
    assert library is not None
    assert library.answer() == 42
    assert len(cached(tmp_path)) == 1
    assert "compiled on this machine" in native.explain(str(source))
    native.load.cache_clear()
    monkeypatch.setattr(native, "compile_library", lambda source, target: pytest.fail("compiled a second time"))
    again = native.load(str(source))
    assert again is not None
    assert again.answer() == 42


@needs_compiler
def test_a_changed_source_is_compiled_anew(source: Path, tmp_path: Path) -> None:
    first = native.load(str(source))
    source.write_text(SOURCE.replace("42", "43"))
    native.load.cache_clear()
    second = native.load(str(source))
    assert first is not None
    assert second is not None
    assert (first.answer(), second.answer()) == (42, 43)
    assert len(cached(tmp_path)) == 2


def test_without_a_compiler_there_is_no_library_and_the_reason_is_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert native.compiler() is None
    assert native.load(str(source)) is None
    assert native.explain(str(source)) == "torch form (no C compiler found)"
    with pytest.raises(native.CompileError, match="no C compiler found"):
        native.compile_library(source, source.with_suffix(native.SUFFIX))


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    source.write_text("this is not C\n")
    assert native.load(str(source)) is None
    assert native.explain(str(source)) == "torch form (the C source did not compile)"
    assert cached(tmp_path) == []
    with pytest.raises(native.CompileError, match="error"):
        native.compile_library(source, tmp_path / f"answer{native.SUFFIX}")


@needs_compiler
def test_it_can_be_switched_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEAL_NATIVE", "0")
    assert native.load(str(source)) is None
    assert native.explain(str(source)) == "switched off by FOVEAL_NATIVE=0"


@needs_compiler
def test_a_shipped_library_is_preferred(source: Path, tmp_path: Path) -> None:
    native.compile_library(source, source.with_suffix(native.SUFFIX))
    assert native.load(str(source)) is not None
    assert cached(tmp_path) == []
    assert "shipped" in native.explain(str(source))


@needs_compiler
def test_a_shipped_library_older_than_its_source_is_not_used(source: Path) -> None:
    shipped = native.compile_library(source, source.with_suffix(native.SUFFIX))
    source.write_text(SOURCE.replace("42", "43"))
    os.utime(shipped, (time.time() - 100, time.time() - 100))
    library = native.load(str(source))
    assert library is not None
    assert library.answer() == 43


@needs_compiler
@pytest.mark.parametrize("where", ["shipped", "cached"])
def test_a_library_of_another_machine_is_compiled_for_this_one(source: Path, where: str) -> None:
    foreign = source.with_suffix(native.SUFFIX) if where == "shipped" else native.cache_file(source)
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_bytes(b"\x7fELF of another machine")
    os.utime(foreign, (time.time() + 100, time.time() + 100))
    library = native.load(str(source))
    assert library is not None
    assert library.answer() == 42


@needs_compiler
def test_an_unwritable_cache_means_the_torch_form(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("FOVEAL_CACHE", str(blocked))
    assert native.load(str(source)) is None


@needs_compiler
@pytest.mark.parametrize("family", sorted({path.stem for path in Path(native.__file__).parent.rglob("*.c")}))
def test_every_c_kernel_compiles_without_warnings_and_without_openmp(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = Path(native.__file__).parent.rglob(f"{family}.c")
    monkeypatch.setattr(native, "OPENMP", ("-Wall", "-Werror", "-Wno-unknown-pragmas"))
    assert ctypes.CDLL(str(native.compile_library(path, tmp_path / f"{family}{native.SUFFIX}"))) is not None


@pytest.mark.slow
@needs_compiler
def test_the_wheel_carries_the_libraries_and_imports_alone(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    project = Path(__file__).parents[2] / "kernels"
    subprocess.run([uv, "build", "--wheel", "-q", "-o", str(tmp_path), str(project)], check=True)
    (wheel,) = tmp_path.glob("foveal_kernels-*.whl")
    assert not wheel.name.endswith("-any.whl")
    target = tmp_path / "installed"
    shutil.unpack_archive(wheel, target, "zip")
    assert (target / "foveal" / "kernels" / "scan" / f"scan{native.SUFFIX}").exists()
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, foveal.kernels as k; from foveal.kernels import native; from foveal.kernels.scan import cpu\n"
        "assert k.__file__.startswith(sys.argv[1]), k.__file__\n"
        "assert 'shipped' in native.explain(cpu.SOURCE), native.explain(cpu.SOURCE)\n"
        "u = torch.randn(1, 2, 9); m = torch.randn(1, 3, 9)\n"
        "assert k.selective_scan(u, u, -torch.rand(2, 3), m, m, backend='cpu').isfinite().all()\n"
    )
    packages = str(Path(torch.__file__).parents[1])
    environment = {**os.environ, "PATH": "", "FOVEAL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": packages}
    # Without site (-S) the checkout's editable install is not seen: what is imported is the wheel.
    subprocess.run([sys.executable, "-S", "-c", script, str(target)], check=True, env=environment)
