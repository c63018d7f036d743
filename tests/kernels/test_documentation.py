"""Every Python example of the kernels' pages runs as it stands, top to bottom; their links lead somewhere. (The readme's run in test_repository.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "kernels").glob("*.md"))


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of the first statement, text) of each python block."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_from_top_to_bottom(page: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "example"}
    for line, text in blocks(page):
        exec(compile("\n" * line + text, str(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in ("index", "testing", "gpu")], ids=lambda page: page.stem)
def test_a_page_of_operators_has_an_example(page: Path) -> None:
    assert blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    linked = [target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()) if "://" not in target]
    assert [target for target in linked if not (page.parent / target).exists()] == []
