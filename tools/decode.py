"""Law: ``pqcodec decode``: a .pqkv file or a single stream becomes a file of plain tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.files import check_output, input_file
from pqcodec.tools.outcome import bytes_text, print_json
from pqcodec.tools.progress import load_kernels, progress_bar

if TYPE_CHECKING:
    from pqcodec.formats.pqkv import PQKVFile
    from pqcodec.formats.single import SingleStream

    Opened = PQKVFile | SingleStream


def decode(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A .pqkv file or a single stream, or - for stdin.")],
    target: Annotated[str, typer.Argument(metavar="OUTPUT", help="The file to write: .safetensors, .npz or .npy.")],
    tokens: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Tokens A up to B - 1 of coded tensors, keys and values; an end may be left out."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Decode this tensor only; may be repeated.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Decode into a file of tensors."""
    check_output(source, target, force)
    wanted = _token_range(tokens)
    from pqcodec.formats.single import open_encoded
    from pqcodec.formats.tensors import checked_extension, write_tensors

    checked_extension(target)
    start = time.perf_counter()
    outcome = _Outcome()
    with input_file(source) as path, open_encoded(path) as file:
        names = _chosen(file, only)
        load_kernels(backend)
        with progress_bar("decode", sum(file.entry(name).tensor_bytes for name in names)) as show:
            found = _tensors(file, names, wanted, backend, show, outcome)
            write_tensors(target, found, file.metadata.get("safetensors") or {})
    if as_json:
        seconds = time.perf_counter() - start
        print_json({"output": target, **vars(outcome), "seconds": seconds, "decode_gb_per_s": outcome.rate})
    else:
        print(f"{target}: {outcome.tensors} tensors, {bytes_text(outcome.bytes)}, {outcome.rate:.3g} GB/s")


@dataclass
class _Outcome:
    """What ``decode`` tells at its end."""

    tensors: int = 0
    bytes: int = 0
    decode_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """GB/s of tensors out of the decoder, writing not counted."""
        return self.bytes / self.decode_seconds / 1e9 if self.decode_seconds else 0.0


def _token_range(text: str | None) -> tuple[int, int | None] | None:
    """The range that ``--tokens A:B`` asks for; an open end is None."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(end == "" or (end.isascii() and end.isdigit() and len(end) < 19) for end in (first, last)):
        raise InvalidArgument(f"--tokens {text!r}: A:B with numbers from 0 is expected, such as 0:128 or 64:")
    return int(first or 0), int(last) if last else None


def _chosen(file: Opened, only: list[str] | None) -> list[str]:
    """The names to decode, in the file's order; one that is not there raises InvalidArgument."""
    for name in only or ():
        file.entry(name)
    return [name for name in file.names if not only or name in only]


def _tensors(
    file: Opened,
    names: list[str],
    wanted: tuple[int, int | None] | None,
    backend: str,
    show: Callable[[int], None],
    outcome: _Outcome,
) -> Iterator[tuple[str, Any]]:
    from pqcodec.formats import exact

    read = 0
    for name in names:
        entry = file.entry(name)
        ranged = wanted is not None and len(entry.shape) > 1 and (entry.coded or entry.role != "other")
        tokens = None
        if ranged and wanted is not None:
            tokens = wanted[0], entry.shape[-2] if wanted[1] is None else wanted[1]

        def advance(done: int, total: int, before: int = read, size: int = entry.tensor_bytes) -> None:
            show(before + size * done // max(total, 1))

        start = time.perf_counter()
        tensor = file.decode(name, tokens=tokens, backend=backend, progress=advance)
        outcome.decode_seconds += time.perf_counter() - start
        outcome.tensors += 1
        outcome.bytes += exact.nbytes(tensor)
        read += entry.tensor_bytes
        show(read)
        yield name, tensor
