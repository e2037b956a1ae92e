"""Law: ``pqcodec inspect``: what an encoded file holds, from its headers alone."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.tools.files import input_file
from pqcodec.tools.outcome import bytes_text, print_json, shown

if TYPE_CHECKING:
    from pqcodec.formats.pqkv import PQKVFile
    from pqcodec.formats.single import SingleStream

WIDTH_WITHOUT_TERMINAL = 160


def inspect(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A .pqkv file or a single stream, or - for stdin.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what an encoded file holds.

    Only headers are read.
    """
    from pqcodec.formats.single import open_encoded

    with input_file(source) as path, open_encoded(path) as file:
        tensors = [_told(file, name) for name in file.names]
        whole = {"file": source, "file_bytes": file.size, "metadata": file.metadata, "tensors": tensors}
    if as_json:
        print_json(whole)
    else:
        _print_table(whole)


def _told(file: PQKVFile | SingleStream, name: str) -> dict[str, Any]:
    entry = file.entry(name)
    told: dict[str, Any] = {
        "name": name,
        "coded": entry.coded,
        "layer": entry.layer,
        "role": entry.role,
        "shape": entry.shape,
        "dtype": entry.dtype,
        "tensor_bytes": entry.tensor_bytes,
        "bytes": entry.body_bytes,
        "ratio": entry.tensor_bytes / entry.body_bytes,
    }
    if entry.coded:
        info = file.inspect(name)
        told |= {"bits_per_coordinate": info.bits_per_coordinate, "stream": asdict(info)}
    return told


def _print_table(whole: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    tensors = whole["tensors"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name", overflow="fold")
    for column, justify in (("role", "left"), ("layer", "right"), ("shape", "left"), ("dtype", "left"), ("preset", "left")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for column in ("centre", "seed", "exact tokens"):
        table.add_column(column)
    for column in ("bits/coord", "bytes", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for t in tensors:
        table.add_row(*(Text(cell) for cell in _cells(t)))
    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    original = sum(t["tensor_bytes"] for t in tensors)
    size = f"{bytes_text(whole['file_bytes'])}, {len(tensors)} tensors of {bytes_text(original)}"
    console.print(Text(f"{shown(whole['file'])}: {size}, {original / whole['file_bytes']:.2f}x smaller"))
    for key, value in whole["metadata"].items():
        console.print(Text(f"{shown(key)}: {value if isinstance(value, str) and value.isprintable() else ascii(value)}"))
    if tensors:
        console.print(table)


def _cells(t: dict[str, Any]) -> list[str]:
    shape = " x ".join(map(str, t["shape"])) or "-"
    layer = "-" if t["layer"] is None else str(t["layer"])
    ratio = f"{t['ratio']:.2f}"
    if not t["coded"]:
        return [shown(t["name"]), t["role"], layer, shape, t["dtype"], "exact", "-", "-", "-", "-", str(t["bytes"]), ratio]
    stream = t["stream"]
    preset = stream["preset"] or f"({stream['coding']})"
    exact = str(stream["exact_tokens"]) + (f" + {stream['exact_vectors']} vectors" if stream["exact_vectors"] else "")
    coded = [preset, stream["centered"] or "none", str(stream["seed"]), exact, f"{t['bits_per_coordinate']:.3f}"]
    return [shown(t["name"]), t["role"], layer, shape, t["dtype"], *coded, str(t["bytes"]), ratio]
