"""Streams of one coding: what a session of it begins with, and the shared tables that all of them may name."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.presets import PRESETS
from pqcodec.stream.tables import BasisTable, LevelTable, RangeTable, SharedTable

CODINGS = {  # the names of codings on the command line
    "split": c.CODING_SPLIT,
    "paper": c.CODING_PAPER,
    "quads": c.CODING_QUADS,
    "pairs": c.CODING_PAIRS,
    "scalar": c.CODING_SCALAR,
    "residual": c.CODING_RESIDUAL,
    "sketch": c.CODING_SKETCH,
}
TOKENS, DIM, RANK = 5, 16, 6  # of the tensors that begin a session; directions of the basis
SEVERAL = slice(None, None, 3)  # presets that are shown with what may stand beside rows, too


@cache
def tables() -> tuple[SharedTable, ...]:
    """Shared tables that are here: of every kind one that rows of ``DIM`` numbers, or of ``RANK`` combinations, can have."""
    from spec_vectors import BOOKS

    levels = [LevelTable(tuple(np.linspace(-1, 1, 1 << bits))) for bits in (1, 2, 3, 4, 8)]
    fields = 1 + np.arange(2 * 2 * DIM).reshape(2, 2, DIM) / DIM
    ranges = [RangeTable(fields, width=DIM, channels=1), RangeTable(fields[:, :, :1], width=RANK, channels=c.MAX_HEAD_DIM)]
    eight = BOOKS.entries[[0, 1, 0, 1, 0, 1, 0, 1]]
    books = [BOOKS, type(BOOKS)(eight, BOOKS.channels)]
    return (*levels, BasisTable(np.eye(DIM)[:RANK]), *ranges, *books)


def is_of(coding: str | None, data: bytes) -> bool:
    """Whether bytes say that they are a stream of that coding; with None all are."""
    return coding is None or data[5:6] == bytes([CODINGS[coding]])


@cache
def coding_seeds(coding: str) -> dict[str, bytes]:
    """A small stream of every preset of a coding, and of some of them such as have more beside their rows."""
    import pqcodec
    from pqcodec import Rope

    def coded(preset: str, **options: Any) -> bytes:
        x = np.random.default_rng(len(preset)).standard_normal((2, TOKENS, DIM)).astype(np.float16)
        given = {"codebooks": tables()[-1]} if PRESETS[preset].by_vectors else {}
        return pqcodec.encode(x, preset=preset, backend="reference", **(given | options))

    names = [name for name, preset in PRESETS.items() if preset.coding == CODINGS[coding]]
    found = {name: coded(name) for name in names}
    for name in names[SEVERAL]:
        found[f"{name}, kept"] = coded(name, keep=[0, 2, 4], center="mean", exact_tokens=1, exact_vectors=[(1, 2)])
        if not PRESETS[name].estimates:
            found[f"{name}, before RoPE"] = coded(name, before_rope=True, rope=Rope(theta=100.0), exact_last=1)
    if coding == "scalar":
        found |= _naming_tables(coded)
    return found


def _naming_tables(coded: Any) -> dict[str, bytes]:
    """Streams of scalar coding that name shared tables."""
    of = {kind: [table for table in tables() if isinstance(table, kind)] for kind in (LevelTable, BasisTable, RangeTable)}
    two_bits, (basis,), (by_channel, of_rows) = of[LevelTable][1], of[BasisTable], of[RangeTable]
    return {
        "levels": coded("nuq2", levels=two_bits),
        "levels of keys": coded("kvquant2-key", levels=two_bits),
        "ranges": coded("kivi2-key", ranges=by_channel),
        "levels and ranges": coded("nuq2-key", levels=two_bits, ranges=by_channel),
        "basis and ranges": coded("nuq2", levels=two_bits, basis=basis, ranges=of_rows),
    }
