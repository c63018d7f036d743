"""What every dataset of this package gives: a mixture, the sources it is made of, and what to call it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Example(NamedTuple):
    """One mixture, or a batch of them; the default collate function stacks the tensors and lists the words."""

    mixture: Tensor  # ([batch,] samples)
    sources: Tensor  # ([batch,] sources, samples): as they sound in the mixture; what they leave of it is noise
    name: str | list[str] = ""
    group: str | list[str] = ""  # results are also averaged over each group, such as mixtures of a woman and a man
