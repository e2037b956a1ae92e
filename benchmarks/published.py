"""Published settings of other systems on the fixture, beside what was known of them: ``python -m benchmarks.published``.

Means of SmolLM2's layers; bits are those of whole streams. ``ranges``: keys before RoPE, heads joined, the second half of a
text, by KVQuant's ranges and levels that its first half has, the first token left out, and by the half's own; tables, which
many streams share, are left out of bits. ``decoquant``: keys and values of all heads, a scale a token, with DecoQuant's factor
of each 16 channels and without, which is rounding to nearest. ``KNOWN_...`` is the relMSE of the systems' algorithms in plain
numpy and without a stream, ranges being those of other texts.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import pqcodec
from benchmarks import results_file
from benchmarks.neighbours import FIXTURE, KVQUANT, ROPE
from pqcodec.calibrate import rows_to_code, shared_levels, shared_ranges

HALF = 162  # tokens
KNOWN_RANGES = {"kvquant4": 0.0016, "kvquant3": 0.0061, "kvquant2": 0.0225}
KNOWN_DECOQUANT: dict[tuple[str, str], tuple[float, float | None]] = {  # with the factor, and without
    ("decoquant4", "key"): (0.0247, 0.0516),
    ("decoquant4", "value"): (0.0291, 0.0456),
    ("decoquant2", "key"): (0.498, None),
    ("decoquant2", "value"): (0.646, None),
}


def measured(x: np.ndarray, tables: Any = (), **options: Any) -> tuple[float, float]:
    """Bits a coordinate, and squared error over squared norm, of a tensor that is coded and decoded."""
    data = pqcodec.encode(x, **options)
    wrong = x.astype(np.float64) - pqcodec.decode(data, tables=tables)
    return 8 * len(data) / x.size, float((wrong**2).sum() / (x.astype(np.float64) ** 2).sum())


def range_rows(keys: list[np.ndarray]) -> list[dict[str, Any]]:
    """KVQuant's presets by ranges of the tensor's own, and of a table; the mean of layers."""
    rows = []
    for name in KVQUANT:
        preset, found = f"{name}-key", []
        for x in keys:
            seen = rows_to_code(x[:, 1:HALF], rope=replace(ROPE, first_position=1), join_heads=True)
            ranges = shared_ranges(seen, preset)
            levels = shared_levels(seen, preset, ranges=ranges)
            options = {"preset": preset, "rope": replace(ROPE, first_position=HALF), "before_rope": True, "join_heads": True}
            own = measured(x[:, HALF:], **options)
            shared = measured(x[:, HALF:], [ranges, levels], ranges=ranges, levels=levels, **options)
            found.append([*own, *shared])
        own_bits, own_error, bits, error = np.mean(found, 0).tolist()
        row = {"preset": preset, "own_bits": own_bits, "own": own_error, "shared_bits": bits, "shared": error}
        rows.append(row | {"known": KNOWN_RANGES.get(name)})
    return rows


def decoquant_rows(tensors: dict[str, list[np.ndarray]]) -> list[dict[str, Any]]:
    """DecoQuant's presets for keys and for values."""
    rows = []
    for preset, (role, given) in product(("decoquant8", "decoquant4", "decoquant2"), tensors.items()):
        options = {"preset": preset, "join_heads": True}
        bits, error = np.mean([measured(x, **options, block_basis=True) for x in given], 0).tolist()
        plain = float(np.mean([measured(x, **options)[1] for x in given]))
        known, known_plain = KNOWN_DECOQUANT.get((preset, role), (None, None))
        row = {"preset": preset, "role": role, "bits": bits, "error": error, "known": known}
        rows.append(row | {"rounded": plain, "rounded_known": known_plain})
    return rows


def main() -> None:
    tensors = load_file(FIXTURE)
    by_role = {role: [x[0] for name, x in tensors.items() if name.endswith(role)] for role in ("key", "value")}
    found = {"ranges": range_rows(by_role["key"]), "decoquant": decoquant_rows(by_role)}
    for row in (*found["ranges"], *found["decoquant"]):
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    print(f"wrote {results_file.write('published', 'python -m benchmarks.published', found)}")


if __name__ == "__main__":
    main()
