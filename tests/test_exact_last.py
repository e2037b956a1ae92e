"""Exact last tokens beside exact first ones: bits, ranges, sizes, attention, damage, and who refuses them."""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, TORCH_DTYPES, bits, gaussian, needs_triton, rel_mse, sampled
from damage import every_flipped_bit_is_found, every_proper_prefix_is_truncated

import pqcodec
from pqcodec import BackendUnavailable, CorruptStream, InvalidArgument, Rope
from pqcodec.attention import attend, scores
from pqcodec.codec import decode_together
from pqcodec.stream.header import Header
from pqcodec.stream.sections import EXACT_LAST
from pqcodec.stream.source import MemorySource

ROPE = Rope(theta=1e4, first_position=1000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sampled(TORCH_DTYPES))
@pytest.mark.parametrize("preset", ["pq3", "paper", "quad3", "wu44", "int4"])
def test_both_ends_come_back_bit_for_bit(backend: str, dtype: torch.dtype, preset: str) -> None:
    x = gaussian(2, 3, 150, 64, dtype=dtype) + 2
    x[1, 2, 149, 5], x[0, 0, 148, 0] = float("nan"), float("-inf")  # exact tokens may hold anything
    options: dict[str, Any] = {"preset": preset, "center": "rope", "rope": ROPE, "exact_tokens": 4, "exact_last": 30}
    data = pqcodec.encode(x, backend=backend, **options)
    whole = pqcodec.decode(data, backend=backend)
    for part in (slice(0, 4), slice(120, 150)):
        np.testing.assert_array_equal(bits(whole[..., part, :]), bits(x[..., part, :]))
    assert 0 < rel_mse(x[..., 4:120, :], whole[..., 4:120, :]) < 0.05
    np.testing.assert_array_equal(second_decoder.decode(data), bits(whole).reshape(x.shape))
    assert len(data) == pqcodec.encoded_size(tuple(x.shape), str(x.dtype).removeprefix("torch."), **options)
    info = pqcodec.inspect(data)
    assert (info.exact_tokens, info.exact_last) == (4, 30)
    assert info.side_bytes == 6 * (2 * 64 + 4) + 6 * (34 * 64 * x.element_size() + 8)
    assert pqcodec.verify(data, backend=backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_coded_tokens_are_those_of_a_stream_without_the_ends(backend: str) -> None:
    x = gaussian(2, 100, 64)
    ends = pqcodec.decode(pqcodec.encode(x, exact_tokens=3, exact_last=17, backend=backend), backend=backend)
    middle = pqcodec.decode(pqcodec.encode(x[:, 3:83], backend=backend), backend=backend)
    np.testing.assert_array_equal(bits(ends[:, 3:83]), bits(middle))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_range_is_that_of_the_whole(backend: str) -> None:
    x = gaussian(2, 90, 32)
    data = pqcodec.encode(x, center="mean", exact_tokens=5, exact_last=21, chunk_tokens=16, backend=backend)
    whole = pqcodec.decode(data, backend=backend)
    for first in (0, 4, 5, 20, 63, 64, 68, 69, 70, 89, 90):
        for last in (first, 5, 6, 64, 69, 70, 90):
            if first <= last:
                part = pqcodec.decode(data, tokens=(first, last), leading=(1, 2), backend=backend)
                np.testing.assert_array_equal(bits(part), bits(whole[1:, first:last]))
    out = torch.zeros(2, 190, 32)
    decode_together([MemorySource(data)], [out], [70], backend)
    np.testing.assert_array_equal(bits(out[:, 70:160]), bits(whole))
    assert not out[:, :70].any()
    assert not out[:, 160:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("first", "last"), [(0, 3), (0, 65535), (2, 1), (2, 9), (9, 9)])
def test_short_tensors_may_be_exact_throughout(backend: str, first: int, last: int) -> None:
    x = gaussian(2, 3, 16)
    data = pqcodec.encode(x, exact_tokens=first, exact_last=last, backend=backend)
    np.testing.assert_array_equal(bits(pqcodec.decode(data, backend=backend)), bits(x))
    h = Header.from_bytes(data)
    assert (h.first_tokens + h.last_tokens, h.coded_tokens, h.exact_last) == (3, 0, last)


def test_a_stream_without_them_has_the_bytes_it_had() -> None:
    x = gaussian(2, 9, 16)
    assert pqcodec.encode(x, backend="cpu") == pqcodec.encode(x, exact_last=0, backend="cpu")
    assert pqcodec.encode(x, exact_last=3, backend="cpu")[46:48] == b"\3\0"


def test_other_numbers_are_refused() -> None:
    for wrong in (-1, 65536, 2.0, True, "1"):
        with pytest.raises(InvalidArgument, match="exact_last"):
            pqcodec.encode(gaussian(2, 9, 16), exact_last=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_that_to_decoded_tokens(backend: str) -> None:
    """Keys and values whose exact ends are of other lengths, and queries of which some see nothing of the last ones."""
    keys, values, q = gaussian(1, 2, 150, 64), gaussian(1, 2, 150, 64, seed=1), gaussian(1, 4, 40, 64, seed=2)
    k = pqcodec.encode(keys, preset="quad3", center="rope", rope=ROPE, exact_tokens=4, exact_last=20, backend=backend)
    v = pqcodec.encode(values, preset="pq3", exact_tokens=9, exact_last=33, backend=backend)
    one, two = (pqcodec.decode(x, backend=backend).double()[0].repeat_interleave(2, 0) for x in (k, v))
    expected = q[0].double() @ one.mT / 8
    torch.testing.assert_close(scores(k, q, backend=backend)[0].double(), expected, rtol=1e-4, atol=1e-5)
    part = scores(k, q, tokens=(100, 140), backend=backend)[0].double()
    torch.testing.assert_close(part, expected[..., 100:140], rtol=1e-4, atol=1e-5)
    for window in (None, 25):
        mask = torch.ones(40, 150).tril(110)
        mask = mask if window is None else mask.triu(111 - window)
        weights = expected.masked_fill(mask == 0, -torch.inf).softmax(-1)
        found = attend(q, k, v, window=window, backend=backend)[0].double()
        torch.testing.assert_close(found, weights @ two, rtol=1e-4, atol=1e-5)


def test_vectors_that_are_exact_already_are_not_listed() -> None:
    x = gaussian(2, 9, 16)
    data = pqcodec.encode(x, exact_tokens=1, exact_last=2, exact_vectors=[(0, 0), (1, 6), (0, 7), (1, 8)], backend="reference")
    assert pqcodec.inspect(data).exact_vectors == 1
    np.testing.assert_array_equal(bits(pqcodec.decode(data)[1, 6]), bits(x[1, 6]))


# -- damage --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stream() -> bytes:
    """A stream with every section, of two blocks a leading index."""
    x = gaussian(2, 9, 16, seed=3)
    x[1, 5, 2] = float("nan")
    options: dict[str, Any] = {"center": "rope", "rope": Rope(theta=100.0, dim=8), "nonfinite": "exact", "chunk_tokens": 4}
    return pqcodec.encode(x, preset="pq2", exact_tokens=1, exact_last=2, backend="reference", **options)


def test_every_proper_prefix_is_truncated(stream: bytes) -> None:
    every_proper_prefix_is_truncated(stream, partial(pqcodec.decode, backend="cpu"))


def test_every_flipped_bit_is_found(stream: bytes) -> None:
    every_flipped_bit_is_found(stream, partial(pqcodec.decode, backend="cpu"))


def test_damage_is_named_and_touches_no_other_tokens(stream: bytes) -> None:
    place = Header.from_bytes(stream).places[EXACT_LAST]
    damaged = bytearray(stream)
    damaged[place.start + place.entry_bytes] ^= 1
    assert [str(one) for one in pqcodec.verify(bytes(damaged))] == ["exact last tokens, leading index 1, tokens 7 .. 8"]
    with pytest.raises(CorruptStream, match=r"exact last tokens, leading index 1, tokens 7 \.\. 8"):
        pqcodec.decode(bytes(damaged))
    part = pqcodec.decode(bytes(damaged), tokens=(0, 7))
    np.testing.assert_array_equal(bits(part), bits(pqcodec.decode(stream)[:, :7]))


def test_the_field_is_no_longer_reserved(stream: bytes) -> None:
    assert struct.unpack_from("<H", stream, 46) == (2,)
    assert second_decoder.refusal(stream) == ""


# -- who refuses them ----------------------------------------------------------------------------------------------
@needs_triton
def test_backends_of_gpus_refuse_them_by_name(stream: bytes) -> None:
    x = gaussian(2, 9, 16)
    for work in (
        lambda: pqcodec.encode(x, exact_last=2, backend="triton"),
        lambda: pqcodec.decode(stream, backend="triton"),
        lambda: pqcodec.verify(stream, backend="triton"),
    ):
        with pytest.raises(BackendUnavailable, match="with exact last tokens"):
            work()
