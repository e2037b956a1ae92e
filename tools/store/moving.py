"""Law: ``pqcodec store export`` and ``import``: prefixes move between stores as single files."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.files import STANDARD, Input, check_output, input_file, inputs, make_parents
from pqcodec.tools.jobs import Show, report, run
from pqcodec.tools.outcome import bytes_text, shown
from pqcodec.tools.store.place import AsJson, Data, Folder, is_store, named, opened, prefixes, short

if TYPE_CHECKING:
    from pqcodec.formats.store.index import Row
    from pqcodec.formats.store.shelf import Shelf
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

    Every byte is checked and nothing is decoded. "pqcodec store import" adds such files to another store; it asks for the
    SHA-256 that is printed here (with --all one line for each file, as sha256sum writes them).
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
        outputs = {row.name: f"{target.rstrip('/')}/{short(row)}{EXTENSION}" if everything else target for row in chosen}
        for output in outputs.values():
            check_output("", output, force)

        def work(row: Row, show: Show) -> _Exported:
            output = outputs[row.name]
            if everything:
                make_parents(output)
            out: Any = sys.stdout.buffer if output == STANDARD else output
            done = write_prefix(shelf, row, out, lambda done, total: show(done / total))
            return _Exported(row.name.hex(), output, row.end, done.bytes, done.sha256)

        found = run(chosen, work, short, 1, "export")
    if not as_json:
        for one in found:
            if one.error is None:
                print(one.outcome.line(alone=not everything), file=sys.stderr if target == STANDARD else sys.stdout)
    report(found, _Exported.COLUMNS, everything, as_json)


@dataclass(frozen=True)
class _Exported:
    """The outcome of ``export`` for a prefix."""

    name: str
    output: str
    tokens: int
    file_bytes: int
    sha256: str

    COLUMNS = ("tokens", "bytes")
    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> list[str]:
        return [str(self.tokens), bytes_text(self.file_bytes)]

    def line(self, alone: bool) -> str:
        if not alone:
            return f"{self.sha256}  {shown(self.output)}"
        output = "stdout" if self.output == STANDARD else shown(self.output)
        return f"{output}: {self.tokens} tokens, {bytes_text(self.file_bytes)}, SHA-256 {self.sha256}"


# -- import ------------------------------------------------------------------------------------------------------
def import_(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The store's folder; it is made where there is none.")],
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Files that export wrote, folders, patterns or URLs, or -.")
    ],
    sha256: Annotated[
        list[str] | None,
        typer.Option("--sha256", metavar="DIGEST", help="The SHA-256 that export printed; once for each file."),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Without a digest: you trust whoever made the files as you trust the model's weights."),
    ] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Others may use the store, as far as the umask lets them (default: you alone).")
    ] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Add prefixes that were exported to a store.

    A file comes in once every byte of it is checked; blocks that are there already stay as they are. Checksums tell damage, not
    forgery: whoever made the file can put any numbers under a right name, and models will read on from them. So pass the digest
    that export printed, by a way that you trust (with several files, nothing is imported unless all of them are right), or
    --trust. Import only what you trust as you trust the model's weights.
    """
    from pqcodec.formats.store.transfer import add_checked, check_digest, check_trust, checked

    check_trust(sha256, trust)
    listed = inputs(sources, (EXTENSION,), keep_going=False)
    todo, many = listed.items, listed.many
    if not many and "://" not in todo[0].path and todo[0].path != STANDARD:
        os.stat(todo[0].path)  # raises before a store is created
    from pqcodec.formats.containers.kinds import open_encoded

    with ExitStack() as stack:
        store: list[Shelf] = []

        def shelf() -> Shelf:
            if not store:
                store.append(stack.enter_context(opened(folder, data, new=True, shared=shared)))
            return store[0]

        digests: dict[str, str] = {}
        paths: dict[str, str] = {}
        for item in todo if sha256 else []:  # check all files before the first is imported
            paths[item.path] = stack.enter_context(input_file(item.path, local=True))
            with open_encoded(paths[item.path]) as file:
                digests[item.path] = check_digest(file, sha256 or [])

        def work(item: Input, show: Show) -> _Imported:
            with ExitStack() as inner:
                path = paths.get(item.path) or inner.enter_context(input_file(item.path))
                file = inner.enter_context(open_encoded(path))
                incoming = checked(file, sha256=digests.get(item.path), trust=trust)
                return _Imported(item.path, add_checked(shelf(), incoming, lambda done, total: show(done / total)))

        if is_store(Path(folder)):
            shelf()  # a new store is created only when a file has proved sound
        found = run(todo, work, lambda item: item.path, 1, "import")
    if not many and not as_json:
        print(found[0].outcome.line())
    report(found, _Imported.COLUMNS, many, as_json)


@dataclass(frozen=True)
class _Imported:
    """The outcome of ``import`` for a file."""

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
