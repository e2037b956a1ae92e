"""Law: ``pqcodec verify``: every byte of an encoded file against its checksums; what is damaged is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.tools.files import input_file
from pqcodec.tools.outcome import DAMAGED, bytes_text, print_json, shown
from pqcodec.tools.progress import progress_bar

if TYPE_CHECKING:
    from pqcodec.stream import Damage


def verify(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A .pqkv file or a single stream, or - for stdin.")],
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Check all checksums of an encoded file.

    What is damaged is named by tensor and tokens; the exit code is 1 then.
    """
    from pqcodec.formats.single import open_encoded

    with input_file(source) as path, open_encoded(path) as file, progress_bar("verify", file.size) as show:
        found = file.verify(lambda done, total: show(done), backend=backend)
        size, count = file.size, len(file.names)
    if as_json:
        print_json({"file": source, "ok": not found, "damage": [_told(name, damage) for name, damage in found]})
    else:
        for name, damage in found:
            print(f"{'file metadata' if name is None else shown(name)}: damaged: {damage}")
        outcome = f"{len(found)} damaged places" if found else "all sound"
        print(f"{source}: {count} tensors, {bytes_text(size)}, {outcome}")
    if found:
        raise typer.Exit(DAMAGED)


def _told(name: str | None, damage: Damage | str) -> dict[str, Any]:
    if isinstance(damage, str):
        return {"name": name, "part": damage, "leading": None, "tokens": None}
    return {"name": name, "part": damage.part, "leading": damage.leading, "tokens": damage.tokens}
