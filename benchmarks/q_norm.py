"""What KVQuant's Q-Norm gains at 2 bits: ``python -m benchmarks.q_norm FILE ...``, of SmolLM2 on texts.

``fitted``: levels of least error. ``nearest``: levels by Q-Norm, of which encoders take the nearest, as
``calibrate.shared_levels(q_norm=True)`` has them. ``exact``: codes of the fitted levels, decoded by those of Q-Norm, as in
KVQuant: numbers get back all of their deviation. Keys before RoPE, values of all heads, the first token exact; of each tensor
its own levels. KL is that of the next token, the mean over texts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import pqcodec
from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.codecs.parts import Bench
from benchmarks.codecs.systems import Given, System
from pqcodec.calibrate import rows_to_code, shared_levels
from pqcodec.codings.declared import Codebook, half_bits
from pqcodec.stream.header import Header

WINDOWS, PREFIX, SCORED = 1, 768, 512


@dataclass(frozen=True)
class Levels:
    """Keys or values by a preset of 2 bits, whose levels are found in one of three ways."""

    preset: str
    way: str

    def encode(self, given: Given) -> bytes:
        """The stream."""
        rope, options = (
            given.tensor.rope,
            {"preset": self.preset, "exact_tokens": 1, "join_heads": given.tensor.role == "value"},
        )
        before = None if rope is None else replace(rope, first_position=rope.first_position + 1)
        rows = rows_to_code(given.x[:, 1:], rope=before, join_heads=given.tensor.role == "value")
        options |= {} if rope is None else {"rope": rope, "before_rope": True}
        normed = shared_levels(rows, self.preset, q_norm=True).levels
        if self.way == "nearest":
            return pqcodec.encode(given.x, levels=normed, **options)
        stream = pqcodec.encode(given.x, levels=shared_levels(rows, self.preset).levels, **options)
        if self.way == "fitted":
            return stream
        header = Header.from_bytes(stream)
        return replace(header, codebook=Codebook(half_bits(list(normed)))).to_bytes() + stream[header.header_bytes :]

    def bits(self, stored: bytes) -> int:
        """All bytes of the stream."""
        return 8 * len(stored)

    def decode(self, stored: bytes) -> torch.Tensor:
        """The tensor."""
        found: torch.Tensor = pqcodec.decode(stored)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.q_norm")
    parser.add_argument("texts", type=Path, nargs="+", metavar="FILE", help="UTF-8 texts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, model, tokenizer = lm.load(lm.SMOLLM2, lm.cache_dir())
    benches = [Bench.of(model, tokenizer, text.read_text(encoding="utf-8"), WINDOWS, PREFIX, SCORED) for text in options.texts]
    rows: list[dict[str, Any]] = []
    for preset in ("nuq2", "kvquant2"):
        for way in ("fitted", "nearest", "exact"):
            system = System(way, "KVQuant", Levels(f"{preset}-key", way), Levels(preset, way))
            found = [bench.measure(system) for bench in benches]
            row = {key: mean(one[key] for one in found) for key in found[0]}
            rows.append({"preset": preset, "way": way, **row})
            print(rows[-1], flush=True)
    texts = [text.name for text in options.texts]
    found_all = {"model": name, "texts": texts, "prefix": PREFIX, "scored": SCORED, "rows": rows}
    command = " ".join(["python -m benchmarks.q_norm", *map(str, options.texts)])
    print(f"wrote {results_file.write('q_norm', command, found_all)}")


if __name__ == "__main__":
    main()
