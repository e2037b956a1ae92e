"""Damaged, forged and foreign streams: each is refused by its own error, and none costs memory."""

from __future__ import annotations

import struct
import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALONE, RESTORING, TORCH_DTYPES, bits, gaussian, rel_mse
from damage import every_proper_prefix_is_truncated

import pqcodec
from pqcodec import CorruptStream, InvalidArgument, PQError, TruncatedStream, UnsupportedStream, encode
from pqcodec import constants as c
from pqcodec.codec import decode_together
from pqcodec.stream.checksum import checksum, checksums
from pqcodec.stream.header import Header
from pqcodec.stream.sections import EXACT_TOKENS, EXACT_VECTORS
from pqcodec.stream.source import MemorySource


def with_header_checksum(data: bytes) -> bytes:
    """The stream with its header's checksum made to hold again."""
    size = struct.unpack_from("<I", data, 8)[0]
    return data[: size - 4] + struct.pack("<I", checksum(data[: size - 4])) + data[size:]


def test_every_proper_prefix_is_truncated(small_stream: bytes) -> None:
    every_proper_prefix_is_truncated(small_stream, partial(pqcodec.decode, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_single_bit_flip_is_detected(small_stream: bytes, backend: str) -> None:
    """The checksums are the same in both backends; the reference checks the sides, the cpu kernel its payload."""
    start = 0 if backend == "cpu" else len(small_stream) - 40
    for bit in range(8 * start, 8 * len(small_stream)):
        damaged = bytearray(small_stream)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises((CorruptStream, UnsupportedStream)):
            pqcodec.decode(bytes(damaged), backend=backend)


def test_every_changed_byte_is_detected(small_stream: bytes) -> None:
    for place in range(len(small_stream)):
        for change in (0x01, 0x80, 0xFF, 0x55):
            damaged = bytearray(small_stream)
            damaged[place] ^= change
            with pytest.raises((CorruptStream, UnsupportedStream)):
                pqcodec.decode(bytes(damaged))


def test_verify_names_every_damaged_part(small_stream: bytes) -> None:
    h = Header.from_bytes(small_stream)
    damaged = bytearray(small_stream)
    exact = h.places[EXACT_TOKENS]
    places = (h.header_bytes, exact.start + exact.entry_bytes, h.places[EXACT_VECTORS].start, h.blocks.place(1, 0))
    for place in places:
        damaged[place] ^= 1
    found = [str(part) for part in pqcodec.verify(bytes(damaged))]
    assert found == [
        "offset, leading index 0",
        "exact tokens, leading index 1, tokens 0 .. 0",
        "payload, leading index 0, tokens 6 .. 8",
        "exact vectors",
    ]
    assert pqcodec.verify(small_stream) == []


def test_damaged_offsets_of_no_tokens_are_refused(backend: str) -> None:
    """An empty tensor has checksums, too: decode and verify agree."""
    data = bytearray(pqcodec.encode(np.ones((3, 0, 64), np.float16), center="mean", backend=backend))
    assert pqcodec.decode(bytes(data), backend=backend).shape == (3, 0, 64)
    data[-1] ^= 1
    assert [damage.part for damage in pqcodec.verify(bytes(data), backend=backend)] == ["offset"]
    for options in ({}, {"tokens": (0, 0)}):
        with pytest.raises(CorruptStream, match="offset"):
            pqcodec.decode(bytes(data), backend=backend, **options)


def test_bytes_behind_the_stream_are_refused(small_stream: bytes) -> None:
    with pytest.raises(CorruptStream, match="1 bytes behind the end"):
        pqcodec.decode(small_stream + b"\0")


def test_foreign_bytes_are_refused() -> None:
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100), bytes(100)):
        with pytest.raises(CorruptStream, match="magic"):
            pqcodec.decode(data)
    with pytest.raises(TruncatedStream):
        pqcodec.decode(b"")


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (4, b"\x02", UnsupportedStream),  # version
        (5, b"\x07", UnsupportedStream),  # coding
        (6, b"\x09", UnsupportedStream),  # dtype
        (7, b"\x00", CorruptStream),  # ndim
        (7, b"\xff", CorruptStream),
        (8, struct.pack("<I", 1 << 31), CorruptStream),  # header_bytes
        (12, b"\x00\x80", UnsupportedStream),  # flags
        (12, b"\x10\x00", UnsupportedStream),
        (12, b"\x0a\x00", CorruptStream),  # RoPE without offsets
        (14, b"\x63", CorruptStream),  # radius_bits
        (15, b"\x01", UnsupportedStream),  # linear
        (16, struct.pack("<I", 15), CorruptStream),  # row_bits
        (16, struct.pack("<I", 1 << 20), CorruptStream),
        (20, struct.pack("<I", 0), CorruptStream),  # chunk_tokens
        (20, struct.pack("<I", 1 << 30), CorruptStream),
        (28, struct.pack("<I", 1 << 31), CorruptStream),  # exceptions
        (40, struct.pack("<h", 30000), CorruptStream),  # offset_exponent
        (42, struct.pack("<h", -30000), CorruptStream),  # radius_exponent
        (44, b"\x05", UnsupportedStream),  # codebook
        (45, b"\x01", UnsupportedStream),  # states
        (48 + 16, struct.pack("<Q", 0), CorruptStream),  # head_dim
        (48 + 16, struct.pack("<Q", 1 << 40), CorruptStream),
        (48 + 8, struct.pack("<Q", 1 << 62), CorruptStream),  # tokens
        (48, struct.pack("<Q", (1 << 64) - 1), CorruptStream),  # leading
    ],
)
def test_forged_fields_with_a_good_checksum_are_refused(
    small_stream: bytes, offset: int, value: bytes, error: type[PQError]
) -> None:
    forged = small_stream[:offset] + value + small_stream[offset + len(value) :]
    if offset != 8:
        forged = with_header_checksum(forged)
    with pytest.raises(error):
        pqcodec.decode(forged)


@pytest.mark.parametrize("shape", [(1, 1 << 31, 16), (1 << 40, 9, 16), (2, 9, 1024)])
def test_forged_sizes_allocate_nothing(small_stream: bytes, shape: tuple[int, int, int]) -> None:
    forged = with_header_checksum(small_stream[:48] + struct.pack("<3Q", *shape) + small_stream[72:])
    tracemalloc.start()
    try:
        with pytest.raises(PQError):
            pqcodec.decode(forged, backend="reference")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_row_is_never_much_smaller_than_its_vector() -> None:
    """At least one bit a coordinate: a stream of n bytes decodes to 32 n bytes at the most, and their sides."""
    with pytest.raises(pqcodec.InvalidArgument, match="rows of 15 bits"):
        Header(coding=c.CODING_SPLIT, dtype=c.DTYPE_FLOAT32, shape=(4, 16), row_bits=15, radius_bits=11)


@pytest.mark.parametrize("preset", ALONE)
def test_new_streams_say_how_often_they_are_turned(preset: str) -> None:
    data = pqcodec.encode(gaussian(3, 32), preset=preset, backend="reference")
    unturned = pqcodec.PRESETS[preset].affine or pqcodec.PRESETS[preset].estimates
    rounds = 0 if unturned else 1 if preset == "paper" else 2
    assert bool(data[12] & c.FLAG_TWO_ROUNDS) == (rounds == 2)
    assert Header.from_bytes(data).rounds == pqcodec.inspect(data).rounds == rounds
    assert pqcodec.inspect(data).preset == preset


def test_the_papers_coding_has_one_round() -> None:
    data = pqcodec.encode(gaussian(3, 32), preset="paper", backend="reference")
    forged = with_header_checksum(data[:12] + bytes([data[12] | c.FLAG_TWO_ROUNDS]) + data[13:])
    with pytest.raises(CorruptStream, match="2 rounds of rotation: the paper coding has 1"):
        pqcodec.decode(forged)
    for rounds in (0, 3):
        with pytest.raises(pqcodec.InvalidArgument, match=f"{rounds} rounds"):
            Header(coding=c.CODING_SPLIT, dtype=c.DTYPE_FLOAT32, shape=(4, 16), row_bits=32, radius_bits=11, rounds=rounds)


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_streams_of_one_round_are_no_others(backend: str) -> None:
    """The flag is all that tells: a stream without it is turned once, and the same bytes with it decode to other numbers."""
    x = gaussian(2, 70, 48)
    once = pqcodec.encode(x, preset="pq5", backend=backend)
    y = pqcodec.decode(once, backend=backend)
    assert pqcodec.inspect(once).rounds == 1
    assert rel_mse(x, y) < 0.004
    twice = with_header_checksum(once[:12] + bytes([once[12] | c.FLAG_TWO_ROUNDS]) + once[13:])
    assert rel_mse(x, pqcodec.decode(twice, backend=backend)) > 0.5
    assert Header.from_bytes(once).kind != Header.from_bytes(twice).kind
    outs = [torch.zeros_like(x), torch.zeros_like(x)]
    decode_together([MemorySource(once), MemorySource(twice)], outs, [0, 0], backend)
    np.testing.assert_array_equal(bits(outs[0]), bits(y))
    np.testing.assert_array_equal(bits(outs[1]), bits(pqcodec.decode(twice, backend=backend)))


def test_headers_survive_their_bytes(small_stream: bytes) -> None:
    h = Header.from_bytes(small_stream)
    assert h.to_bytes() == small_stream[: h.header_bytes]
    assert Header.from_bytes(h.to_bytes()) == h
    assert h.stream_bytes == len(small_stream)


def test_any_payload_bits_decode_to_finite_numbers() -> None:
    """Every code of every field decodes to something: what a checksum lets through is bounded, on both backends."""
    rng = np.random.default_rng(5)
    for preset in (*RESTORING, "qjl", "qjl-outliers"):
        data = bytearray(pqcodec.encode(gaussian(2, 64, 64), preset=preset, backend="reference"))
        h = Header.from_bytes(bytes(data))
        for lead in range(2):
            start, size = h.blocks.place(0, lead), h.blocks.size(0) - 4
            noise = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
            data[start : start + size] = noise
            data[start + size : start + size + 4] = struct.pack("<I", checksum(noise))
        one, two = (pqcodec.decode(bytes(data), backend=name, estimate="shrunk") for name in ("reference", "cpu"))
        assert bool(one.isfinite().all())
        np.testing.assert_array_equal(one.numpy().view(np.uint32), two.numpy().view(np.uint32))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", [{}, {"center": "mean", "exact_tokens": 3}], ids=str)
def test_streams_decoded_together_are_those_decoded_alone(backend: str, options: dict[str, Any]) -> None:
    """Streams of several kinds and lengths, two of them into one tensor, one with an exact vector."""
    infinite = gaussian(2, 9, 20)
    infinite[1, 5, 3] = torch.inf
    tensors = [gaussian(2, 70, 32), gaussian(2, 50, 32), gaussian(2, 1, 3, 40, 64).half(), infinite, gaussian(24)]
    presets = ["pq3", "pq3", "pq5", "paper", "pq4"]
    streams = [
        encode(x, preset=preset, nonfinite="exact", chunk_tokens=16, backend="cpu", **options)
        for x, preset in zip(tensors, presets, strict=True)
    ]
    both = torch.zeros(2, 130, 32)
    outs = [both, both, *(torch.zeros_like(x) for x in tensors[2:])]
    decode_together([MemorySource(stream) for stream in streams], outs, [0, 75, 0, 0, 0], backend)
    found = [both[:, :70], both[:, 75:125], *outs[2:]]
    for x, stream in zip(found, streams, strict=True):
        torch.testing.assert_close(x, pqcodec.decode(stream, backend=backend), rtol=0, atol=0)
    assert not both[:, 70:75].any()
    assert not both[:, 125:].any()


@pytest.mark.parametrize("preset", ["quad3", "pq3", "wu44"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_of_several_lengths_turn_with_their_own_tokens(preset: str, dtype: torch.dtype) -> None:
    """Phases that were made for a short stream do not serve a longer one that begins at the same position."""
    tensors = [gaussian(1, tokens, 64, dtype=dtype) + 4 for tokens in (10, 100, 30)]
    streams = [encode(x, preset=preset, center="rope", rope=pqcodec.Rope(), backend="cpu") for x in tensors]
    outs = [torch.zeros_like(x) for x in tensors]
    decode_together([MemorySource(stream) for stream in streams], outs, [0, 0, 0], "cpu")
    for out, stream in zip(outs, streams, strict=True):
        torch.testing.assert_close(out, pqcodec.decode(stream, backend="cpu"), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_streams_go_to_parts_of_an_out(backend: str) -> None:
    x = gaussian(3, 2, 20, 16)
    streams = [MemorySource(encode(part, center="mean", exact_tokens=2, backend="cpu")) for part in (x[:1], x[1:])]
    out = torch.zeros(5, 2, 20, 16)
    decode_together(streams, [out, out], [0, 0], backend, firsts=[4, 1])
    for part, stream in ((out[4:], streams[0]), (out[1:3], streams[1])):
        torch.testing.assert_close(part, pqcodec.decode(stream.read(0, stream.size), backend=backend), rtol=0, atol=0)
    assert not out[[0, 3]].any()
    with pytest.raises(InvalidArgument, match="not in the first dimension"):
        decode_together(streams[1:], [out], [0], backend, firsts=[4])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_streams_decoded_together_refuse_damage_and_outs_they_do_not_fit(backend: str) -> None:
    data = encode(gaussian(2, 40, 16), backend="cpu")
    broken = bytearray(data)
    broken[-5] ^= 1
    out = np.zeros((2, 80, 16), np.float32)
    with pytest.raises(CorruptStream, match="checksum does not hold: payload, leading index 1"):
        decode_together([MemorySource(data), MemorySource(broken)], [out, out], [0, 40], backend)
    for wrong, start in ((out, 41), (np.zeros((3, 80, 16), np.float32), 0), (out.astype(np.float16), 0)):
        with pytest.raises(InvalidArgument, match="does not go to token"):
            decode_together([MemorySource(data)], [wrong], [start], backend)
    halves = encode(gaussian(2, 40, 16).half(), backend="cpu")
    with pytest.raises(InvalidArgument, match="does not go to token"):
        decode_together([MemorySource(halves)], [torch.zeros(2, 40, 16, dtype=torch.bfloat16)], [0], backend)
    with pytest.raises(InvalidArgument, match="last dimension must be contiguous"):
        decode_together([MemorySource(data)], [np.zeros((2, 16, 40), np.float32).swapaxes(1, 2)], [0], backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_an_out_may_be_tensors_that_lie_apart(backend: str, dtype: torch.dtype) -> None:
    x = gaussian(5, 2, 40, 64, dtype=dtype)
    data = encode(x, center="mean", exact_tokens=2, backend="cpu")
    rooms = [torch.zeros(n, 2, 50, 64, dtype=dtype) for n in (2, 9, 1, 2)]
    outs = [rooms[2], rooms[0], rooms[3]]  # neither in the order of their addresses, nor all that lies between them
    decode_together([MemorySource(data)], [outs], [7], backend)
    expected = pqcodec.decode(data, backend=backend)
    np.testing.assert_array_equal(bits(torch.cat(outs)[:, :, 7:47]), bits(expected))
    assert not any(out[:, :, :7].any() or out[:, :, 47:].any() for out in outs)
    assert not rooms[1].any()
    narrow = torch.zeros(3, 2, 50, 65, dtype=dtype)[..., :64]
    for wrong, message in (
        (outs[:2], "does not go to token 7"),
        ([rooms[2], rooms[0].view(2, 2, 64, 50), rooms[3]], "tensors of one kind"),
        ([rooms[0], narrow], "pass tensors of one kind"),
        ([], "tensors of one kind"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            decode_together([MemorySource(data)], [wrong], [7], backend)


@pytest.mark.parametrize("size", [0, 1, 4, 190, 192, 193, 800])
def test_a_checksum_is_of_bytes_whatever_holds_them(size: int) -> None:
    """Short ones are reckoned by Python's integers, long ones by numpy, and tables of them at once."""
    data = bytes(range(1, 201))[:size] * (5 if size > 200 else 1)
    found = checksum(data)
    assert found == int(checksums(np.frombuffer(data, np.uint8)[None])[0])
    assert found == checksum(bytearray(data)) == checksum(memoryview(data))
    if len(data) % 4 == 0:
        assert found == checksum(np.frombuffer(data, np.float32))
