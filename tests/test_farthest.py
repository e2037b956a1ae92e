"""Vectors that are kept exact because they lie farthest from their mean: which they are, sizes, and who refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, gaussian, needs_triton

import pqcodec
from pqcodec import InvalidArgument, NonFiniteInput, Rope
from pqcodec.formats.engines.chunks import ChunkCodec

SHAPE = (2, 3, 40, 16)
ROPE = Rope(theta=100.0, dim=12, first_position=900)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ends": {"center": "mean", "exact_tokens": 3, "exact_last": 5},
    "rope": {"center": "rope", "rope": ROPE, "exact_tokens": 2},
    "before rope": {"rope": ROPE, "before_rope": True},
    "before rope, less its mean": {"rope": ROPE, "before_rope": True, "center": "mean", "join_heads": True},
}


def kept_lists() -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.stack([np.sort(rng.permutation(40)[:25]) for _ in range(6)]).reshape(2, 3, 25)


def turned_back(x: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """Vectors [tokens, 16] before RoPE, as its definition has it."""
    assert rope.dim
    angles = positions[:, None] * rope.theta ** (-2 * np.arange(rope.dim // 2) / rope.dim)
    pairs = (x[:, : rope.dim // 2] + 1j * x[:, rope.dim // 2 : rope.dim]) * np.exp(-1j * angles)
    return np.concatenate([pairs.real, pairs.imag, x[:, rope.dim :]], 1)


def farthest(x: np.ndarray, positions: np.ndarray, n: int, options: dict[str, Any], rope: Rope | None) -> list[int]:
    """The tokens of x [tokens, 16] that are expected to be exact beside the first and last ones, from the definition."""
    first, last = options.get("exact_tokens", 0), len(x) - options.get("exact_last", 0)
    rows = x.astype(np.float64) if rope is None else turned_back(x.astype(np.float64), rope.first_position + positions, rope)
    distances = ((rows - rows[first:last].mean(0)) ** 2).sum(1)
    return sorted(sorted(range(first, last), key=lambda token: -distances[token])[:n])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep", [None, kept_lists()], ids=["all", "kept"])
def test_the_farthest_of_each_leading_index_come_back_bit_for_bit(backend: str, way: str, keep: np.ndarray | None) -> None:
    options, x = WAYS[way], gaussian(*SHAPE, seed=186, dtype=torch.float16)  # no two are about as far
    if "rope" in options:  # a bias that turns: seen as they are, other vectors are far
        bias = np.broadcast_to(4 * np.random.default_rng(3).standard_normal(16), (40, 16))
        x += torch.from_numpy(turned_back(bias, -(900.0 + np.arange(40)), ROPE)).half()
    data = pqcodec.encode(x, preset="int4", exact_vectors=4, keep=keep, backend=backend, **options)
    assert len(data) == pqcodec.encoded_size(SHAPE, preset="int4", exact_vectors=4, keep=keep, **options)
    assert pqcodec.inspect(data).exact_vectors == 6 * 4
    rows, at = (np.asarray(found) for found in pqcodec.decode_kept(data, backend=backend))
    at, rows = np.broadcast_to(at, rows.shape[:-1]).reshape(6, -1), rows.reshape(6, -1, 16)
    differ = 0
    for lead, (was, now, positions) in enumerate(zip(x.numpy().reshape(6, 40, 16), rows, at, strict=True)):
        ends = {*range(options.get("exact_tokens", 0)), *range(len(now) - options.get("exact_last", 0), len(now))}
        exactly = [token for token in np.nonzero((was[positions] == now).all(1))[0] if token not in ends]
        assert exactly == farthest(was[positions], positions, 4, options, options.get("rope")), lead
        differ += exactly != farthest(was[positions], positions, 4, options, None)
    assert (differ > 3) == ("rope" in options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equally_far_ones_few_tokens_and_numbers_that_are_not_finite(backend: str) -> None:
    x = np.zeros((2, 9, 16), np.float32)
    x[:, 3:6] = [[[1]], [[-1]]]
    x[:, 8] = [[1], [-1]]  # as far as tokens 3 to 5
    first_three = pqcodec.encode(x, exact_vectors=[(lead, token) for lead in (0, 1) for token in (3, 4, 5)], backend=backend)
    assert pqcodec.encode(x, exact_vectors=np.int64(3), backend=backend) == first_three
    assert pqcodec.encode(x, exact_vectors=0, backend=backend) == pqcodec.encode(x, backend=backend)
    for n in (9, 1 << 31):
        data = pqcodec.encode(x, exact_tokens=1, exact_vectors=n, backend=backend)
        assert len(data) == pqcodec.encoded_size(x.shape, "float32", exact_tokens=1, exact_vectors=n)
        np.testing.assert_array_equal(pqcodec.decode(data, backend=backend), x)
    for shape in ((2, 0, 16), (0, 9, 16)):
        assert pqcodec.inspect(pqcodec.encode(np.zeros(shape, np.float16), exact_vectors=2, backend=backend)).exact_vectors == 0
    x[1, 7, 2], x[0, 0, 0] = np.inf, np.nan
    with pytest.raises(NonFiniteInput, match=r"\[0, 0, 0\]"):
        pqcodec.encode(x, exact_vectors=3, backend=backend)
    pairs = [(lead, token) for lead in (0, 1) for token in (3, 4, 5)]
    exactly = pqcodec.encode(x, nonfinite="exact", exact_vectors=3, backend=backend)
    assert exactly == pqcodec.encode(x, nonfinite="exact", exact_vectors=pairs, backend=backend)
    assert pqcodec.inspect(exactly).exact_vectors == 8


@pytest.mark.parametrize("preset", ["paper", "quad3", "nuq3", "kvquant3", "wu44"])
def test_other_codings_have_the_same_vectors_and_the_size_that_was_told(preset: str) -> None:
    x = gaussian(2, 300, 64, dtype=torch.float16)
    found = [pqcodec.encode(x, preset=preset, center="mean", exact_vectors=2, backend=backend) for backend in BACKENDS]
    assert {len(data) for data in found} == {pqcodec.encoded_size((2, 300, 64), preset=preset, center="mean", exact_vectors=2)}
    exactly = [{tuple(place) for place in (pqcodec.decode(data) == x).all(-1).nonzero().tolist()} for data in found]
    assert exactly[0] == exactly[1]
    assert len(exactly[0]) == 4


def test_chunks_of_engines_keep_them_in_a_size_that_was_told() -> None:
    x = gaussian(2, 6, 50, 2 * 16).bfloat16()
    x[0, :, 31] += 4
    chunks = ChunkCodec.from_json({"head_dim": 16, "kv_heads": 2, "rope": {"theta": 100.0}, "exact_vectors": 3})
    data, y = chunks.encode(x, b"its name"), torch.empty_like(x)
    assert data.nbytes == chunks.size(x.shape, x.dtype)
    chunks.decode(data, y, b"its name")
    exactly = (x == y).view(2, 6, 50, 2, 16).all(-1)
    assert bool((exactly.sum(2) == 3 + 3).all())
    assert bool(exactly[0, :, 31].all())


@pytest.mark.parametrize("wrong", [-1, 2.5, 1 << 32, True])
def test_what_is_no_number_of_vectors_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"exact_vectors .* 0 \.\. 2\^32 - 1, or pairs"):
        pqcodec.encode(np.zeros((2, 9, 16), np.float32), exact_vectors=wrong, backend="reference")
    with pytest.raises(InvalidArgument, match="exact_vectors"):
        ChunkCodec(head_dim=16, kv_heads=2, exact_vectors=wrong)
    with pytest.raises(InvalidArgument, match="exact_vectors"):
        ChunkCodec(head_dim=16, kv_heads=2, exact_vectors=[(0, 1)])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="how many of each leading index is expected here"):
        pqcodec.encoded_size((2, 9, 16), exact_vectors=[(0, 1)])  # type: ignore[arg-type]


@needs_triton
def test_gpus_refuse_a_number_by_name() -> None:
    x = gaussian(2, 9, 16)
    with pytest.raises(InvalidArgument, match=r"exact_vectors=3: .* on the CPU only; pass x.cpu\(\), or pairs"):
        pqcodec.encode(x, exact_vectors=3, backend="triton")
    pqcodec.encode(x, exact_vectors=0, backend="triton")
