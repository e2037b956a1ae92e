"""Pair polar and scalar coding on a GPU: the CPU's bits out of every stream, and the CPU's bytes of every tensor.

Without a GPU the kernels run in Triton's interpreter, on a few small shapes; with one ``pytest -n 8 tests/test_affine_gpu.py``
compiles some two hundred of them, of every preset.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, GPU, TORCH_DTYPES, bits, gaussian, needs_triton

import pqcodec
from pqcodec import BackendUnavailable, NonFiniteInput, Rope
from pqcodec.codings.presets import PRESETS
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header

pytestmark = needs_triton
SHARING = [name for name, preset in PRESETS.items() if preset.affine]
SPARSE = [name for name in SHARING if PRESETS[name].sparse]  # whose outliers a GPU decodes, and does not find
SOME = ["wu44", "wu33", "kivi2-key", "int4", "q4_0", "nuq3-key", "kvquant4", "kvquant2-key"]
TOKENS = 300 if GPU else 20


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(bits(found), bits(wanted))


def agrees(x: torch.Tensor, preset: str, **options: Any) -> None:
    """Assert that Triton's kernels decode the CPU's stream to the same bits, and write the same bytes."""
    data = pqcodec.encode(x, preset=preset, backend="cpu", **options)
    same(pqcodec.decode(data, device=DEVICE, backend="triton").cpu(), pqcodec.decode(data, backend="cpu"))
    if preset not in SPARSE and not (PRESETS[preset].by_levels and "center" in options):
        assert pqcodec.encode(x.to(DEVICE), preset=preset, backend="triton", **options) == data


def cases() -> Iterator[tuple[str, int]]:
    """(preset, head_dim): on a GPU every preset with two of these, and some with all."""
    for preset in SHARING if GPU else SOME:
        yield from ((preset, head_dim) for head_dim in ((20, 128) if GPU else (20,)))
    for preset in ("wu44", "int4", "nuq3-key") if GPU else ():
        yield from ((preset, head_dim) for head_dim in (1, 7, 16, 64, 80, 256, 576, 1024))


@pytest.mark.parametrize(("preset", "head_dim"), cases())
def test_every_preset_gives_the_cpus_bits(preset: str, head_dim: int) -> None:
    dtype = TORCH_DTYPES[(SHARING.index(preset) + head_dim) % 3]
    agrees(gaussian(2 if GPU else 1, TOKENS, head_dim, seed=head_dim, dtype=dtype) + 1, preset)


@pytest.mark.parametrize("preset", SOME if GPU else ["wu35", "nuq4", "kvquant3"])
@pytest.mark.parametrize(
    "options",
    [
        {"center": "mean", "exact_tokens": 2},
        {"center": "rope", "rope": Rope(theta=1e4, dim=12, first_position=2**40 + 1), "exact_tokens": 1},
        {"effort": "best", "chunk_tokens": 1},
    ]
    if GPU
    else [{"center": "rope", "rope": Rope(theta=1e4, dim=12, style="interleaved"), "exact_tokens": 3, "effort": "best"}],
    ids=str,
)
def test_options_give_the_cpus_bits(preset: str, options: dict[str, Any]) -> None:
    x = gaussian(2, TOKENS, 21) * 1e6
    x[0, 5, 1], x[1, TOKENS - 1] = float("nan"), float("inf")
    agrees(x, preset, nonfinite="exact", **options)


@pytest.mark.parametrize("preset", SOME if GPU else ["wu24", "nuq2", "kvquant2-key"])
def test_any_bytes_of_a_block_decode_alike(preset: str) -> None:
    """Fields and outliers that no encoder writes: NaN, infinities, places in no order, counts beyond the room."""
    rng = np.random.default_rng(5)
    data = bytearray(pqcodec.encode(gaussian(1, TOKENS, 24), preset=preset, backend="cpu"))
    blocks = Header.from_bytes(bytes(data)).blocks
    start, size = blocks.place(0, 0), blocks.size(0) - 4
    for odd in (False, True):
        noise = rng.integers(0, 256, size, dtype=np.uint8)
        noise[: size // 2 if odd else 0] &= 3  # small counts, wherever they stand
        data[start : start + size + 4] = noise.tobytes() + struct.pack("<I", checksum(noise.tobytes()))
        same(pqcodec.decode(bytes(data), device=DEVICE, backend="triton").cpu(), pqcodec.decode(bytes(data), backend="cpu"))


def test_extreme_rows_share_a_group() -> None:
    x = gaussian(70, 16) * torch.logspace(-30, 30, 70)[:, None]
    for preset in ("wu44", "int4"):
        agrees(x, preset)
    agrees(torch.zeros(3, 16), "wu33")


def test_what_a_gpu_does_not_encode_is_refused() -> None:
    x = gaussian(2, 5, 16).to(DEVICE)
    with pytest.raises(BackendUnavailable, match=r"kept apart .presets of kvquant., and does not find them: encode x.cpu"):
        pqcodec.encode(x, preset="kvquant4", backend="triton")
    with pytest.raises(BackendUnavailable, match=r"levels are not fitted on a GPU .* pass levels="):
        pqcodec.encode(x, preset="nuq2", center="mean", backend="triton")
    given = pqcodec.encode(x, preset="nuq2", center="mean", levels=[-1, -0.25, 0.25, 1], backend="triton")
    assert given == pqcodec.encode(x.cpu(), preset="nuq2", center="mean", levels=[-1, -0.25, 0.25, 1], backend="cpu")
    x[1, 4, 3] = float("inf")
    with pytest.raises(NonFiniteInput, match=r"element \[1, 4, 3\] of the tensor is inf"):
        pqcodec.encode(x, preset="int2", backend="triton")
