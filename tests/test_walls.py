"""Who may import whom: kernels know nothing of the house, core knows no domain, domains do not know each other, apps import lazily."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {path.name: path for folder in ("kernels", "packages/*", "apps") for path in ROOT.glob(f"{folder}/src/foveal/*") if path.is_dir()}
DOMAINS = sorted(set(ROOMS) - {"kernels", "core", "apps"})

#: Room -> the rooms it may import from beside itself.
MAY_IMPORT = {"kernels": set(), "core": set(), "apps": set(ROOMS), **{domain: {"kernels", "core"} for domain in DOMAINS}}


def imports(file: Path, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """(module, line) of each import, those inside functions and under TYPE_CHECKING too."""
    tree = ast.parse(file.read_text(), str(file))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            # `from foveal import audio` names the room in the second place.
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((str(name.value), node.lineno) for name in node.args[:1] if isinstance(name, ast.Constant))


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_from_a_room_above_or_beside_it(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    broken = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in ROOMS[room].rglob("*.py")
        for module, line in imports(file)
        if module.startswith("foveal.") and module.split(".")[1] not in allowed
    ]
    assert not broken, "\n".join(broken)


def test_the_kernels_need_torch_triton_and_the_standard_library_alone() -> None:
    import sys

    allowed = {*sys.stdlib_module_names, "torch", "triton", "foveal", "jaxtyping"}  # jaxtyping: for type checkers only, see below
    broken = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in ROOMS["kernels"].rglob("*.py")
        for module, line in imports(file)
        # The patch that triton's interpreter needs for numpy lives in the tests' part.
        if module.split(".")[0] not in allowed and "testing" not in file.parts
    ]
    assert not broken, "\n".join(broken)


def test_the_kernels_name_shapes_for_type_checkers_only() -> None:
    at_run_time = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in ROOMS["kernels"].rglob("*.py")
        for module, line in imports(file, top_level_only=True)
        if module.startswith("jaxtyping")
    ]
    assert not at_run_time


def test_the_apps_import_domains_and_torch_only_inside_functions() -> None:
    light = {"foveal.core.errors.UserError"}
    heavy = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in ROOMS["apps"].rglob("*.py")
        for module, line in imports(file, top_level_only=True)
        if module.split(".")[0] in ("torch", "lightning", "numpy", "foveal") and module not in light and not module.startswith("foveal.apps")
    ]
    assert not heavy, "\n".join(heavy)


def test_models_know_neither_training_nor_files() -> None:
    broken = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for domain in DOMAINS
        for file in (ROOMS[domain] / "models").glob("*.py")
        for module, line in imports(file)
        if module.split(".")[0] in ("lightning", "wandb", "matplotlib", "soundfile") or module.startswith("foveal.core")
    ]
    assert not broken, "\n".join(broken)


def test_foveal_is_a_namespace_that_no_distribution_owns() -> None:
    assert not [path for room in ROOMS.values() if (path := room.parent / "__init__.py").exists()]
