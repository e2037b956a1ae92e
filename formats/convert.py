"""Law: .pqkv <-> .safetensors without decoding: streams move byte for byte, exact tensors bit for bit.

Names, order, layers, roles and metadata go along, so a file that came back is the file that went.
"""

from __future__ import annotations

import os

from pqcodec.errors import InvalidArgument
from pqcodec.formats.pqkv import PathOrFile, PQKVFile, PQKVWriter
from pqcodec.formats.safetensors_file import Piece, SafetensorsCache, write_pieces


def pqkv_to_safetensors(source: PathOrFile | bytes, target: str | os.PathLike[str]) -> None:
    """Write the tensors of a .pqkv file as a .safetensors file; damage inside a stream goes along and stays visible.

    Raises InvalidArgument for what safetensors cannot hold (complex128) and for tensors that have grown (several streams).
    """
    with PQKVFile(source) as file:
        label = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the file"
        pieces = [_piece(file, name, label) for name in file.names]
        write_pieces(target, pieces, file.metadata)


def _piece(file: PQKVFile, name: str, label: str) -> Piece:
    entry = file.entry(name)
    if entry.parts > 1:
        raise InvalidArgument(
            f"{label}: tensor {name!r} has grown in {entry.parts} streams; decode it and encode it whole first"
        )
    body = (lambda: file.stream(name)) if entry.coded else (lambda: file.decode(name))
    return Piece(name, entry.coded, entry.layer, entry.role, entry.shape, entry.dtype, entry.layout, body)


def safetensors_to_pqkv(source: str | os.PathLike[str], target: PathOrFile) -> None:
    """Write the tensors of an encoded .safetensors file as a .pqkv file; damage in a stream goes along and stays visible."""
    with SafetensorsCache(source) as file, PQKVWriter(target, file.metadata or None) as writer:
        for name in file.names:
            entry = file.entry(name)
            if entry.coded:
                stream = file.stream(name)
                writer.add_stream(name, stream.read(0, stream.size).tobytes(), layer=entry.layer, role=entry.role)
            else:
                writer.add_exact(name, file.decode(name), layer=entry.layer, role=entry.role)
