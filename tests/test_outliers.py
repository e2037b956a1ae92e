"""Single numbers that blocks of scalar coding keep apart (SPEC 16.4), and the presets of KVQuant, held to its own figures."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, bits, gaussian, rel_mse, sampled

import pqcodec
from pqcodec import InvalidArgument, TruncatedStream
from pqcodec import constants as c
from pqcodec.attention import scores
from pqcodec.codings.declared import Affine
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header

SPARSE = [name for name, preset in pqcodec.PRESETS.items() if preset.sparse]
# of KVQuant's algorithm with 1 % of exceptions, in plain numpy, on Gaussian keys 4 x 2,048 x 128: relMSE
SPARSE_KEYS = {"kvquant4-key": 0.0068, "kvquant3-key": 0.0263, "kvquant2-key": 0.0966}


def outliers_of(data: bytes) -> int:
    """For how many there is room at each end of a whole group."""
    affine = Header.from_bytes(data).affine
    assert affine
    return affine.outliers


# -- figures -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", SPARSE_KEYS)
def test_gaussian_keys_have_the_errors_that_are_known(preset: str) -> None:
    x = gaussian(4, 2048, 128)
    data = pqcodec.encode(x, preset=preset, backend="cpu")
    assert rel_mse(x, pqcodec.decode(data, backend="cpu")) == pytest.approx(SPARSE_KEYS[preset], rel=0.05)
    bits_of_levels = int(preset[7])
    assert Header.from_bytes(data).bits_per_coordinate == bits_of_levels + (32 + 20 * 32) / 2048
    assert len(data) == pqcodec.encoded_size(x.shape, "float32", preset=preset)
    assert pqcodec.inspect(data).preset == preset


def test_outliers_are_kept_to_float16() -> None:
    """Strong ones, each far from all others, cost no other number its precision."""
    x = gaussian(2, 2048, 8)
    strong = x.clone()
    strong[:, 100::256] *= 500  # eight tokens of each channel
    errors = [
        rel_mse(x, pqcodec.decode(pqcodec.encode(one, preset="kvquant4-key", backend="cpu"), backend="cpu")) for one in (x,)
    ]
    y = pqcodec.decode(pqcodec.encode(strong, preset="kvquant4-key", backend="cpu"), backend="cpu")
    far = strong.abs() > 10
    assert torch.allclose(strong[far], y[far], rtol=2**-11)
    assert rel_mse(strong[~far], y[~far]) < 1.3 * errors[0]


# -- encoders ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", SPARSE)
@pytest.mark.parametrize(("tokens", "head_dim"), sampled([(450, 1), (450, 2), (2500, 7), (450, 128), (90, 1024), (450, 50)]))
def test_both_encoders_write_the_same_bytes(preset: str, tokens: int, head_dim: int) -> None:
    x = gaussian(2, tokens, head_dim) ** 3
    x[:, :, head_dim // 3] = 0
    x[0, 5:200] = 1.5  # ties at the ends
    x[1, 3, 0], x[1, 77] = float("nan"), float("inf")
    one, two = (pqcodec.encode(x, preset=preset, nonfinite="exact", backend=name) for name in BACKENDS)
    assert one == two
    decoded = [bits(pqcodec.decode(one, backend=name)) for name in BACKENDS]
    np.testing.assert_array_equal(*decoded)
    np.testing.assert_array_equal(decoded[0], second_decoder.decode(one))


@pytest.mark.parametrize(("head_dim", "wanted"), [(1, 0), (2, 1), (64, 1), (128, 1), (300, 2), (1024, 5)])
def test_values_have_one_outlier_at_each_end_at_least(head_dim: int, wanted: int) -> None:
    data = pqcodec.encode(gaussian(3, head_dim), preset="kvquant4", backend="cpu")
    assert outliers_of(data) == wanted
    assert pqcodec.inspect(data).preset == ("kvquant4" if wanted else "nuq4")


@pytest.mark.parametrize("tokens", [1, 100, 204, 205, 2047, 2049])
def test_a_short_group_has_as_many_as_its_share(tokens: int) -> None:
    """10 of 2,048 tokens at each end, so none of 204 and one of 205."""
    x = gaussian(1, tokens, 16)
    data = pqcodec.encode(x, preset="kvquant3-key", backend="cpu")
    assert len(data) == pqcodec.encoded_size(x.shape, "float32", preset="kvquant3-key")
    y = pqcodec.decode(data, backend="cpu")
    exact = int((x.half().float() == y).sum())
    room = 2 * 16 * sum(n * 10 // 2048 for n in (min(tokens, 2048), max(tokens - 2048, 0)))
    assert room <= exact <= room + tokens * 16 // 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_are_slices_of_the_whole(backend: str) -> None:
    x = gaussian(2, 1300, 60, dtype=torch.float16) ** 3  # two segments a block
    data = pqcodec.encode(x, preset="kvquant2-key", center="mean", exact_tokens=2, backend="cpu")
    whole = pqcodec.decode(data, backend=backend)
    for first, last in ((0, 1300), (0, 3), (700, 741), (1090, 1095), (1299, 1300), (60, 60)):
        part = pqcodec.decode(data, tokens=(first, last), leading=(1, 2), backend=backend)
        np.testing.assert_array_equal(bits(part), bits(whole[1:, first:last]))
    q = gaussian(2, 3, 60, seed=1)
    expected = q.double() @ whole.double().mT / 60**0.5
    torch.testing.assert_close(scores(data, q, backend=backend).double(), expected, rtol=1e-3, atol=2e-2)


# -- streams that no encoder writes --------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_records_of_any_bits_decode_as_the_specification_says(seed: int) -> None:
    """Counts beyond the room, places out of order and beyond the last row, of two segments."""
    rng = np.random.default_rng(seed)
    affine = Affine(70, 64, c.AFFINE_SCALE_ZERO, outliers=30)
    h = Header(c.CODING_SCALAR, 3, (1, 70, 950), 960, 0, chunk_tokens=70, rounds=0, affine=affine)
    body = bytearray(rng.bytes(h.blocks.size(0) - 4))
    room = 2 * 15 * 30
    at = len(body) - 2 - 4 * room - 8
    counts = [(room // 2, room // 2), (room, room), (0, 7), (2**32 - 1, 2**32 - 1), (room // 3, room), (0, 0)][seed]
    struct.pack_into("<2I", body, at, *counts)
    places = (
        np.sort(rng.integers(0, 3000, (room // 30, 30)), 1).ravel() if seed % 2 else np.sort(rng.integers(0, 1 << 16, room))
    )
    body[at + 8 : at + 8 + 2 * room] = places.astype("<u2").tobytes()
    data = h.to_bytes() + bytes(body) + checksum(bytes(body)).to_bytes(4, "little")
    told = second_decoder.decode(data)
    for backend in BACKENDS:
        np.testing.assert_array_equal(bits(pqcodec.decode(data, backend=backend)), told)
        part = pqcodec.decode(data, tokens=(33, 69), backend=backend)
        np.testing.assert_array_equal(bits(part), told[:, 33:69])


# -- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("affine", "said"),
    [
        (Affine(4, 2, 2, outliers=5), "5 outliers at each end of 4 x 2 numbers are not possible"),
        (Affine(4, 2, 2, outliers=-1), "-1 outliers at each end"),
        (Affine(1, 1024, 2, outliers=9), "9 outliers at each end of groups of a row of 16 numbers"),
    ],
)
def test_more_outliers_than_a_group_has_numbers_are_refused(affine: Affine, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Header(c.CODING_SCALAR, 3, (4, 16), 64, 0, chunk_tokens=4, rounds=0, affine=affine)


def test_pair_polar_keeps_none() -> None:
    affine = Affine(128, 2, c.AFFINE_POLAR, c.ROPE_HALF, 4, outliers=1)
    with pytest.raises(InvalidArgument, match="pair polar keeps no outliers"):
        Header(c.CODING_PAIRS, 3, (4, 16), 64, 4, chunk_tokens=128, rounds=0, affine=affine)


def test_room_that_a_stream_has_not_is_never_allocated() -> None:
    """The header may ask for as many as it likes: the stream's size tells first."""
    data: Any = bytearray(pqcodec.encode(gaussian(1, 10, 1024), preset="kvquant2-key", backend="cpu"))
    h = Header.from_bytes(bytes(data))
    at = 48 + 8 * len(h.shape) + 12
    struct.pack_into("<H", data, at, 1024)
    data[h.header_bytes - 4 : h.header_bytes] = struct.pack("<I", checksum(bytes(data[: h.header_bytes - 4])))
    with pytest.raises(TruncatedStream, match="bytes announced"):
        pqcodec.decode(bytes(data), backend="cpu")
