"""Law: ``--dry-run``: what a verb would write, told from headers; nothing is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from pqcodec.tools.files import STANDARD
from pqcodec.tools.outcome import bytes_text

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and how large; write nothing.")]


@dataclass(frozen=True)
class Forecast:
    """The outcome of a verb that writes nothing, for a file; sizes in bytes."""

    output: str
    tensors: int
    exact_tensors: int  # of these, how many are kept exactly
    tensor_bytes: int  # of the tensors' numbers
    body_bytes: int  # of what is written of them; the file's own description of them takes more
    notes: tuple[str, ...] = ()

    COLUMNS = ("tensors", "exact", "from", "to about")
    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"dry_run": True} | asdict(self)

    def cells(self) -> list[str]:
        """For the table of many files."""
        return [str(self.tensors), str(self.exact_tensors), bytes_text(self.tensor_bytes), bytes_text(self.body_bytes)]

    def line(self) -> str:
        """For one file."""
        output = "stdout" if self.output == STANDARD else self.output
        exact = f" ({self.exact_tensors} kept exactly)" if self.exact_tensors else ""
        size = f"about {bytes_text(self.body_bytes)} for {bytes_text(self.tensor_bytes)} of numbers"
        return f"would write {output}: {self.tensors} tensors{exact}, {size}"
