"""CUDA kernels of quads without a GPU: PTX as C++ decodes to the reference's bits, and encodes as well as the CPU backend.

The ordinary run takes ``SOME`` kinds; with PQCODEC_ALL_SHAPES=1 it takes every kind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GPU, bits, gaussian, needs_triton, skewed, with_means
from ptx_machine import is_there

import pqcodec
from pqcodec import DecodeBatch, EncodeBatch, Rope, backends
from pqcodec.codings.look_ups import rotation_matrix
from pqcodec.errors import CorruptStream, NonFiniteInput
from pqcodec.stream import sections
from pqcodec.stream.header import Header

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
from cuda_on_cpu import CAPABILITIES, CudaOnCpu  # which needs them

from pqcodec.kernels.on_cuda import backend, quads, token_sums
from pqcodec.kernels.on_cuda.tables import in_halves

pytestmark = [
    needs_triton,
    pytest.mark.skipif(GPU, reason="the kernels of a GPU are not mixed with a CPU's"),
    pytest.mark.skipif(not is_there(), reason="no compiler (g++) of C++20 with numbers of 16 bits is here"),
]
ALL = os.environ.get("PQCODEC_ALL_SHAPES") == "1"
NOT_ALWAYS = pytest.mark.skipif(not ALL, reason="takes minutes; PQCODEC_ALL_SHAPES=1 runs it")
KEYS: dict[str, Any] = {"center": "rope", "rope": Rope(), "exact_tokens": 4}
Kind = tuple[int, str, str, dict[str, Any]]  # head_dim, preset, dtype, and options of ``encode``
SOME: list[Kind] = [
    (128, "quad3", "bfloat16", {}),
    (128, "quad3", "bfloat16", KEYS),
    (96, "quad3", "bfloat16", {"center": "rope", "rope": Rope(style="interleaved", dim=80)}),
]
MORE: list[Kind] = [
    *((head_dim, preset, "bfloat16", {}) for head_dim in (32, 64, 96, 160, 192, 224, 256) for preset in ("quad2", "quad3.5")),
    *((head_dim, "quad2.5", "bfloat16", {}) for head_dim in (128, 320, 384, 448, 512, 576)),
    *((576, "quad3", dtype, {}) for dtype in ("bfloat16", "float16", "float32")),
    (512, "quad3.5", "float16", {"chunk_tokens": 50}),
    *((head_dim, "quad3", "bfloat16", KEYS) for head_dim in (320, 576)),
    (448, "quad3", "float32", {"center": "rope", "rope": Rope(style="interleaved", dim=20)}),
    *((320, "quad3.5", "bfloat16", {"center": "rope", "rope": Rope(dim=dim)}) for dim in (32, 80, 128)),
    *((head_dim, "quad3", "float32", {}) for head_dim in (64, 128, 256)),
    *((128, "quad3", "bfloat16", {"chunk_tokens": tokens}) for tokens in (16, 50, 60, 128, 200)),
    *((head_dim, "quad3", "bfloat16", KEYS) for head_dim in (64, 96, 256)),
    *((128, "quad3", "bfloat16", {"center": "rope", "rope": Rope(style=style, dim=dim)}) for style, dim in
      (("interleaved", None), ("interleaved", 20), ("half", 80), ("half", 64))),
    *((128, preset, "bfloat16", KEYS | {"chunk_tokens": tokens}) for preset, tokens in (("quad2.5", 50), ("quad2", 200))),
    *((128, "quad3.5", "bfloat16", options) for options in ({}, KEYS)),
    (64, "quad3", "float16", KEYS | {"chunk_tokens": 128}),
    *((head_dim, "quad3", "bfloat16", KEYS) for head_dim in (192, 512)),
    (128, "quad3", "float32", KEYS),
    (128, "quad3", "float16", {"center": "mean"}),
]  # fmt: skip
LARGE: list[Kind] = [  # that a multiprocessor has no room for: decoded by two or three thread blocks, together
    *((576, preset, "bfloat16", {}) for preset in ("quad2", "quad3", "quad3.5")),
    (288, "quad3", "bfloat16", {}),
    (384, "quad2", "bfloat16", {}),
    (448, "quad3", "float16", {"chunk_tokens": 128}),
    (512, "quad3.5", "bfloat16", {}),
    (576, "quad2.5", "float32", {}),
]
OLDER: list[Kind] = [
    *SOME,
    (64, "quad2.5", "float16", {}),
    (320, "quad2.5", "bfloat16", {}),
    (320, "quad3", "float16", {}),
    (128, "pq3", "bfloat16", {}),
    (64, "pq2", "float16", KEYS),
]
ROOMY: list[Kind] = [(128, "pq3", "bfloat16", {"center": "mean"})]  # whose encoder has no room on 8.9 and 12.0
OLDER_GPUS = [(each, kind) for each in CAPABILITIES if each[0] != 9 for kind in OLDER + ROOMY * (each == (8, 0))]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaOnCpu:
    found = CudaOnCpu(tmp_path)
    monkeypatch.setitem(backends.BACKENDS, "cuda", lambda: found)
    return found


def tensor(kind: Kind, tokens: int = 200, leads: int = 3) -> torch.Tensor:
    """Rows of many sizes: with zeros and, where no mean takes them in, with very small and very large ones."""
    head_dim, _, dtype, options = kind
    x = gaussian(leads, tokens, head_dim, seed=head_dim) * torch.exp(gaussian(leads, tokens, 1, seed=1))
    if "center" in options:
        x = with_means(x, options.get("rope"))
    elif tokens > 9:
        x[0, 3] = 0
        x[1, 5] *= 1e-20
        x[1, 6] *= 1e3 if dtype == "float16" else 1e15
    return x.to(getattr(torch, dtype))


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """The mean of each row's squared error over its square; of rows that are not zero."""
    square, error = x.double().square().sum(-1), (x.double() - y.double()).square().sum(-1)
    return float((error[square > 0] / square[square > 0]).mean())


def encoded(machine: CudaOnCpu, x: torch.Tensor, preset: str, **options: Any) -> bytes:
    batch = EncodeBatch([x], preset=preset, backend="cuda", **options)
    machine.memory = [x, *batch.streams]
    (stream,) = batch.run()
    batch.check()
    return bytes(stream.numpy())


def decoded(machine: CudaOnCpu, data: bytes, skew: int = 12, **options: Any) -> torch.Tensor:
    stream = skewed(data, skew)
    batch = DecodeBatch([stream], backend="cuda", **options)
    machine.memory = [stream, *batch.outs]
    (found,) = batch.run()
    batch.check()
    return found


@pytest.mark.parametrize("kind", SOME + (MORE + LARGE) * ALL, ids=str)
def test_rows_are_decoded_to_the_bits_of_the_specification(machine: CudaOnCpu, kind: Kind) -> None:
    _, preset, _, options = kind
    many = pqcodec.encode(tensor(kind, tokens=700), preset=preset, backend="cpu", **options)  # several blocks for each warp
    machine.processors = 1
    np.testing.assert_array_equal(bits(decoded(machine, many)), bits(pqcodec.decode(many, backend="cpu")))
    data = pqcodec.encode(tensor(kind), preset=preset, backend="cpu", **options)
    machine.processors, machine.seed = 2, 1
    part = pqcodec.decode(data, backend="cpu", tokens=(37, 150))
    np.testing.assert_array_equal(bits(decoded(machine, data, 4, tokens=(37, 150))), bits(part))
    assert machine.launches == 2
    for place in (len(data) // 3, len(data) // 2, len(data) - 5):  # behind the header and the sides
        damaged = bytearray(data)
        damaged[place] ^= 16
        with pytest.raises(CorruptStream):
            decoded(machine, bytes(damaged))


WRAPPING: dict[str, Any] = {"center": "rope", "rope": Rope(style="interleaved", first_position=2**32 - 60), "exact_tokens": 2}
# Kinds behind the most tokens of a mean, and the leading indices of a stream: another one of its batch has twice as many.
SUMMED: list[tuple[int, int, Kind]] = [
    (1024, 4, (128, "quad3", "bfloat16", KEYS)),
    (40, 3, (64, "pq2", "float16", WRAPPING)),
    (6, 6, (96, "quad3", "bfloat16", KEYS)),
    (1024, 2, (128, "quad3", "float32", {"center": "rope", "rope": Rope(style="interleaved", dim=80)})),
    (300, 4, (576, "quad3", "bfloat16", {"center": "rope", "rope": Rope(dim=64)})),
    (300, 3, (256, "quad3", "float16", {"center": "mean"})),
]


@pytest.mark.parametrize(("most", "leads", "kind"), SUMMED, ids=str)
def test_means_are_those_of_the_cpu(
    machine: CudaOnCpu, monkeypatch: pytest.MonkeyPatch, most: int, leads: int, kind: Kind
) -> None:
    """Bit for bit, of two streams of a batch, whose steps differ; vectors with NaN or Inf count as zeros."""
    head_dim, preset, _, options = kind
    for module in ("on_triton.backend", "on_cuda.token_sums", "job"):
        monkeypatch.setattr(f"pqcodec.kernels.{module}.MEAN_TOKENS", most)
    xs = [tensor(kind, 150, leads), tensor(kind, 1100, 2 * leads)]
    for x in xs:
        x[0, 70, 3], x[1, 71, head_dim - 1], x[1, 149, 0] = float("nan"), float("inf"), float("-inf")
    batch = EncodeBatch(xs, preset=preset, backend="cuda", **options)
    machine.memory = [*xs, *batch.streams]
    monkeypatch.setattr(token_sums, "ENOUGH", 1)
    monkeypatch.setattr(machine, "encode", lambda group: None)  # means alone
    streams = batch.run()
    assert machine.summed == 1
    for x, stream in zip(xs, streams, strict=True):
        zeros = torch.where(x.isfinite().all(-1, keepdim=True), x, 0)
        by_cpu = pqcodec.encode(zeros, preset=preset, backend="cpu", **options)
        place = Header.from_bytes(by_cpu).places[sections.OFFSETS]
        assert bytes(stream.numpy())[place.start : place.end] == by_cpu[place.start : place.end]


@pytest.mark.parametrize("kind", SOME + MORE * ALL, ids=str)
def test_rows_are_encoded_as_well_as_by_the_cpu(machine: CudaOnCpu, kind: Kind) -> None:
    _, preset, _, options = kind
    x = tensor(kind)
    data, by_cpu = encoded(machine, x, preset, **options), pqcodec.encode(x, preset=preset, backend="cpu", **options)
    assert len(data) == len(by_cpu)
    own, cpu = (relative_error(x, pqcodec.decode(each, backend="cpu")) for each in (data, by_cpu))
    assert own < 1.03 * cpu
    assert machine.launches == 1
    x[2, 199, 7] = x[1, 70, 0] = x[1, 71, 1] = float("nan")
    x[0, 4] = float("inf")
    with pytest.raises(NonFiniteInput, match="4 vector"):
        encoded(machine, x, preset, **options)


@pytest.mark.parametrize("size", [1e-30, pytest.param(1e-5, marks=NOT_ALWAYS), 1e-3, pytest.param(1e6, marks=NOT_ALWAYS), 1e36])
def test_means_of_any_size_are_taken_and_added(machine: CudaOnCpu, size: float) -> None:
    kind = SOME[1]
    x = tensor(kind) * size
    data, by_cpu = encoded(machine, x, kind[1], **KEYS), pqcodec.encode(x, preset=kind[1], backend="cpu", **KEYS)
    np.testing.assert_array_equal(bits(decoded(machine, data)), bits(pqcodec.decode(data, backend="cpu")))
    own, cpu = (relative_error(x, pqcodec.decode(each, backend="cpu")) for each in (data, by_cpu))
    assert own < 1.03 * cpu


ROUNDS: list[tuple[int, Kind]] = [  # rows of a block, of which each team or warp has many, one after the other
    (64, (128, "quad2", "bfloat16", {})),
    (64, SOME[1]),
    (50, (96, "quad3", "float16", {"chunk_tokens": 50})),
]
MORE_ROUNDS: list[tuple[int, Kind]] = [
    (64, (64, "quad3.5", "bfloat16", KEYS)),
    (64, (160, "quad3", "bfloat16", {})),
    (64, (576, "quad3", "bfloat16", {})),
    (64, (128, "quad3", "float32", {})),
    (64, (128, "pq3", "bfloat16", {})),
    (200, (128, "quad3", "bfloat16", {"chunk_tokens": 200})),
]


@pytest.mark.parametrize(("rows", "kind"), ROUNDS + MORE_ROUNDS * ALL, ids=str)
def test_many_blocks_one_after_the_other(machine: CudaOnCpu, rows: int, kind: Kind) -> None:
    """Threads take turns in an order of their own each time."""
    _, preset, _, options = kind
    x = tensor(kind, 27 * rows)
    expected = encoded(machine, x, preset, **options)
    rest = bits(pqcodec.decode(expected, backend="cpu"))
    machine.processors = 1
    for machine.seed in range(2):
        assert encoded(machine, x, preset, **options) == expected
        np.testing.assert_array_equal(bits(decoded(machine, expected)), rest)


@pytest.mark.parametrize(("rows", "kind"), ROUNDS, ids=str)
def test_teams_claim_each_block_once_whatever_was_launched_before(
    machine: CudaOnCpu, monkeypatch: pytest.MonkeyPatch, rows: int, kind: Kind
) -> None:
    monkeypatch.setattr(backend, "LAUNCHES", 1)
    monkeypatch.setattr(quads, "CLAIMED", 2)
    machine.processors = 2
    x = tensor(kind, 27 * rows)
    data = pqcodec.encode(x, preset=kind[1], backend="cpu", **kind[3])
    batch = DecodeBatch([stream := skewed(data, 12)], backend="cuda")
    machine.memory = [stream, *batch.outs]
    for _ in range(3):
        batch.outs[0].fill_(float("nan"))
        (found,) = batch.run()
        batch.check()
        np.testing.assert_array_equal(bits(found), bits(pqcodec.decode(data, backend="cpu")))
        assert not next(backend._claims(batch.groups[0])).any()


HALVES: list[Kind] = [SOME[1], (576, "quad3", "bfloat16", {})]  # whose rows are multiplied as float16, and so are their sums
MORE_HALVES: list[Kind] = [
    SOME[2],
    (256, "quad3", "float16", KEYS),
    (192, "quad3", "bfloat16", KEYS),
    (448, "quad2.5", "float32", {}),
]


@pytest.mark.parametrize("kind", HALVES + MORE_HALVES * ALL, ids=str)
def test_sums_of_float16_hold_rows_of_every_size_and_direction(machine: CudaOnCpu, kind: Kind) -> None:
    """Rows whose coordinates are few and large, or alike, or that are zero but for some channels; a size for each lead."""
    head_dim, preset, dtype, options = kind
    h = Header.from_bytes(pqcodec.encode(tensor(kind), preset=preset, backend="cpu", **options))
    found = backend.kernel_layout("encode", backend.header_of_kind(h), False)
    assert found
    assert in_halves("encode", h, "RUN_TURNS_AT" in found.places)
    rotation = torch.from_numpy(rotation_matrix(h.order, h.seed, 2).astype(np.float32))[:, :head_dim]
    rows = gaussian(6, 32, head_dim, seed=3)
    rows[1], rows[2] = rotation[:32], rotation[:32] + rotation[8:40]  # one coordinate, or two, as large as a row is long
    rows[3] = torch.eye(head_dim)[torch.arange(32) * 3 % head_dim]
    rows[4, :, torch.arange(head_dim) % 32 // 8 != 1] = 0  # all but a lane's channels
    rows[5, ::2] = rows[1, ::2]
    rows /= rows.square().mean(-1, keepdim=True).sqrt()
    sizes = 2.0 ** torch.tensor([-40, -30, -20, -14, -10, -7, -4, 0, 4, 6, 7, 8, 9, 10, 11, 12, 15])
    x = sizes[:, None, None] * rows.reshape(1, -1, head_dim)
    x = x.clamp(-6e4, 6e4).to(getattr(torch, dtype))
    data, by_cpu = encoded(machine, x, preset, **options), pqcodec.encode(x, preset=preset, backend="cpu", **options)
    own, cpu = ((x.double() - pqcodec.decode(each, backend="cpu").double()).square().sum(-1) for each in (data, by_cpu))
    assert own.isfinite().all()
    for lead, of_lead in enumerate(x.double().square().sum(-1)):
        there = of_lead > (2.0**-40 if dtype == "float16" else 0)  # else they are a few steps of subnormals
        own_error, error = (float((each[lead] / of_lead)[there].mean()) for each in (own, cpu))
        assert not there.any() or own_error < 1.05 * error + 1e-5, (sizes[lead], own_error, error)


@pytest.mark.parametrize("capability", [(9, 0), pytest.param((8, 0), marks=NOT_ALWAYS)], ids=str)
def test_older_streams_of_keys_are_decoded_and_encoded_as_ever(
    machine: CudaOnCpu, capability: tuple[int, int], token_by_token: None
) -> None:
    machine.capability, kind = capability, SOME[1]
    x = tensor(kind)
    data, by_cpu = encoded(machine, x, kind[1], **KEYS), pqcodec.encode(x, preset=kind[1], backend="cpu", **KEYS)
    np.testing.assert_array_equal(bits(decoded(machine, data)), bits(pqcodec.decode(data, backend="cpu")))
    own, cpu = (relative_error(x, pqcodec.decode(each, backend="cpu")) for each in (data, by_cpu))
    assert own < 1.03 * cpu


@NOT_ALWAYS
@pytest.mark.parametrize(("capability", "kind"), OLDER_GPUS, ids=str)
def test_other_gpus_code_the_same_rows(machine: CudaOnCpu, kind: Kind, capability: tuple[int, int]) -> None:
    machine.capability, (_, preset, _, options) = capability, kind
    x = tensor(kind)
    data = encoded(machine, x, preset, **options)
    np.testing.assert_array_equal(bits(decoded(machine, data)), bits(pqcodec.decode(data, backend="cpu")))
    by_cpu = pqcodec.decode(pqcodec.encode(x, preset=preset, backend="cpu", **options), backend="cpu")
    assert relative_error(x, pqcodec.decode(data, backend="cpu")) < 1.03 * relative_error(x, by_cpu)
    assert machine.launches == 2


@NOT_ALWAYS
@pytest.mark.parametrize("kind", SOME, ids=str)
def test_one_token_of_many_tensors_is_coded_by_the_kernels_of_few_blocks(machine: CudaOnCpu, kind: Kind) -> None:
    machine.few, (_, preset, _, options) = True, kind
    x = tensor(kind, tokens=1, leads=9)
    data = encoded(machine, x, preset, **(options | {"exact_tokens": 0}))
    by_cpu = pqcodec.encode(x, preset=preset, backend="cpu", **(options | {"exact_tokens": 0}))
    np.testing.assert_array_equal(bits(decoded(machine, data)), bits(pqcodec.decode(data, backend="cpu")))
    own, cpu = (relative_error(x, pqcodec.decode(each, backend="cpu")) for each in (data, by_cpu))
    assert own < 1.03 * cpu + 1e-9
    assert machine.launches == 2
