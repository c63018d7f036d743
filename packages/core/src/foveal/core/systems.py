"""What a published system is: the line that ``systems()`` of every domain gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A published system that a domain re-makes.

    Attributes:
        name: the word that `load_official` and ``foveal <domain> convert`` take.
        title: what it does, and for which data.
        paper: authors, title, venue.
        parameters: of the published main configuration.
        repository: where the authors' code is.
        licence: of the authors' code.
    """

    name: str
    title: str
    paper: str
    parameters: int
    repository: str
    licence: str
