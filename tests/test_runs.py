"""Offsets that turn run by run (SPEC 9.5): every backend's are those of the specification, and no operation on a row rounds."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, DEVICE, bits, gaussian, needs_triton, rel_mse, with_means

import pqcodec
from pqcodec import Rope, attention
from pqcodec import constants as c
from pqcodec.codec import decode_together
from pqcodec.errors import InvalidArgument
from pqcodec.options import EncodeOptions
from pqcodec.stages import centre
from pqcodec.stream.header import Header
from pqcodec.stream.source import MemorySource, source_of

TOKENS = 141
HALF, PARTLY = Rope(theta=1e4, first_position=123456), Rope(theta=1e4, dim=20)
LATE = Rope(theta=5e5, style="interleaved", first_position=2**40 + 7)
Case = tuple[int, torch.dtype, Rope, int, float, int]  # head_dim, dtype, RoPE, chunk_tokens, scale, exact_tokens
CASES: list[Case] = [
    (64, torch.bfloat16, HALF, 50, 1.0, 0),
    (80, torch.bfloat16, HALF, 200, 1e30, 3),
    (96, torch.float16, LATE, 256, 1.0, 0),
    (32, torch.float16, PARTLY, 200, 1e4, 5),
    (24, torch.float32, Rope(theta=100.0, dim=20, style="interleaved"), 50, 1e-30, 0),
    (64, torch.float32, PARTLY, 128, 1e6, 1),
    (16, torch.float32, LATE, 65, 1e-6, 70),
    (12, torch.bfloat16, HALF, 7, 3e38, 0),  # means and vectors at the end of the dtype
]


def keys(head_dim: int, dtype: torch.dtype, scale: float, rope: Rope | None = None) -> torch.Tensor:
    """Two heads of keys with a bias, which RoPE turns if it is given."""
    x = with_means(gaussian(2, TOKENS, head_dim), rope, 4.0).double() * scale
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def options_of(rope: Rope, chunk_tokens: int, exact_tokens: int = 0) -> dict[str, Any]:
    turned = {"center": "rope", "rope": rope}
    return {"preset": "quad3", "chunk_tokens": chunk_tokens, "exact_tokens": exact_tokens, **turned}


@pytest.mark.parametrize("case", CASES)
def test_backends_agree_bit_for_bit(case: Case) -> None:
    head_dim, dtype, rope, chunk, scale, exact = case
    x = keys(head_dim, dtype, scale, rope)
    for encoder in BACKENDS:
        data = pqcodec.encode(x, backend=encoder, **options_of(rope, chunk, exact))
        assert Header.from_bytes(data).runs
        wanted = pqcodec.decode(data, backend="reference")
        np.testing.assert_array_equal(bits(pqcodec.decode(data, backend="cpu")), bits(wanted))
        for first, last in ((3, 61), (exact, exact + 9), (63, 66), (70, TOKENS), (TOKENS - 3, TOKENS - 2)):
            found = pqcodec.decode(data, tokens=(first, last), backend="cpu")
            np.testing.assert_array_equal(bits(found), bits(wanted[:, first:last]))
    assert rel_mse(x, wanted) < 0.03


@needs_triton
@pytest.mark.parametrize("case", CASES[3:6])
def test_triton_agrees(case: Case) -> None:
    head_dim, dtype, rope, chunk, scale, exact = case
    x, options = keys(head_dim, dtype, scale, rope)[:1], options_of(rope, chunk, exact)
    data = pqcodec.encode(x.to(DEVICE), backend="triton", **options)
    wanted = pqcodec.decode(data, backend="reference")
    others = pqcodec.decode(pqcodec.encode(x, **options))
    assert int((wanted != others).any(-1).sum()) <= 1  # a tie
    np.testing.assert_array_equal(bits(pqcodec.decode(data, device=DEVICE, backend="triton")), bits(wanted))
    for first, last in ((3, 61), (63, 99)):
        found = pqcodec.decode(data, tokens=(first, last), device=DEVICE, backend="triton")
        np.testing.assert_array_equal(bits(found), bits(wanted[:, first:last]))


def test_a_decoder_written_from_the_specification_agrees() -> None:
    data = pqcodec.encode(keys(12, torch.float32, 1e-30)[:1], **options_of(LATE, 100, 2))
    np.testing.assert_array_equal(second_decoder.decode(data), bits(pqcodec.decode(data)))


def test_streams_whose_means_have_other_exponents_decode_together() -> None:
    data = [pqcodec.encode(keys(32, torch.float32, scale), **options_of(HALF, 100)) for scale in (1, 1e6, 1e-6, 1e30)]
    headers = [Header.from_bytes(stream) for stream in data]
    assert len({h.offset_exponent for h in headers}) == 4
    assert len({h.kind for h in headers}) == 1
    outs = [torch.zeros(2, TOKENS, 32) for _ in data]
    decode_together([MemorySource(stream) for stream in data], outs, [0] * 4, "cpu")
    for stream, out in zip(data, outs, strict=True):
        np.testing.assert_array_equal(bits(out), bits(pqcodec.decode(stream, backend="reference")))


# -- the arithmetic ----------------------------------------------------------------------------------------------
def header_of(rope: Rope, head_dim: int, **fields: Any) -> Header:
    header = EncodeOptions("quad3", center="rope", rope=rope, chunk_tokens=100, exact_tokens=3).header((1, 300, head_dim), 3)
    assert header.runs
    return replace(header, **fields)


def means_of(seed: int, head_dim: int) -> np.ndarray:
    """Finite float16 numbers of every size, and the odd ones."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 1 << 16, head_dim).astype(np.uint16)
    found[found & 0x7C00 == 0x7C00] ^= 0x0400
    odd = np.array([0x7BFF, 0xFBFF, 0, 0x8000, 1, 0x8001, 0x03FF, 0x0400, 0x7BFE, 0x3C00, 0x83FF, 0x6BFF], np.uint16)
    taken = rng.random(head_dim) < 0.5
    found[taken] = rng.choice(odd, taken.sum())
    return found.view(np.float16)


def exact_offset(h: Header, stored: np.ndarray, token: int) -> list[Fraction]:
    """Steps 1 to 4 of 9.5 in fractions, but for the products of step 1, which float32 rounds."""
    rope, row = h.rope, (token - h.first_tokens) % h.chunk_tokens
    assert rope
    halves, found = stored.astype(np.float32), [Fraction(float(x)) for x in stored]
    pairs = second_decoder.pairs_of(rope.channels, rope.pairing)
    for (p, q), frequency in zip(pairs, rope.frequencies, strict=True):
        position = rope.first_position + token - row % c.RUN_ROWS
        cos, sin = second_decoder.phase_cosines(position * frequency // 2**16 % 2**16)
        both = [halves[p] * cos - halves[q] * sin, halves[p] * sin + halves[q] * cos]
        x, y = (min(max(Fraction(float(each)), Fraction(-65504)), Fraction(65504)) for each in both)
        unit = Fraction(1, 2**24)
        while max(abs(x), abs(y)) >= 2**11 * unit:
            unit *= 2
        x, y = round(x / unit) * unit, round(y / unit) * unit
        cos, sin = second_decoder.phase_cosines(row % c.RUN_ROWS * frequency // 2**16 % 2**16)
        turn, across = (Fraction(round(Fraction(float(each)) * 2**11), 2**11) for each in (cos, sin))
        found[p], found[q] = x * turn - y * across, x * across + y * turn
    return [each * Fraction(2) ** h.offset_exponent for each in found]


@pytest.mark.parametrize("exponent", [0, -112, 111, -9])
@pytest.mark.parametrize("rope", [HALF, PARTLY, LATE], ids=["half", "partly", "interleaved"])
def test_offsets_of_any_means_are_exact(rope: Rope, exponent: int) -> None:
    h, rng = header_of(rope, 24, offset_exponent=exponent), np.random.default_rng(exponent + 200)
    for seed in range(12):
        stored = means_of(seed, 24)
        tokens = np.sort(3 + rng.choice(297, 6, replace=False))
        found = centre.offset_in_runs(h, np.ldexp(stored.astype(np.float64), exponent).astype(np.float32), tokens)
        for token, offsets in zip(tokens.tolist(), found, strict=True):
            assert [Fraction(float(x)) for x in offsets] == exact_offset(h, stored, token)


@pytest.mark.parametrize("exponent", [0, -112, 111])
def test_no_product_or_sum_of_a_row_rounds(exponent: int) -> None:
    h = header_of(HALF, 64, offset_exponent=exponent)
    assert h.rope
    p, q = centre.pairs(h.rope)
    turns = centre.turns_of_run(h.rope)
    cos, sin = (turn.astype(np.float64) for turn in turns)
    assert all((turn == turn.astype(np.float16)).all() for turn in turns)
    for seed in range(20):
        stored = np.ldexp(means_of(seed, 64).astype(np.float64), exponent).astype(np.float32)
        begun = centre.offset_of_run(h.rope, stored, exponent, 64 * seed)
        halves = np.ldexp(begun, -exponent)
        assert (halves == halves.astype(np.float16)).all()
        x, y = begun[p].astype(np.float64), begun[q].astype(np.float64)
        products = (x * cos, y * sin, x * sin, y * cos)
        for exact in (*products, products[0] - products[1], products[2] + products[3]):
            assert (exact == exact.astype(np.float32)).all()


# -- what it costs, and what was there before --------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["quad2", "quad3.5"])
def test_errors_are_those_of_means_that_turn_token_by_token(preset: str, request: pytest.FixtureRequest) -> None:
    rope = Rope(theta=1e4)
    mean = centre.offset_at(rope.field(64), 12 * gaussian(64, seed=1).numpy(), np.arange(700))
    x = gaussian(2, 700, 64) + torch.from_numpy(mean)
    options = options_of(rope, 256) | {"preset": preset}
    data = pqcodec.encode(x, **options)
    request.getfixturevalue("token_by_token")
    before = pqcodec.encode(x, **options)
    assert (Header.from_bytes(data).runs, Header.from_bytes(before).runs) == (True, False)
    assert replace(Header.from_bytes(data), runs=False) == Header.from_bytes(before)
    errors = [float(((pqcodec.decode(each) - x).double() ** 2).sum()) for each in (data, before)]
    assert abs(errors[0] / errors[1] - 1) < 0.005
    one, two = (bits(pqcodec.decode(before, backend=backend)) for backend in BACKENDS)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("way", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_attention_to_codes_turns_means_by_each_tokens_own_angle(way: str) -> None:
    """It differs from decoded keys by less than 2^-9 of what their means are."""
    x, q = keys(32, torch.float32, 1)[:, :80], gaussian(4, 1, 32, seed=2)
    data = pqcodec.encode(x, **options_of(HALF, 70, 2))
    on_device = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE if way == "triton" else "cpu")
    found = attention.scores(on_device, q.to(on_device.device), backend=way).cpu().double()
    decoded = pqcodec.decode(data, backend="reference").double().repeat_interleave(2, 0)
    wanted = q.double() @ decoded.mT / 32**0.5
    means = np.sqrt((centre.stored_means(source_of(data), Header.from_bytes(data))[0].astype(np.float64) ** 2).sum(-1)).max()
    most = 2.0**-9 * means * float(q.norm(dim=-1).max()) / 32**0.5
    assert 1e-5 < float((found - wanted).abs().max()) < most
    exactly = attention.scores(data, q, backend="reference").double()
    assert float((exactly - wanted).abs().max()) < 1e-5


def test_only_means_of_quads_that_turn_have_runs() -> None:
    h = header_of(HALF, 64)
    rope = {"center": "rope", "rope": HALF}
    others = [
        EncodeOptions("quad3", center="mean").header((1, 9, 64), 3),
        EncodeOptions("pq3", **rope).header((1, 9, 64), 3),
        EncodeOptions("quad3", keep=[0, 4], **rope).header((1, 9, 64), 3),
        EncodeOptions("quad3", join_heads=True, **rope).header((2, 9, 64), 3),
        EncodeOptions("quad3", channels=[1, 3], **rope).header((1, 9, 64), 3),
        EncodeOptions("quad3", before_rope=True, center="mean", rope=HALF).header((1, 9, 64), 3),
    ]
    for other in others:
        assert not other.runs
        with pytest.raises(InvalidArgument, match="run by run"):
            replace(other, runs=True)
    assert replace(h, runs=False).kind != h.kind
    assert Header.from_bytes(h.to_bytes()) == h
