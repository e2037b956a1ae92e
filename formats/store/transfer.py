"""Law: export of a prefix as one .pqkv file with all its blocks, and import into another store (SPEC IV.4); nothing is decoded.

Tensors of block n are called ``n/<their name>``; the metadata's key "prefix.chain" holds the metadata of each block. So a block
that was exported and imported is the same file, byte for byte, except that one without seals gains them. Names stay as they
are: the other store finds them for the same model, settings and tenant. Whether the numbers are what the model computes cannot
be checked without it, so an import needs the digest that the export printed, or the caller's trust.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.containers.pqkv.file import PathOrFile, PQKVFile, write_pieces
from pqcodec.formats.containers.reader import Progress, TensorFile
from pqcodec.formats.containers.writer import Piece, pieces_of
from pqcodec.formats.plain.documents import is_format
from pqcodec.formats.store import blocks
from pqcodec.formats.store import folder as own
from pqcodec.formats.store.index import Row
from pqcodec.formats.store.keys import BLOCK_TOKENS, Chain
from pqcodec.formats.store.shelf import Shelf

KEY = "prefix.chain"  # key of the file's metadata
FORMAT = 1


# -- export ------------------------------------------------------------------------------------------------------
def lineage(shelf: Shelf, row: Row) -> list[Row]:
    """A block and its ancestors, from the first one on; raises InvalidArgument where one of them is missing."""
    found = [row]
    while found[0].start:
        before = shelf.index.find(found[0].parent)
        if before is None or not before.whole or before.end != found[0].start:
            raise InvalidArgument(f"block {row.name.hex()[:12]}: the block before token {found[0].start} is not in the store")
        found.insert(0, before)
    return found


@dataclass(frozen=True)
class Exported:
    """The result of ``write_prefix``."""

    bytes: int  # of the file
    sha256: str  # of the file, in hexadecimal, as ``add_prefix`` takes it


def write_prefix(shelf: Shelf, row: Row, target: PathOrFile, progress: Progress | None = None) -> Exported:
    """Write a block and its ancestors as one file, after checking every byte.

    ``progress`` is called with (tensors done, tensors in all). Raises InvalidArgument, CorruptStream or OSError; no file is
    left then.
    """
    source, pieces, metadata = _Opened(shelf), [], []
    for number, at in enumerate(lineage(shelf, row)):
        with shelf.files.open(at.file) as file:
            metadata.append(blocks.block_metadata(file))
            if metadata[-1]["name"] != at.name.hex():
                raise CorruptStream(f"{file.label}: is another block than {at.name.hex()[:12]}")
            pieces += [
                replace(piece, name=f"{number}/{piece.name}", body=source.body(at, piece.name)) for piece in pieces_of(file)
            ]
    digest = hashlib.sha256()
    try:
        size = write_pieces(target, pieces, {KEY: {"format": FORMAT, "blocks": metadata}}, progress, digest)
    finally:
        source.close()
    return Exported(size, digest.hexdigest())


class _Opened:
    """The blocks' files of an export, one open at a time, each verified before it is used."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._row: Row | None = None
        self._file: PQKVFile | None = None
        self._pieces: dict[str, Piece] = {}

    def body(self, row: Row, name: str) -> Callable[[], Any]:
        """The ``Piece.body`` of a tensor of a block; it opens the block's file when it is called."""

        def made() -> Any:
            if self._row is not row:
                self._open(row)
            return self._pieces[name].body()

        return made

    def _open(self, row: Row) -> None:
        self.close()
        self._row, self._file = row, self._shelf.files.open(row.file)
        if damage := self._file.verify():
            name, what = damage[0]
            raise CorruptStream(f"{self._file.label}: {'' if name is None else f'tensor {name!r}: '}damaged: {what}")
        self._pieces = {piece.name: piece for piece in pieces_of(self._file)}

    def close(self) -> None:
        """Close the open file, if there is one."""
        if self._file is not None:
            self._file.close()


# -- import ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Added:
    """The result of ``add_prefix``, after eviction."""

    name: str  # of the last block, in hexadecimal
    tokens: int  # of the prefix that are in the store now
    new_blocks: int
    present_blocks: int  # were in the store before
    new_bytes: int
    evicted_bytes: int  # of blocks dropped for the quota


@dataclass(frozen=True)
class Incoming:
    """A file that passed ``checked``, with the metadata and rows of its blocks."""

    file: TensorFile
    metadata: list[dict[str, Any]]  # of each block (``block_metadata``)
    rows: list[Row]


def add_prefix(
    shelf: Shelf, file: TensorFile, progress: Progress | None = None, *, sha256: str | None = None, trust: bool = False
) -> Added:
    """Add the blocks of a file that ``write_prefix`` wrote to a store, by ``checked`` and ``add_checked``."""
    return add_checked(shelf, checked(file, sha256=sha256, trust=trust), progress)


def checked(file: TensorFile, *, sha256: str | None = None, trust: bool = False) -> Incoming:
    """Check every byte of a file, and its digest.

    Checksums reveal damage, not forgery: any numbers can be put under right names. So ``sha256``, the digest that
    ``write_prefix`` returned, is required, over a channel that is trusted; or ``trust``, the caller's word that the makers of
    the file are trusted like those of the model's weights. Raises InvalidArgument where neither is given and for a file
    without a prefix, CorruptStream, UnsupportedStream and OSError.
    """
    check_trust(sha256, trust)
    if sha256 is not None:
        check_digest(file, {sha256})
    metadata, rows = _rows_in(file)
    if damage := file.verify():
        name, what = damage[0]
        raise CorruptStream(f"{file.label}: {'' if name is None else f'tensor {name!r}: '}damaged: {what}")
    return Incoming(file, metadata, rows)


def check_trust(sha256: str | Collection[str] | None, trust: bool) -> None:
    """Raises InvalidArgument where neither a digest nor trust is given, or a digest is no SHA-256 in hexadecimal."""
    digests = [sha256] if isinstance(sha256, str) else sha256 or []
    if not digests and not trust:
        raise InvalidArgument(
            "numbers under a right name cannot be checked: pass the SHA-256 that the export told (sha256=, --sha256) or, if "
            "you trust whoever made the file as you trust the model's weights, say so (trust=True, --trust)"
        )
    for digest in digests:
        if not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise InvalidArgument(f"{digest!r:.80} is no SHA-256: 64 hexadecimal digits are expected")


def check_digest(file: TensorFile, digests: Collection[str]) -> str:
    """The SHA-256 of a file, which has to be in ``digests``.

    Raises CorruptStream where it is not, and InvalidArgument for a URL or another container than .pqkv.
    """
    if not isinstance(file, PQKVFile):
        raise InvalidArgument(
            f"{file.label}: only a .pqkv file has the digest of an export; import that, or trust it (--trust)"
        )
    found = file.sha256()
    if found not in {digest.lower() for digest in digests}:
        raise CorruptStream(f"{file.label}: its SHA-256 is {found}: it is not the file that was exported; nothing is imported")
    return found


def add_checked(shelf: Shelf, incoming: Incoming, progress: Progress | None = None) -> Added:
    """Add the blocks of a checked file to a store; each block's new file is verified before it is committed.

    ``progress`` is called with (blocks done, blocks in all). Raises InvalidArgument for a prefix larger than the quota,
    CorruptStream for one that contradicts the store, and OSError; blocks that were added before the error stay.
    """
    shelf.index.check_writable()
    file, metadata, rows = incoming.file, incoming.metadata, incoming.rows
    about = {key: metadata[0][key] for key in ("label", "settings")}
    known = shelf.index.roots().get(rows[0].root)
    if known is not None and known[1] != about["settings"]:
        raise CorruptStream(f"{file.label}: names a root that stands for other settings in {shelf.place}")
    available = shelf.available_bytes({row.name for row in rows})
    if available is not None and file.size > available and any(shelf.index.find(row.name) is None for row in rows):
        text = f"takes {file.size} bytes, and the quota of {shelf.place} leaves room for {max(available, 0)}"
        raise InvalidArgument(f"{file.label}: {text}; raise it (gc --max-bytes)")
    pieces: list[list[Piece]] = [[] for _ in rows]
    for piece in pieces_of(file):
        number, _, name = piece.name.partition("/")
        pieces[int(number)].append(replace(piece, name=name))
    new: list[Row] = []
    for index, row in enumerate(rows):
        there = shelf.index.find(row.name)
        if there is None:
            written = _written(shelf, file, row, pieces[index], metadata[index])
            shelf.index.add_root(row.root, **about)
            new += [written] if shelf.commit(written) else []
        elif (there.parent, there.start, there.tokens.tolist()) != (row.parent, row.start, row.tokens.tolist()):
            raise CorruptStream(f"{file.label}: block {index} has the name of another block of {shelf.place}")
        if progress:
            progress(index + 1, len(rows))
    shelf.index.touch(rows, hit=False)
    present, evicted = len(rows) - len(new), shelf.evict()
    there_now = list(takewhile(lambda row: shelf.index.find(row.name) is not None, rows))
    kept = [row for row in new if row.name in {one.name for one in there_now}]
    tokens = there_now[-1].end if there_now else 0
    return Added(rows[-1].name.hex(), tokens, len(kept), present, sum(row.size for row in kept), evicted)


def _written(shelf: Shelf, file: TensorFile, row: Row, pieces: Sequence[Piece], metadata: dict[str, Any]) -> Row:
    """Write and verify a block's file and return its row; raises CorruptStream, and leaves no file then."""
    at = own.new_block_file(row.name)
    try:
        with shelf.files.writing(at) as path:
            row = replace(row, file=at, size=write_pieces(path, pieces, {blocks.KEY: metadata}))
        if wrong := shelf.problems(row):
            raise CorruptStream(f"{file.label}: tokens {row.start} to {row.end - 1} are damaged: {wrong[0]}")
    except BaseException:
        shelf.files.remove(at)
        raise
    return row


def _rows_in(file: TensorFile) -> tuple[list[dict[str, Any]], list[Row]]:
    """The metadata of each block and its row, still without a file, after checking that they form one prefix from token 0.

    Raises InvalidArgument for a file without a prefix, CorruptStream or UnsupportedStream.
    """
    chain = file.metadata.get(KEY)
    if chain is None:
        raise InvalidArgument(f"{file.label}: holds no prefix of a store; `pqcodec store export` writes such files")
    if not isinstance(chain, dict) or not isinstance(chain.get("blocks"), list) or not chain["blocks"]:
        raise CorruptStream(f"{file.label}: its metadata does not list the blocks of a prefix")
    metadata = chain["blocks"]
    form, *of_blocks = [of.get("format") if isinstance(of, dict) else None for of in (chain, *metadata)]
    if not is_format(form, FORMAT) or not all(is_format(of, blocks.FORMAT) for of in of_blocks):
        raise UnsupportedStream(f"{file.label}: a prefix of format {form!r}; install a newer pqcodec")
    try:
        wanted = {f"{number}/{name}" for number, of in enumerate(metadata) for name in _names(of)}
        if set(file.names) != wanted:
            raise CorruptStream(f"{file.label}: holds other tensors than its blocks tell")
        stored = [file.decode(f"{number}/{blocks.TOKENS}") for number in range(len(metadata))]
        rows = [blocks.row_of(of, blocks.tokens_of(of, tokens)) for of, tokens in zip(metadata, stored, strict=True)]
        names = Chain(metadata[0]["settings"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptStream(f"{file.label}: its metadata does not describe blocks ({error!r})") from error
    keyed = names.root != rows[0].root  # by a tenant's salt, which is not known here
    parent, end = rows[0].root, 0
    for number, (of, row) in enumerate(zip(metadata, rows, strict=True)):
        problem = _problem(row, parent, end, last=number == len(rows) - 1)
        if any(of[key] != metadata[0][key] for key in ("root", "stateful", "label", "settings")):
            problem = problem or "belongs to another prefix than the first one"
        if not keyed and names.child(parent, row.tokens) != row.name:
            problem = problem or "has a name that is not that of its tokens"
        if problem:
            raise CorruptStream(f"{file.label}: block {number} {problem}")
        parent, end = row.name, row.end
    return metadata, rows


def _names(metadata: dict[str, Any]) -> list[str]:
    """The names of the tensors of a block's file, from its metadata."""
    groups = metadata["groups"]
    coded = {(layer, group["path"]) for group in groups for layer in group["layers"]}
    each = [(index, path) for index, kind in enumerate(metadata["layers"]) for path in metadata["kinds"][kind]["tensors"]]
    rest = [f"layers.{index}.{path}" for index, path in each if (index, path) not in coded]
    return [*(group["name"] for group in groups), *rest, blocks.TOKENS]


def _problem(row: Row, parent: bytes, end: int, last: bool) -> str:
    """Why a block cannot follow ``parent``, which ends before token ``end``, or an empty string."""
    if (row.parent, row.start) != (parent, end):
        return "does not follow the one before it"
    if row.whole != (len(row.tokens) == BLOCK_TOKENS) or len(row.tokens) > BLOCK_TOKENS:
        return f"is of {len(row.tokens)} tokens"
    ends = last and (len(row.tokens) or row.stateful)
    return "" if row.whole or ends else "has a tail that something follows, or an empty one"
