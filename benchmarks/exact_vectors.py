"""Law: what is worth keeping exact of a chunk: its first tokens, or the vectors of each head farthest from its mean.

``python -m benchmarks.exact_vectors`` encodes a prefix's cache as LMCache cuts it, in chunks of 256 tokens, by the codec of
LMCache's serde, and holds what a model reads on from it against the exact cache: next-token KL, relMSE of keys and values, and
bytes, in which an exact token costs less than an exact vector: that one is coded, too, and has its place written beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.fidelity.measures import standard_error
from benchmarks.fidelity.reading import Window, windows_of
from pqcodec.formats.engines.chunks import ChunkCodec

CHUNK = 256  # tokens, LMCache's default
PREFIX, SCORED = 1024, 256
PRESET = "quad3"  # the serde's default
# name: exact tokens of the first chunk, of every other, exact vectors of each head
WAYS = {
    "nothing": (0, 0, 0),
    "first 3 tokens": (3, 3, 0),
    "first 4 tokens": (4, 4, 0),
    "first 4 tokens, of the first chunk alone": (4, 0, 0),
    "1 vector": (0, 0, 1),
    "2 vectors": (0, 0, 2),
    "3 vectors": (0, 0, 3),
    "4 vectors": (0, 0, 4),
    "first token and 1 vector": (1, 1, 1),
    "first token and 2 vectors": (1, 1, 2),
    "first 3 tokens and 1 vector": (3, 3, 1),
}


def coded(layers: lm.Layers, codec: ChunkCodec, way: tuple[int, int, int]) -> tuple[list[tuple[Any, Any]], int]:
    """Layers' keys and values [heads, tokens, dim] that went through chunks, float32, and the bytes of all chunks."""
    whole = torch.stack([torch.stack([x.transpose(0, 1).half() for x in pair]) for pair in layers], 1)
    made, size = torch.empty_like(whole), 0
    for first in range(0, whole.shape[2], CHUNK):
        part = whole[:, :, first : first + CHUNK].flatten(3).contiguous()
        chunks, back = replace(codec, exact_tokens=way[bool(first)], exact_vectors=way[2]), torch.empty_like(part)
        data = chunks.encode(part, b"")
        chunks.decode(data, back, b"")
        made[:, :, first : first + CHUNK], size = back.view(whole[:, :, first : first + CHUNK].shape), size + data.nbytes
    return [(key.transpose(0, 1).float(), value.transpose(0, 1).float()) for key, value in made.unbind(1)], size


def rows_of(model: Any, windows: Sequence[Window]) -> Iterator[dict[str, Any]]:
    """What each way costs on the windows: bytes over 16 bits, relMSE, KL and its standard error over the windows."""
    read = [lm.prefill(model, window.prefix) for window in windows]
    exact = [
        lm.continuation_logits(model, lm.cache_from(model, layers), window.fed)
        for layers, window in zip(read, windows, strict=True)
    ]
    heads, _, dim = read[0][0][0].shape
    codec = ChunkCodec(dim, heads, PRESET, rope=lm.rope_of(model.config))
    numbers = sum(x.numel() for layers in read for pair in layers for x in pair)
    for name, way in WAYS.items():
        found = [coded(layers, codec, way) for layers in read]
        kl = []
        for (layers, _), was, window in zip(found, exact, windows, strict=True):
            logits = lm.continuation_logits(model, lm.cache_from(model, layers), window.fed)
            kl.append(lm.compare(was, logits, window.following)["kl"])
        row: dict[str, Any] = {"way": name, "over_16_bits": sum(size for _, size in found) / (2 * numbers)}
        for side, role in enumerate(lm.ROLES):
            pairs = [
                (was[side], now[side]) for a, (b, _) in zip(read, found, strict=True) for was, now in zip(a, b, strict=True)
            ]
            error = sum(float((now - was).double().square().sum()) for was, now in pairs)
            row[f"{role}_rel_mse"] = error / sum(float(was.double().square().sum()) for was, _ in pairs)
        yield row | {"kl": sum(kl) / len(kl), "kl_standard_error": standard_error(torch.tensor(kl)), "kl_by_window": kl}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact_vectors", description="What to keep exact of a chunk.")
    parser.add_argument("--model", default=lm.SMOLLM2, help=lm.SOURCES)
    parser.add_argument("--text", action="append", type=Path, metavar="FILE", help="repeat it (default: benchmarks/data/*.txt)")
    parser.add_argument("--windows", type=int, default=2, metavar="N", help="of each text that has room (default: %(default)s)")
    asked = parser.parse_args()
    texts = asked.text or sorted((Path(__file__).parent / "data").glob("*.txt"))
    name, model, tokenizer = lm.load(asked.model, lm.cache_dir())
    windows: list[Window] = []
    for text in texts:
        ids = lm.token_ids(tokenizer, text.read_text())
        count = min(asked.windows, len(ids) // (PREFIX + SCORED + 1))
        windows += windows_of(ids, lm.opening_ids(tokenizer), count, PREFIX, SCORED)
    shown = Table(title=f"{name}, {PRESET}, chunks of {CHUNK} tokens, {len(windows)} windows of {PREFIX} + {SCORED} tokens")
    figures = ("over_16_bits", "key_rel_mse", "value_rel_mse", "kl", "kl_standard_error")
    for heading in ("exact", *figures):
        shown.add_column(heading, justify="left" if heading == "exact" else "right")
    rows = []
    for row in rows_of(model, windows):
        rows.append(row)
        shown.add_row(row["way"], *(f"{row[figure]:.4g}" for figure in figures))
        print(f"{row['way']}: KL {row['kl']:.4g}", flush=True)
    Console().print(shown)
    setting = {
        "model": name,
        "texts": [text.name for text in texts],
        "windows": len(windows),
        "prefix": PREFIX,
        "scored": SCORED,
    }
    setting |= {"preset": PRESET, "chunk_tokens": CHUNK}
    command = f"python -m benchmarks.exact_vectors --model {name} --windows {asked.windows}"
    command += "".join(f" --text {text.name}" for text in texts)
    print(results_file.write(f"exact_vectors.{name}", command, setting | {"rows": rows}))


if __name__ == "__main__":
    main()
