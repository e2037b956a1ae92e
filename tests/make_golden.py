"""Golden streams are born here, once: ``python tests/make_golden.py`` writes those that are not there yet.

A stream that is committed decodes for ever to the numbers beside it: tests/data/golden/NAME.pqs to NAME.npy (the stored
numbers as unsigned integers). Nothing is ever overwritten; a new case gets a new name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forged_streams import LEAST, streams
from spec_vectors import BOOKS, golden_lines

import pqcodec
from pqcodec import Rope

FOLDER = Path(__file__).parent / "data" / "golden"
TABLE = pqcodec.LevelTable((-1, -0.3, 0.3, 1))  # of a stream that names one; its bytes are v1-table-2.pqt
WIDE = pqcodec.VectorTable(  # likewise v1-table-rvq-64.pqt; that of 16 channels is the specification's
    np.random.default_rng(20).standard_normal((4, 32, 32)) * 0.8 ** np.arange(4)[:, None, None], np.arange(64)
)
DIRECTIONS = pqcodec.BasisTable(np.linalg.qr(np.random.default_rng(41).standard_normal((40, 40)))[0][:18])
_EACH = 1 + np.arange(2 * 32).reshape(2, 1, 32) % 7
FIELDS = pqcodec.RangeTable(np.concatenate([_EACH / 4, _EACH - 3], 1), width=20, channels=1)  # of two heads
TABLES = {"v1-table-2": TABLE, "v1-table-rvq-16": BOOKS, "v1-table-rvq-64": WIDE}
TABLES |= {"v1-table-basis-40": DIRECTIONS, "v1-table-ranges-20": FIELDS, "v1-table-ranges-ends": LEAST}
HASHES = Path(__file__).parents[1] / "formats" / "golden.txt"  # of all of them


def stored(x: torch.Tensor) -> np.ndarray:
    """The stored numbers of a tensor as uint16 or uint32."""
    return x.view(torch.int16).numpy().view(np.uint16) if x.element_size() == 2 else x.numpy().view(np.uint32)


def decoded(data: bytes, backend: str, tables: Any = ()) -> Any:
    """The tensor of a stream, or the rows that it keeps of one; of a sketch the estimate without bias."""
    if pqcodec.inspect(data).kept_of is None:
        return pqcodec.decode(data, tables=tables, backend=backend, estimate="unbiased")
    return pqcodec.decode_kept(pqcodec.given_tables(data, tables), backend=backend, estimate="unbiased")[0]


def cases() -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Every preset, dtype, kind of order and section at least once."""
    rng = np.random.default_rng(2502)

    def gaussian(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)

    of_quads = [preset for preset in pqcodec.PRESETS if preset.startswith("quad")]
    sparse = [preset for preset in pqcodec.PRESETS if pqcodec.PRESETS[preset].sparse]
    even = [preset for preset in pqcodec.PRESETS if pqcodec.PRESETS[preset].levels]
    by_levels = [preset for preset in pqcodec.PRESETS if pqcodec.PRESETS[preset].by_levels and preset not in (*sparse, *even)]
    sharing = [
        preset for preset in pqcodec.PRESETS if pqcodec.PRESETS[preset].affine and preset not in (*by_levels, *sparse, *even)
    ]
    sketches = [preset for preset in pqcodec.PRESETS if pqcodec.PRESETS[preset].estimates]
    of_books = [preset for preset in pqcodec.PRESETS if pqcodec.PRESETS[preset].by_vectors]
    others = [
        preset
        for preset in pqcodec.PRESETS
        if preset not in (*of_quads, *sharing, *by_levels, *sparse, *even, *of_books, *sketches)
    ]
    for preset in others:
        yield f"v1-{preset}-64-fp16", gaussian(2, 5, 64), {"preset": preset}
    for head_dim in (1, 20, 80, 96, 100, 112, 128, 160, 192, 256, 576, 1024):
        yield f"v1-pq3-{head_dim}-fp32", gaussian(2, head_dim, dtype=torch.float32), {"preset": "pq3"}
    yield "v1-pq6-128-bf16", gaussian(3, 128, dtype=torch.bfloat16), {"preset": "pq6", "seed": 2**64 - 1}
    yield "v1-pq3-64-mean", gaussian(2, 9, 64) + 3, {"center": "mean", "exact_tokens": 4, "chunk_tokens": 2}
    rope = Rope(theta=1e4, first_position=70000)
    yield "v1-pq2.5-64-rope-half", gaussian(2, 9, 64) + 3, {"preset": "pq2.5", "center": "rope", "rope": rope}
    rope = Rope(theta=1e6, dim=16, style="interleaved")
    yield (
        "v1-pq4-64-rope-interleaved",
        gaussian(1, 9, 64, dtype=torch.bfloat16) + 3,
        {"preset": "pq4", "center": "rope", "rope": rope},
    )
    odd = gaussian(2, 6, 64, dtype=torch.float32)
    odd[0, 1, 3], odd[1, 5, 0] = float("nan"), float("-inf")
    yield "v1-pq3-64-exact-vectors", odd, {"nonfinite": "exact", "exact_tokens": 1}
    powers = torch.logspace(-44, 38, 24, dtype=torch.float64)[:, None]
    extreme = (gaussian(24, 64, dtype=torch.float32).double().clamp(-3, 3) * powers).float()
    extreme[7] = 0
    yield "v1-pq3-64-extremes", extreme, {}
    yield "v1-paper-64-extremes", extreme[8:], {"preset": "paper"}
    yield "v1-pq3-64-empty", gaussian(3, 0, 64), {"center": "mean"}
    # From here on with two rounds of rotation; the streams of the split presets above were born before there were two.
    for preset in others:
        if preset != "paper":
            yield f"v1-two-{preset}-64-fp16", gaussian(2, 5, 64), {"preset": preset}
    for head_dim in (1, 20, 36, 72, 80, 96, 112, 128, 144, 160, 192, 256, 320, 576, 1024):
        yield f"v1-two-pq3-{head_dim}-fp32", gaussian(2, head_dim, dtype=torch.float32), {"preset": "pq3"}
    yield "v1-two-pq6-128-bf16", gaussian(3, 128, dtype=torch.bfloat16), {"preset": "pq6", "seed": 2**64 - 1}
    rope = Rope(theta=1e4, first_position=70000)
    options = {"preset": "pq2.5", "center": "rope", "rope": rope, "exact_tokens": 4, "chunk_tokens": 2}
    yield "v1-two-pq2.5-64-rope-half", gaussian(2, 9, 64) + 3, options
    extreme = (gaussian(24, 64, dtype=torch.float32).double().clamp(-3, 3) * powers).float()
    extreme[7] = 0
    yield "v1-two-pq3-64-extremes", extreme, {}
    for preset in of_quads:
        yield f"v1-{preset}-64-fp16", gaussian(2, 5, 64), {"preset": preset, "effort": "best"}
    for head_dim in (1, 12, 36, 80, 96, 112, 128, 160, 192, 256, 576, 1024):
        yield f"v1-quad3-{head_dim}-fp32", gaussian(2, head_dim, dtype=torch.float32), {"preset": "quad3"}
    yield "v1-quad2.25-48-bf16", gaussian(2, 3, 48, dtype=torch.bfloat16), {"preset": "quad2.25", "seed": 2**64 - 1}
    options = {"preset": "quad2.5", "center": "rope", "rope": rope, "exact_tokens": 4, "chunk_tokens": 2}
    yield "v1-quad2.5-64-rope-half", gaussian(2, 9, 64) + 3, options
    yield "v1-quad3-64-exact-vectors", odd, {"preset": "quad3", "nonfinite": "exact", "exact_tokens": 1, "center": "mean"}
    yield "v1-quad3.5-64-extremes", extreme, {"preset": "quad3.5", "chunk_tokens": 3}
    yield "v1-quad3-64-empty", gaussian(3, 0, 64), {"preset": "quad3", "center": "mean"}
    for preset in sharing:
        yield f"v1-{preset}-64-fp16", gaussian(2, 5, 64), {"preset": preset, "effort": "best"}
    for head_dim in (1, 7, 100, 128, 1024):
        yield f"v1-wu44-{head_dim}-fp32", gaussian(2, head_dim, dtype=torch.float32), {"preset": "wu44"}
        yield f"v1-int4-{head_dim}-fp32", gaussian(2, head_dim, dtype=torch.float32), {"preset": "int4"}
    turned = {"preset": "wu33", "pairing": "interleaved", "chunk_tokens": 256}
    yield "v1-wu33-20-groups", gaussian(2, 150, 20) + 1, turned
    yield "v1-kivi2-key-20-groups", gaussian(2, 150, 20) + 1, {"preset": "kivi2-key", "chunk_tokens": 64}
    options = {"preset": "wu35", "center": "rope", "rope": rope, "exact_tokens": 4}
    yield "v1-wu35-64-rope-half", gaussian(2, 9, 64, dtype=torch.bfloat16) + 3, options
    yield "v1-wu44-64-exact-vectors", odd, {"preset": "wu44", "nonfinite": "exact", "exact_tokens": 1, "center": "mean"}
    yield "v1-q4_0-64-exact-vectors", odd, {"preset": "q4_0", "nonfinite": "exact", "exact_tokens": 1, "center": "mean"}
    for preset in ("wu44", "int4"):
        yield f"v1-{preset}-64-extremes", extreme, {"preset": preset}
    yield "v1-wu44-64-least", extreme[:3] / 1e3, {"preset": "wu44"}
    yield "v1-wu44-64-constant", torch.full((130, 64), 3.0).half(), {"preset": "wu44", "chunk_tokens": 256}
    yield "v1-wu44-64-empty", gaussian(3, 0, 64), {"preset": "wu44", "center": "mean"}
    state = rng.bit_generator.state  # groups of cases that were added side by side draw the same numbers
    options = {"center": "rope", "rope": rope, "exact_tokens": 2, "exact_last": 3, "nonfinite": "exact", "chunk_tokens": 2}
    ends = gaussian(2, 10, 64) + 3
    ends[0, 4, 1], ends[1, 9, 0] = float("inf"), float("nan")
    yield "v1-quad2.5-64-exact-last", ends, {"preset": "quad2.5", **options}
    yield "v1-int4-20-exact-last", gaussian(2, 3, 20), {"preset": "int4", "exact_tokens": 1, "exact_last": 9}
    few = [[0, 1, 250, 251, 499], [7, 8, 90, 400, 401]]
    options = {"center": "rope", "rope": rope, "exact_tokens": 1, "exact_last": 1, "chunk_tokens": 2}
    yield "v1-pq3-64-keep-each", gaussian(2, 500, 64) + 3, {"keep": few, **options}
    turned = Rope(theta=1e6, dim=16, style="interleaved", first_position=2**32 - 5)
    many = [0, *range(2, 21)]
    options = {"center": "rope", "rope": turned, "chunk_tokens": 128, "keep": many}
    yield "v1-wu44-32-keep-bitmap", gaussian(2, 21, 32, dtype=torch.bfloat16) + 3, {"preset": "wu44", **options}
    yield "v1-quad3-64-keep-mean", gaussian(2, 9, 64) + 3, {"preset": "quad3", "center": "mean", "keep": [[3, 8], [0, 4]]}
    yield "v1-pq2-64-keep-nothing", gaussian(2, 9, 64), {"preset": "pq2", "center": "mean", "keep": []}
    rng.bit_generator.state = state
    for preset in by_levels:
        yield f"v1-{preset}-64-fp16", gaussian(2, 5, 64), {"preset": preset}
    for head_dim in (1, 7, 100, 128, 1024):
        yield f"v1-nuq3-{head_dim}-fp32", gaussian(2, head_dim, dtype=torch.float32), {"preset": "nuq3"}
    yield "v1-nuq2-48-given-bf16", gaussian(2, 5, 48, dtype=torch.bfloat16), {"preset": "nuq2", "levels": (-1, -0.3, 0.3, 1)}
    options = {"preset": "nuq4-key", "center": "rope", "rope": rope, "exact_tokens": 4}
    yield "v1-nuq4-key-64-rope-half", gaussian(2, 40, 64) + 3, options
    yield "v1-nuq3-64-exact-vectors", odd, {"preset": "nuq3", "nonfinite": "exact", "exact_tokens": 1, "center": "mean"}
    yield "v1-nuq4-64-extremes", extreme, {"preset": "nuq4"}
    yield "v1-nuq2-key-64-empty", gaussian(3, 0, 64), {"preset": "nuq2-key", "center": "mean"}
    yield "v1-nuq2-64-table-fp16", gaussian(2, 5, 64), {"preset": "nuq2", "levels": TABLE}
    for preset in sparse:
        yield f"v1-{preset}-64-fp16", gaussian(2, 300, 64) ** 3, {"preset": preset}
    for head_dim in (1, 2, 7, 100, 300, 1024):
        yield f"v1-kvquant3-{head_dim}-fp32", gaussian(3, head_dim, dtype=torch.float32), {"preset": "kvquant3"}
    options = {"preset": "kvquant4-key", "center": "rope", "rope": rope, "exact_tokens": 4}
    yield "v1-kvquant4-key-64-rope-half", gaussian(2, 250, 64, dtype=torch.bfloat16) + 3, options
    yield "v1-kvquant2-key-60-segments", gaussian(1, 1300, 60), {"preset": "kvquant2-key"}
    yield "v1-kvquant3-64-exact-vectors", odd, {"preset": "kvquant3", "nonfinite": "exact", "exact_tokens": 1, "center": "mean"}
    yield "v1-kvquant4-64-extremes", extreme, {"preset": "kvquant4"}
    yield "v1-kvquant2-key-64-empty", gaussian(3, 0, 64), {"preset": "kvquant2-key", "center": "mean"}
    options = {"before_rope": True, "rope": turned, "center": "mean", "keep": few, "exact_tokens": 1, "nonfinite": "exact"}
    yield "v1-int4-20-before-rope", gaussian(2, 500, 20, dtype=torch.bfloat16) + 3, {"preset": "int4", **options}
    joined = {"join_heads": True, "center": "rope", "rope": rope, "exact_tokens": 1, "exact_last": 1, "chunk_tokens": 4}
    yield "v1-pq3-24-joined", gaussian(2, 3, 7, 24) + 3, {"preset": "pq3", **joined}
    options = {"channels": [[0, 1, 5, 9], [2, 3, 4, 19]], "center": "mean", "keep": few, "chunk_tokens": 2}
    yield "v1-wu33-20-channels", gaussian(2, 500, 20) + 3, {"preset": "wu33", **options}
    options = {"join_heads": True, "block_basis": True, "rope": turned, "before_rope": True}
    yield "v1-q4_0-8-blocks", gaussian(2, 2, 7, 16, dtype=torch.bfloat16), {"preset": "q4_0", **options}
    yield "v1-quad2.5-20-basis", gaussian(2, 7, 20, dtype=torch.float32), {"preset": "quad2.5", "basis": 6, "exact_last": 1}
    yield from residual_cases(rope, odd, extreme)
    yield from run_cases(rope, turned)
    yield from shared_cases(turned)
    yield from block_cases()
    rng.bit_generator.state = state
    for preset in sketches:
        yield f"v1-{preset}-64-fp16", gaussian(2, 5, 64), {"preset": preset}
    for head_dim in (1, 20, 100, 300):
        options = {"preset": "qjl-outliers", "seed": 2**64 - 1}
        yield f"v1-qjl-outliers-{head_dim}-fp32", gaussian(2, head_dim, dtype=torch.float32), options
    options = {"preset": "qjl4-outliers", "center": "rope", "rope": rope, "exact_tokens": 4}
    yield "v1-qjl4-outliers-32-rope-half", gaussian(2, 75, 32, dtype=torch.bfloat16) + 3, options
    yield "v1-qjl-64-exact-vectors", odd, {"preset": "qjl", "nonfinite": "exact", "exact_tokens": 1, "center": "mean"}
    yield "v1-qjl-outliers-64-extremes", extreme, {"preset": "qjl-outliers"}
    yield "v1-qjl-64-empty", gaussian(3, 0, 64), {"preset": "qjl", "center": "mean"}


def run_cases(rope: Rope, turned: Rope) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Those of offsets that turn run by run; likewise. What turns of the quads above was born before there were runs."""
    rng = np.random.default_rng(2512)

    def gaussian(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)

    options: dict[str, Any] = {"center": "rope", "rope": rope, "chunk_tokens": 70}
    yield "v1-quad3-64-runs-half", gaussian(2, 75, 64) + 3, {"preset": "quad3", "exact_tokens": 4, **options}
    large = gaussian(2, 150, 20, dtype=torch.bfloat16) * 1e30 + 3e30
    options |= {"preset": "quad2.25", "rope": turned, "exact_last": 3}
    yield "v1-quad2.25-20-runs-interleaved", large, options
    options = {"preset": "quad3.5", "center": "rope", "rope": Rope(theta=1e6, dim=10), "chunk_tokens": 128}
    yield "v1-quad3.5-12-runs-fp32", (gaussian(1, 131, 12, dtype=torch.float32) - 2) * 1e-30, options
    yield "v1-quad3-16-runs-empty", gaussian(3, 0, 16), options | {"preset": "quad3", "rope": Rope()}


def residual_cases(rope: Rope, odd: torch.Tensor, extreme: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Those of residual VQ, whose numbers do not depend on the cases before."""
    rng = np.random.default_rng(2410)

    def gaussian(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)

    small, wide = {"codebooks": BOOKS}, {"codebooks": WIDE}
    yield "v1-rvq1-16-fp32", gaussian(2, 5, 16, dtype=torch.float32), {"preset": "rvq1", **small}
    yield "v1-rvq2-16-fp16", gaussian(2, 5, 16), {"preset": "rvq2", "chunk_tokens": 2, **small}
    yield "v1-rvq3-64-bf16", gaussian(2, 5, 64, dtype=torch.bfloat16), {"preset": "rvq3", **wide}
    options = {"preset": "rvq4", "center": "rope", "rope": rope, "exact_tokens": 2, "exact_last": 1, "chunk_tokens": 4, **wide}
    yield "v1-rvq4-64-rope-half", gaussian(2, 9, 64) + 3, options
    options = {"preset": "rvq4", "nonfinite": "exact", "center": "mean", **wide}
    yield "v1-rvq4-64-exact-vectors", odd, options
    yield "v1-rvq4-64-extremes", extreme, {"preset": "rvq4", **wide}
    yield "v1-rvq4-64-least", extreme[:3] / 1e3, {"preset": "rvq4", **wide}
    yield "v1-rvq2-16-keep", gaussian(2, 9, 16), {"preset": "rvq2", "keep": [[0, 4], [3, 8]], **small}
    yield "v1-rvq2-16-empty", gaussian(3, 0, 16), {"preset": "rvq2", "center": "mean", **small}


def shared_cases(rope: Rope) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Those of a stage or fields that a shared table has; likewise."""
    x = torch.from_numpy(np.random.default_rng(2410).standard_normal((3, 2, 7, 20)).astype(np.float32))
    options = {"join_heads": True, "before_rope": True, "rope": rope, "center": "mean", "exact_tokens": 1, "chunk_tokens": 4}
    yield "v1-nuq2-20-shared-basis", x.bfloat16() + 1, {"preset": "nuq2", "levels": TABLE, "basis": DIRECTIONS, **options}
    x = torch.cat([x, x.flip(-1)], -2).half()
    x[1, 1, 4, 3], x[2, 0, 0, 0] = 6e4, float("inf")
    options = {"rope": rope, "before_rope": True, "nonfinite": "exact", "exact_last": 1, "keep": [*range(10), 12, 13]}
    yield "v1-kvquant2-key-20-ranges", x, {"preset": "kvquant2-key", "levels": TABLE, "ranges": FIELDS, **options}


def block_cases() -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Those of DecoQuant; likewise."""
    x = torch.from_numpy(np.random.default_rng(2405).standard_normal((2, 2, 5, 24)).astype(np.float32))
    yield "v1-decoquant4-24-blocks", x, {"preset": "decoquant4", "join_heads": True, "block_basis": True, "chunk_tokens": 2}
    yield "v1-decoquant2-24-fp16", x[0].half(), {"preset": "decoquant2", "exact_tokens": 1}


def born() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every stream that is not there yet."""
    for name, x, options in cases():
        if not (FOLDER / f"{name}.pqs").exists():
            yield name, pqcodec.encode(x, backend="reference", **options)
    for name, data in streams():
        if not (FOLDER / f"{name}.pqs").exists():
            yield name, data


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, table in TABLES.items():
        if not (FOLDER / f"{name}.pqt").exists():
            (FOLDER / f"{name}.pqt").write_bytes(table.to_bytes())
    for name, data in born():
        (FOLDER / f"{name}.pqs").write_bytes(data)
        np.save(FOLDER / f"{name}.npy", stored(torch.as_tensor(decoded(data, "reference", TABLES))))
        print(f"{name}: {len(data)} bytes")
    HASHES.write_text("".join(f"{line}\n" for line in golden_lines(FOLDER)))


if __name__ == "__main__":
    main()
