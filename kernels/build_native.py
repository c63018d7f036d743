"""Wheel build hook: compiles the C kernels where a C compiler is, and ships a pure wheel where there is none."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
PACKAGE = ROOT / "src" / "foveal" / "kernels"


def _native():
    """The run-time compiler of the package itself (foveal/kernels/native.py imports neither torch nor its siblings)."""
    spec = importlib.util.spec_from_file_location("foveal_kernels_native", PACKAGE / "native.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NativeBuildHook(BuildHookInterface):
    """Adds one shared library a C file to the wheel and tags it for the platform; says so and goes on where compiling fails."""

    def initialize(self, version: str, build_data: dict) -> None:
        native = _native()
        if native.compiler() is None:
            self.app.display_warning("no C compiler found: the wheel ships the torch forms of the C kernels only")
            return
        for source in sorted(PACKAGE.rglob("*.c")):
            try:
                native.compile_library(source, source.with_suffix(native.SUFFIX))
            except native.CompileError as error:
                self.app.display_warning(f"{source.name} did not compile, its torch form is used instead: {error}")
                continue
            build_data["artifacts"].append(str(source.with_suffix(native.SUFFIX).relative_to(ROOT)))
        if build_data["artifacts"] and version == "standard":
            build_data["pure_python"] = False
            tag = f"{sys.platform}_{platform.machine()}" if sys.platform == "linux" else None
            build_data["tag"] = f"py3-none-{tag}" if tag else None
            build_data["infer_tag"] = tag is None
