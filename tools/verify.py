"""Law: ``pqcodec verify``: checks every byte of encoded files against their checksums and names the damage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.tools.decode import Sources
from pqcodec.tools.encode import Backend, Jobs
from pqcodec.tools.files import ENCODED, Input, input_file, inputs
from pqcodec.tools.jobs import Show, report, run
from pqcodec.tools.outcome import DAMAGED, bytes_text, shown

if TYPE_CHECKING:
    from pqcodec.formats.containers.reader import Findings
    from pqcodec.stream.report import Damage


def verify(
    sources: Sources,
    backend: Backend = "auto",
    jobs: Jobs = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Check all checksums of encoded files.

    What is damaged is named by tensor and tokens; the exit code is 1 then. Blocks of equal size that changed places with their
    checksums are found by the order seal that files hold; a single stream, and a file of an older release, has none.
    """
    from pqcodec.formats.containers.kinds import open_encoded

    def work(item: Input, show: Show) -> _Outcome:
        with input_file(item.path) as path, open_encoded(path) as file:
            found = file.verify(lambda done, total: show(done / max(total, 1)), backend=backend)
            return _Outcome(item.path, found, file.size, len(file.names), file.unsealed())

    listed = inputs(sources, ENCODED)
    done = run(listed.items, work, lambda item: item.path, jobs, "verify")
    if not as_json:
        for one in done:
            for line in one.outcome.lines(listed.many) if one.outcome else ():
                print(line)
    report(done, _Outcome.COLUMNS, listed.many, as_json)


@dataclass(frozen=True)
class _Outcome:
    """The outcome of ``verify`` for a file."""

    file: str
    found: Findings
    size: int
    tensors: int
    unsealed: list[str]  # tensors, the order of whose blocks nothing tells

    COLUMNS = ("tensors", "bytes", "")

    @property
    def exit_code(self) -> int:
        return DAMAGED if self.found else 0

    @property
    def verdict(self) -> str:
        if self.found:
            return f"{len(self.found)} damaged places"
        return "all sound" + (" but for the order of blocks, which no seal tells" if self.unsealed else "")

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "ok": not self.found,
            "damage": [_damage_fields(name, damage) for name, damage in self.found],
            "unsealed": self.unsealed,
        }

    def cells(self) -> list[str]:
        return [str(self.tensors), bytes_text(self.size), self.verdict]

    def lines(self, many: bool) -> list[str]:
        before = f"{shown(self.file)}: " if many else ""
        lines = [f"{before}{'file metadata' if n is None else shown(n)}: damaged: {damage}" for n, damage in self.found]
        return lines if many else [*lines, f"{self.file}: {self.tensors} tensors, {bytes_text(self.size)}, {self.verdict}"]


def _damage_fields(name: str | None, damage: Damage | str) -> dict[str, Any]:
    if isinstance(damage, str):
        return {"name": name, "part": damage, "leading": None, "tokens": None}
    return {"name": name, "part": damage.part, "leading": damage.leading, "tokens": damage.tokens}
