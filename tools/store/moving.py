"""Law: ``pqcodec store export`` and ``import``: prefixes go out of a store as files of their own and into another one."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.files import STANDARD, Input, check_output, input_file, inputs, make_folder
from pqcodec.tools.jobs import Show, report, run
from pqcodec.tools.outcome import bytes_text, shown
from pqcodec.tools.store.place import AsJson, Data, Folder, named, opened, prefixes, short

if TYPE_CHECKING:
    from pqcodec.formats.store.index import Row
    from pqcodec.formats.store.transfer import Added

EXTENSION = ".pqkv"


# -- export ------------------------------------------------------------------------------------------------------
def export(
    folder: Folder,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME] OUTPUT",
            help="A block, by the first digits of its name (6 or more), and the .pqkv file to write, or -.",
        ),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Every prefix; OUTPUT is a folder then.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Write a block and all before it into one file.

    Every byte is checked and nothing is decoded. "pqcodec store import" adds such files to another store.
    """
    if len(words) != (1 if everything else 2):
        raise InvalidArgument("NAME and OUTPUT are expected, or --all and a folder")
    target = words[-1]
    if target == STANDARD and (as_json or everything):
        raise InvalidArgument(f"{'--all' if everything else '--json'} and OUTPUT '-' do not go together; name a place")
    if target != STANDARD and target.lower().endswith(EXTENSION) == everything:
        raise InvalidArgument(f"{target}: {'a folder' if everything else f'a file {EXTENSION}'} is expected as OUTPUT")
    from pqcodec.formats.store.transfer import write_prefix

    with opened(folder, data) as shelf:
        rows = shelf.index.all()
        chosen = [prefix.end for prefix in prefixes(rows)] if everything else [named(rows, words[0])]
        places = {row.name: f"{target.rstrip('/')}/{short(row)}{EXTENSION}" if everything else target for row in chosen}
        for place in places.values():
            check_output("", place, force)

        def work(row: Row, show: Show) -> _Exported:
            place = places[row.name]
            if everything:
                make_folder(place)
            out: Any = sys.stdout.buffer if place == STANDARD else place
            size = write_prefix(shelf, row, out, lambda done, total: show(done / total))
            return _Exported(row.name.hex(), place, row.end, size)

        found = run(chosen, work, short, 1, "export")
    if not everything and not as_json:
        print(found[0].outcome.line(), file=sys.stderr if target == STANDARD else sys.stdout)
    report(found, _Exported.COLUMNS, everything, as_json)


@dataclass(frozen=True)
class _Exported:
    """What ``export`` tells of a prefix."""

    name: str
    output: str
    tokens: int
    file_bytes: int

    COLUMNS = ("tokens", "bytes", "output")
    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> list[str]:
        return [str(self.tokens), bytes_text(self.file_bytes), shown(self.output)]

    def line(self) -> str:
        output = "stdout" if self.output == STANDARD else shown(self.output)
        return f"{output}: {self.tokens} tokens, {bytes_text(self.file_bytes)}"


# -- import ------------------------------------------------------------------------------------------------------
def import_(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The store's folder; it is made where there is none.")],
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Files that export wrote, folders, patterns or URLs, or -.")
    ],
    shared: Annotated[
        bool, typer.Option("--shared", help="Others may use the store, as far as the umask lets them (default: you alone).")
    ] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Add prefixes that were exported to a store.

    A block is added once every byte of it is checked; what is there already stays as it is. Checksums tell damage, not forgery:
    whoever made the file can put any numbers under a right name, and models will read on from them. Import only what you trust
    as you trust the model's weights.
    """
    todo, many = inputs(sources, (EXTENSION,))
    if not many and "://" not in todo[0].path and todo[0].path != STANDARD:
        os.stat(todo[0].path)  # raises before a store is made
    from pqcodec.formats.containers import open_encoded
    from pqcodec.formats.store.transfer import add_prefix

    with opened(folder, data, new=True, shared=shared) as shelf:

        def work(item: Input, show: Show) -> _Imported:
            with input_file(item.path) as path, open_encoded(path) as file:
                return _Imported(item.path, add_prefix(shelf, file, lambda done, total: show(done / total)))

        found = run(todo, work, lambda item: item.path, 1, "import")
    if not many and not as_json:
        print(found[0].outcome.line())
    report(found, _Imported.COLUMNS, many, as_json)


@dataclass(frozen=True)
class _Imported:
    """What ``import`` tells of a file."""

    file: str
    added: Added

    COLUMNS = ("tokens", "new blocks", "there already", "new bytes", "evicted")
    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.file, **asdict(self.added)}

    def cells(self) -> list[str]:
        one = self.added
        counts = [str(n) for n in (one.tokens, one.new_blocks, one.present_blocks)]
        return [*counts, bytes_text(one.new_bytes), bytes_text(one.evicted_bytes)]

    def line(self) -> str:
        one = self.added
        evicted = f", {bytes_text(one.evicted_bytes)} evicted for it" if one.evicted_bytes else ""
        there = f"{one.new_blocks} blocks added, {one.present_blocks} there already"
        return f"{shown(self.file)}: {one.tokens} tokens, {there}, {bytes_text(one.new_bytes)} more{evicted}"
