"""What became of each file of a batch: collected while it runs, shown at its end, and turned into the exit code. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foveal.core.errors import UserError

State = Literal["done", "kept", "failed"]


@dataclass
class Entry:
    """One input: its state, the files written for it, a line about it, and numbers by column name."""

    source: str
    state: State = "done"
    outputs: list[str] = field(default_factory=list)
    message: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


class BatchReport:
    """Collects what became of each file; one that fails does not stop the others.

    >>> report = BatchReport()
    >>> for file in files:
    ...     with report.item(file) as entry:
    ...         entry.outputs = [str(separate(file))]
    ...         entry.numbers["real-time factor"] = 0.4
    >>> sys.exit(report.finish(as_json=False))
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    @contextmanager
    def item(self, source: str | Path) -> Iterator[Entry]:
        """Work on one file inside the block. A UserError there marks it failed and is not raised; a bug is raised."""
        entry = Entry(str(source))
        self.entries.append(entry)
        try:
            yield entry
        except UserError as error:
            entry.state, entry.message = "failed", str(error)

    def kept(self, source: str | Path, outputs: list[str]) -> None:
        """Note a file whose outputs exist and were kept."""
        self.entries.append(Entry(str(source), "kept", outputs, "already there; --overwrite replaces it"))

    @property
    def exit_code(self) -> int:
        """2 if any file failed, else 0."""
        return 2 if any(entry.state == "failed" for entry in self.entries) else 0

    def finish(self, as_json: bool = False, columns: dict[str, str] | None = None) -> int:
        """Show the report and give the exit code.

        Args:
            as_json: one JSON object on stdout, instead of a table on a terminal or plain lines elsewhere.
            columns: format of each number's column, such as ``{"SI-SDRi dB": ".1f"}``; others are shown with ``.3g``.
        """
        if as_json:
            files = [{**vars(entry), "numbers": {name: _finite(value) for name, value in entry.numbers.items()}} for entry in self.entries]
            print(json.dumps({"exit_code": self.exit_code, "files": files}, indent=2, allow_nan=False))
        elif sys.stdout.isatty():
            self._table(columns or {})
        else:
            self._lines(columns or {})
        return self.exit_code

    def _lines(self, formats: dict[str, str]) -> None:
        for entry in self.entries:
            numbers = [f"{name} {value:{formats.get(name, '.3g')}}" for name, value in entry.numbers.items()]
            details = [*numbers, entry.message, *entry.outputs]
            line = f"{entry.state}\t{entry.source}\t" + "\t".join(part for part in details if part)
            print(line, file=sys.stderr if entry.state == "failed" else sys.stdout)

    def _table(self, formats: dict[str, str]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        colours: dict[State, str] = {"done": "green", "kept": "yellow", "failed": "red"}
        names = list(dict.fromkeys(name for entry in self.entries for name in entry.numbers))
        table = Table("file", "state", *names, "result")
        for entry in self.entries:
            cells: list[Any] = [f"{entry.numbers[name]:{formats.get(name, '.3g')}}" if name in entry.numbers else "" for name in names]
            result = entry.message or "\n".join(entry.outputs)
            table.add_row(Text(entry.source), Text(entry.state, colours[entry.state]), *cells, Text(result))
        Console().print(table)


def _finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return float(value) if math.isfinite(value) else None
