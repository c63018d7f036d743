"""Importing the kernels costs next to nothing, and needs no triton."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails from here on
import torch
from foveal.kernels import attention, explain
q = torch.randn(1, 2, 70, 8, requires_grad=True)
bias = torch.randn(1, 1, 70, 70, requires_grad=True)
attention(q, q, q, bias=bias).sum().backward()
assert bias.grad.isfinite().all()
print(explain(attention, q, q, q).reasons["triton"])
"""

WHAT_COMES = """
import sys
import torch
before = set(sys.modules)
import foveal.kernels
print(sorted(set(sys.modules) - before))
from foveal.kernels import attention
attention(*torch.randn(3, 1, 2, 4, 8))
print(sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in ("triton", "jaxtyping", "numpy")))
"""


def output_of(program: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()


def test_attention_and_its_gradients_work_where_triton_is_not_installed() -> None:
    assert output_of(WITHOUT_TRITON) == ["triton is not installed"]


def test_importing_the_package_imports_nothing_but_itself_and_a_call_on_the_cpu_no_triton() -> None:
    imported, foreign = output_of(WHAT_COMES)
    assert imported in ("['foveal', 'foveal.kernels']", "['foveal.kernels']")
    assert "triton" not in foreign
    assert "jaxtyping" not in foreign
