"""GPU backends: the CPU's bits out of every stream, the CPU's streams but for counted ties, batches, graphs and damage.

``pytest tests/test_gpu.py`` is the whole command. On a machine with a GPU both backends run on it, on all sizes; on any other
Triton's kernels run in Triton's interpreter, on few rows, and what only a GPU can show is skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib import util
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    DEVICE,
    GPU,
    HAS_CUDA,
    TORCH_DTYPES,
    bits,
    gaussian,
    needs_cuda,
    needs_gpu,
    needs_triton,
    sampled,
    with_means,
)
from test_backends import HEAD_DIMS, WORST_TIES

import pqcodec
from pqcodec import (
    BackendUnavailable,
    CorruptStream,
    DecodeBatch,
    EncodeBatch,
    InvalidArgument,
    NonFiniteInput,
    Rope,
    TruncatedStream,
    backends,
)
from pqcodec.codec import decode_together, encode_by
from pqcodec.codings.presets import DEFAULT_PRESET, PRESETS, Preset
from pqcodec.constants import CODING_QUADS
from pqcodec.options import EncodeOptions
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header
from pqcodec.stream.sections import EXACT_TOKENS, EXACT_VECTORS, OFFSETS
from pqcodec.stream.source import MemorySource

CUDA_ENCODERS = (*range(32, 257, 32), 320, 384, 448, 512, 576)  # head_dims whose quads the CUDA backend encodes
ON_GPU = [name for name, preset in PRESETS.items() if preset.rounds]  # test_affine_gpu has others that Triton covers
TOKENS = 75 if GPU else 6  # the interpreter takes its time for every block


def on_device(data: bytes) -> torch.Tensor:
    """A stream as a batch takes it."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE)


def to_bytes(stream: torch.Tensor) -> bytes:
    return stream.cpu().numpy().tobytes()


def decoded(data: bytes | torch.Tensor, backend: str, **options: Any) -> torch.Tensor:
    """What a GPU backend makes of a stream, on the CPU."""
    return pqcodec.decode(data, device=DEVICE, backend=backend, **options).cpu()


def same(x: torch.Tensor, y: torch.Tensor) -> None:
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    np.testing.assert_array_equal(bits(x), bits(y))


def differing_rows(x: torch.Tensor, y: torch.Tensor) -> int:
    return int((x != y).any(-1).sum())


def looks_at_a_few(backend: str, head_dim: int, preset: str) -> bool:
    """Whether an encoder looks for points among a few candidates, so that others may be nearer."""
    return backend == "cuda" and head_dim in CUDA_ENCODERS and PRESETS[preset].coding == CODING_QUADS


def agrees(x: torch.Tensor, backend: str, **options: Any) -> int:
    """Assert that a backend decodes the CPU's stream to the same bits, and encodes all but ``returned`` rows alike.

    Rows of an encoder that ``looks_at_a_few`` are alike if all together err at most 3 % more, and few quads, which scatter, a
    bit more: 64 of them 5.5 %.
    """
    by_cpu = pqcodec.encode(x, backend="cpu", **options)
    by_gpu = pqcodec.encode(x.to(DEVICE), backend=backend, **options)
    whole = pqcodec.decode(by_cpu, backend="cpu")
    same(decoded(by_cpu, backend), whole)
    info = pqcodec.inspect(by_cpu)
    sides = info.header_bytes + info.side_bytes
    assert by_gpu[:sides] == by_cpu[:sides]
    assert len(by_gpu) == len(by_cpu)
    y = pqcodec.decode(by_gpu, backend="cpu")
    if not looks_at_a_few(backend, x.shape[-1], options.get("preset", DEFAULT_PRESET)):
        return differing_rows(y, whole)
    theirs, ours = ((x.double() - each.double()).square().sum() for each in (whole, y))
    coded = max(x.shape[-2] - info.exact_tokens, 0) / max(x.shape[-2], 1)
    assert ours <= (1.03 + 0.2 / max(coded * x.numel() / 4, 1) ** 0.5) * theirs
    return 0


def ties_allowed(head_dim: int, preset: str, rows: int, backend: str = "") -> float:
    """Rows that two encoders may tell apart: one in 500 of 128 angles, and of each radius that is rounded to float16.

    The CUDA kernels bring 16-bit rows of 256 coordinates to integers of 15 bits: there the finer the cells, the more.
    """
    if head_dim <= 2:
        return rows  # a rotated vector's coordinates are one or two numbers, or minus them: its angles lie on edges of cells
    radii = max(head_dim // 16, 1) if preset == "paper" else 1
    coarse = 2 ** (PRESETS[preset].rate) / 1000 if backend == "cuda" and head_dim == 256 and preset != "paper" else 0
    return 1 + rows * max(WORST_TIES * radii * max(head_dim / 128, 1), coarse)


# -- the same bits -----------------------------------------------------------------------------------------------
def cases() -> Iterator[tuple[int, str, tuple[torch.dtype, ...]]]:
    """(head_dim, preset, dtypes): everything on a GPU; in the interpreter dtypes take turns but at 16, presets above it."""
    if GPU:
        yield from ((head_dim, preset, TORCH_DTYPES) for head_dim in HEAD_DIMS for preset in ON_GPU)
        return
    for i, head_dim in enumerate((1, 7, 16, 48, 64, 100, 128)):
        for j, preset in enumerate(ON_GPU):
            if head_dim > 16 and j % 4 != i % 4:
                continue
            yield head_dim, preset, TORCH_DTYPES if head_dim == 16 else (TORCH_DTYPES[(i + j) % 3],)
    yield 288, "pq3", (torch.float16,)


@pytest.mark.parametrize(
    ("head_dim", "preset", "dtypes"),
    list(cases()) if GPU else sampled(cases()),
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_decoding_agrees_bit_for_bit_and_encoding_but_for_ties(
    head_dim: int, preset: str, dtypes: tuple[torch.dtype, ...], gpu_backend: str
) -> None:
    shape = (3, 150, head_dim) if GPU else (1, 20, head_dim)
    differing = sum(agrees(gaussian(*shape, seed=head_dim, dtype=dtype), gpu_backend, preset=preset) for dtype in dtypes)
    assert differing <= ties_allowed(head_dim, preset, len(dtypes) * shape[0] * shape[1], gpu_backend)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [128, 256] if GPU else [64])
def test_rows_that_are_not_encoded_alike_are_encoded_as_well(head_dim: int, dtype: torch.dtype, gpu_backend: str) -> None:
    x = gaussian(3, TOKENS, head_dim, seed=head_dim, dtype=dtype)

    def squared_error(**options: Any) -> float:
        y = pqcodec.decode(
            pqcodec.encode(x.to(options.pop("device", "cpu")), preset="pq6", **options), backend="cpu", device="cpu"
        )
        return float((y.double() - x.double()).square().sum())

    assert squared_error(backend=gpu_backend, device=DEVICE) == pytest.approx(squared_error(backend="cpu"), rel=1e-3)


AGREEING = [
    {"center": "mean"},
    {"center": "mean", "preset": "paper", "exact_tokens": 2},
    {"center": "rope", "rope": Rope(theta=1e4, first_position=123456)},
    {"center": "rope", "rope": Rope(theta=1e6, dim=12, style="half")},
    {"center": "rope", "rope": Rope(theta=1e6, style="interleaved"), "exact_tokens": 4},
    {"center": "rope", "rope": Rope(theta=1e3, dim=18, style="interleaved", first_position=2**40 + 1)},
    {"chunk_tokens": 1, "exact_tokens": TOKENS - 2},
    {"chunk_tokens": 7, "seed": 2**64 - 1},
    {"chunk_tokens": 4096, "exact_tokens": TOKENS - 2},
    {"exact_tokens": 2 * TOKENS},
    {"preset": "quad2.75", "center": "mean", "effort": "best", "chunk_tokens": 7},
    {"preset": "quad3", "center": "rope", "rope": Rope(theta=1e4, first_position=123456), "exact_tokens": 4},
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(x, d) for i, x in enumerate(AGREEING) for j, d in enumerate(TORCH_DTYPES) if GPU or i % 3 == j or i in (0, 4)],
    ids=str,
)
@pytest.mark.parametrize("head_dim", (32, 64, 96, 100, 128, 192, 256) if GPU else (20,))
def test_options_agree(options: dict[str, Any], dtype: torch.dtype, head_dim: int, gpu_backend: str) -> None:
    """Means, exact tokens and all their checksums are the CPU's to the byte; so is the header, offset exponent included."""
    x = gaussian(2, TOKENS, head_dim)
    x = (with_means(x, options["rope"]) if "rope" in options else x + 5).to(dtype)
    assert agrees(x, gpu_backend, **options) <= ties_allowed(head_dim, options.get("preset", DEFAULT_PRESET), 2 * TOKENS)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e6, 3e37])
@pytest.mark.parametrize(("preset", "center"), [("pq3", "mean"), ("paper", None), ("paper", "mean")])
def test_powers_of_two_in_the_header_agree(scale: float, preset: str, center: str | None, gpu_backend: str) -> None:
    """Offsets and the paper's radii are halves: the header's exponents bring numbers of any size into their range."""
    x = (gaussian(2, TOKENS, 16).clamp(-3, 3) + 1) * scale
    assert agrees(x, gpu_backend, preset=preset, center=center, exact_tokens=1) <= 1


@pytest.mark.parametrize("options", [{"center": "mean"}, {"center": "rope", "rope": Rope(theta=100.0)}], ids=str)
def test_the_mean_is_of_a_sample_of_many_tokens(
    options: dict[str, Any], gpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third token of seventeen, where six are enough; one that holds NaN counts as zeros."""
    x = gaussian(2, 19, 16) + 3
    x[0, 5, 1] = float("nan")
    # The last one last: others take its number when they are imported, be it now, and would keep this test's.
    for module in ("on_triton.backend", *["on_cuda.token_sums"] * HAS_CUDA, "job"):
        monkeypatch.setattr(f"pqcodec.kernels.{module}.MEAN_TOKENS", 6)
    assert agrees(x, gpu_backend, exact_tokens=2, nonfinite="exact", **options) <= 1


def test_extreme_rows_agree(gpu_backend: str) -> None:
    x = (gaussian(64, 64).double() * torch.logspace(-44, 38, 64, dtype=torch.float64)[:, None]).clamp(-3.4e38, 3.4e38).float()
    for preset in ("pq3", "paper"):
        assert agrees(x, gpu_backend, preset=preset) <= 2
    x[::3] = 0
    x[1::3] = -0.0
    same(decoded(pqcodec.encode(x.to(DEVICE), backend=gpu_backend), gpu_backend)[::3], torch.zeros(22, 64))


@pytest.mark.parametrize("center", [None, "mean"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(dtype: torch.dtype, center: str | None, gpu_backend: str) -> None:
    # of sizes that differ: sums of numbers that are all alike lie on edges of cells
    x = (gaussian(TOKENS, 16, seed=4).clamp(-3, 3) * (torch.finfo(dtype).max / 9)).to(dtype)
    assert agrees(x, gpu_backend, preset="pq2", center=center) <= 1
    data = pqcodec.encode(x.to(DEVICE), backend=gpu_backend, preset="pq2", center=center)
    assert bool(decoded(data, gpu_backend).isfinite().all())


def test_a_mean_that_no_offset_reaches_is_stored_as_the_largest(gpu_backend: str) -> None:
    assert agrees(torch.full((TOKENS, 16), torch.finfo(torch.float32).max), gpu_backend, center="mean") <= 1


def test_any_payload_bits_decode_alike(gpu_backend: str) -> None:
    """Codes that no encoder writes: every field decodes to something, and to the same on a GPU."""
    rng = np.random.default_rng(5)
    for preset in ON_GPU if GPU else ("pq2", "pq6", "paper"):
        data = bytearray(pqcodec.encode(gaussian(20, 64), preset=preset, backend="cpu"))
        h = Header.from_bytes(bytes(data))
        start, size = h.blocks.place(0, 0), h.blocks.size(0) - 4
        noise = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        data[start : start + size + 4] = noise + struct.pack("<I", checksum(noise))
        same(decoded(bytes(data), gpu_backend), pqcodec.decode(bytes(data), backend="cpu"))


# -- shapes, strides, ranges -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 1, 5, 16), (0, 16), (3, 0, 16), (0, 5, 16), (2, 0, 3, 16)])
def test_any_number_of_dimensions_and_no_tokens_at_all(shape: tuple[int, ...], gpu_backend: str) -> None:
    x = gaussian(*shape) * 1e6
    for options in ({"center": "mean", "exact_tokens": 2}, {"preset": "paper"}, {"preset": "paper", "exact_tokens": 1}):
        assert agrees(x, gpu_backend, **options) <= 1


def test_strided_views_are_read_in_place(gpu_backend: str) -> None:
    base = gaussian(1, TOKENS, 3, 6).to(DEVICE)
    for x in (
        base.transpose(1, 2),
        base[:, ::3],
        base[:, 2:7, 1:],
        base.transpose(1, 3),
        base[..., ::2],
        base.expand(2, -1, -1, -1),
    ):
        data = pqcodec.encode(x, backend=gpu_backend, exact_tokens=1, center="mean")
        assert data == pqcodec.encode(x.contiguous(), backend=gpu_backend, exact_tokens=1, center="mean")
    with pytest.raises(InvalidArgument, match="last dimension must be contiguous"):
        EncodeBatch([base[..., ::2]], backend=gpu_backend)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("exact_tokens", [0, 2])
def test_a_part_of_a_larger_cache_is_filled_and_nothing_else(dtype: torch.dtype, exact_tokens: int, gpu_backend: str) -> None:
    data = pqcodec.encode(gaussian(2, 3, 7, 16, dtype=dtype), backend="cpu", exact_tokens=exact_tokens, chunk_tokens=4)
    whole = pqcodec.decode(data, backend="cpu")
    for tokens in ((0, 7), (1, 6)):
        cache = torch.full((2, 20, 5, 24), 7, dtype=dtype, device=DEVICE)
        out = cache[:, 9 : 9 + tokens[1] - tokens[0], 1:4, 4:20].transpose(1, 2)
        expected = cache.cpu().clone()
        expected[:, 9 : 9 + tokens[1] - tokens[0], 1:4, 4:20] = whole[:, :, slice(*tokens)].transpose(1, 2)
        assert pqcodec.decode(data, out=out, tokens=tokens, backend=gpu_backend) is out
        same(cache.cpu(), expected)


def test_outputs_of_other_strides_are_filled_by_a_copy(gpu_backend: str) -> None:
    data = pqcodec.encode(gaussian(3, 5, 16), backend="cpu")
    out = torch.zeros(16, 5, 3, device=DEVICE).permute(2, 1, 0)
    assert pqcodec.decode(data, out=out, backend=gpu_backend) is out
    same(out, pqcodec.decode(data, backend="cpu"))
    for wrong in (torch.zeros(3, 5, 17, device=DEVICE), torch.zeros(3, 5, 16, device=DEVICE).half()):
        with pytest.raises(InvalidArgument, match="pass a tensor of that shape and dtype"):
            pqcodec.decode(data, out=wrong, backend=gpu_backend)


@pytest.mark.parametrize(
    "options",
    [
        *([{}, {"center": "mean", "exact_tokens": 3}] if GPU else []),
        {"center": "rope", "rope": Rope(), "exact_tokens": 3},
        {"preset": "quad3", "exact_tokens": 3},
    ],
    ids=str,
)
def test_ranges_equal_slices_of_the_whole(options: dict[str, Any], gpu_backend: str) -> None:
    """Of a stream on the host only the blocks of a range are moved; of one on the device they are read where they lie."""
    x = gaussian(2, 2, 21, 8)
    x[1, 0, 7, 3] = float("inf")
    data = pqcodec.encode(x, chunk_tokens=8, nonfinite="exact", backend="cpu", **options)
    whole = pqcodec.decode(data, backend="cpu")
    for stream in (data, on_device(data)):
        for first, last in ((0, 2), (1, 12), (3, 19), (20, 20)):
            same(decoded(stream, gpu_backend, tokens=(first, last)), whole[..., first:last, :])
            part = decoded(stream, gpu_backend, tokens=(first, last), leading=(1, 3))
            same(part, whole.reshape(4, 21, 8)[1:3, first:last])
        same(decoded(stream, gpu_backend, leading=(2, 2)), whole.reshape(4, 21, 8)[2:2])
        for wrong in ({"tokens": (0, 22)}, {"leading": (1, 5)}):
            with pytest.raises(InvalidArgument, match="is outside"):
                decoded(stream, gpu_backend, **wrong)


# -- NaN and Inf -----------------------------------------------------------------------------------------------------
def test_nan_and_inf_are_refused_by_place(gpu_backend: str) -> None:
    x = gaussian(2, 3, 9, 16).to(DEVICE)
    x[1, 2, 7, 5] = float("inf")
    x[1, 2, 8, 1] = float("nan")
    for options in ({}, {"exact_tokens": 2, "center": "mean"}):
        with pytest.raises(NonFiniteInput, match=r"element \[1, 2, 7, 5\] of the tensor is inf \(2 vectors hold"):
            pqcodec.encode(x, backend=gpu_backend, **options)
    y = gaussian(16).to(DEVICE)
    y[3] = float("nan")
    with pytest.raises(NonFiniteInput, match=r"element \[3\] of the tensor is nan"):
        pqcodec.encode(y, backend=gpu_backend)
    batch = EncodeBatch([gaussian(4, 16).to(DEVICE), x], backend=gpu_backend)
    batch.run()
    with pytest.raises(NonFiniteInput, match=r"element \[1, 2, 7, 5\]"):
        batch.check()
    x.nan_to_num_(posinf=0.0)
    with pytest.raises(NonFiniteInput, match="has changed since"):
        batch.check()
    batch.run()
    batch.check()


@pytest.mark.parametrize("center", [None, "mean"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_nan_and_inf_are_kept_exact_when_asked(dtype: torch.dtype, center: str | None, gpu_backend: str) -> None:
    x = gaussian(3, 9, 16, dtype=dtype)
    for lead, token, value in ((0, 0, "nan"), (0, 1, "nan"), (0, 8, "inf"), (2, 3, "-inf")):
        x[lead, token, lead] = float(value)
    options: dict[str, Any] = {"nonfinite": "exact", "center": center, "exact_tokens": 1}
    data = pqcodec.encode(x.to(DEVICE), backend=gpu_backend, **options)
    by_cpu = pqcodec.encode(x, backend="cpu", **options)
    info = pqcodec.inspect(by_cpu)
    assert data[: info.header_bytes + info.side_bytes] == by_cpu[: info.header_bytes + info.side_bytes]
    for stream in (data, on_device(data)):
        same(decoded(stream, gpu_backend), pqcodec.decode(data, backend="cpu"))
    got = decoded(data, gpu_backend)
    for lead, token in ((0, 0), (0, 1), (0, 8), (2, 3)):
        same(got[lead, token], x[lead, token])


def test_the_header_beside_a_stream_is_the_streams(gpu_backend: str) -> None:
    """Also the exponent of the means, which only the device knows."""
    x = 2.0**20 * gaussian(2, 9, 16)
    header, data = encode_by(EncodeOptions(center="mean"), x.to(DEVICE), gpu_backend)
    assert header == Header.from_bytes(data[: header.header_bytes])
    assert header.offset_exponent == encode_by(EncodeOptions(center="mean"), x, "cpu")[0].offset_exponent != 0


# -- damage ----------------------------------------------------------------------------------------------------------
def test_every_damage_is_told_as_the_cpu_tells_it(small_stream: bytes, gpu_backend: str) -> None:
    start = Header.from_bytes(small_stream).header_bytes
    parts = set()
    for at in range(start, len(small_stream), 1 if GPU else 41):
        damaged = bytearray(small_stream)
        damaged[at] ^= 1 << at % 8
        expected = sorted(map(str, pqcodec.verify(bytes(damaged), backend="cpu")))
        stream = on_device(bytes(damaged))
        assert sorted(map(str, pqcodec.verify(stream, backend=gpu_backend))) == expected
        with pytest.raises(CorruptStream, match="checksum does not hold: "):
            pqcodec.decode(stream, backend=gpu_backend)
        parts |= {told.split(",")[0] for told in expected}
    assert parts == {"offset", "exact tokens", "exact vectors", "payload"}
    assert pqcodec.verify(on_device(small_stream), backend=gpu_backend) == []


def test_many_damages_are_all_told(small_stream: bytes, gpu_backend: str) -> None:
    h = Header.from_bytes(small_stream)
    damaged = bytearray(small_stream)
    for at in (
        h.header_bytes,
        h.places[EXACT_TOKENS].start + h.places[EXACT_TOKENS].entry_bytes,
        h.places[EXACT_VECTORS].start + 9,
        h.payload_start + 3,
        len(damaged) - 1,
    ):
        damaged[at] ^= 0x10
    expected = pqcodec.verify(bytes(damaged), backend="cpu")
    assert len(expected) == 5
    assert sorted(map(str, pqcodec.verify(on_device(bytes(damaged)), backend=gpu_backend))) == sorted(map(str, expected))
    for stream in (bytes(damaged), on_device(bytes(damaged))):
        with pytest.raises(CorruptStream, match="and 4 more places"):
            decoded(stream, gpu_backend)


def test_damage_outside_a_range_does_not_matter_to_it(gpu_backend: str) -> None:
    data = bytearray(pqcodec.encode(gaussian(2, 12, 16), chunk_tokens=4, backend="cpu"))
    whole = pqcodec.decode(bytes(data), backend="cpu")
    data[Header.from_bytes(bytes(data)).blocks.place(1, 1) + 5] ^= 1
    for stream in (bytes(data), on_device(bytes(data))):
        for options, part in (({"tokens": (0, 4)}, whole[:, :4]), ({"leading": (0, 1)}, whole[:1])):
            same(decoded(stream, gpu_backend, **options), part)
        with pytest.raises(CorruptStream, match=r"payload, leading index 1, tokens 4 \.\. 7"):
            decoded(stream, gpu_backend, tokens=(7, 8))


def test_an_offset_that_is_not_finite_is_refused(gpu_backend: str) -> None:
    data = bytearray(pqcodec.encode(gaussian(2, 5, 16), center="mean", backend="cpu"))
    h = Header.from_bytes(bytes(data))
    at, size = h.header_bytes + h.places[OFFSETS].entry_bytes, h.places[OFFSETS].entry_bytes - 4
    data[at + 6 : at + 8] = struct.pack("<H", 0x7C00)
    data[at + size : at + size + 4] = struct.pack("<I", checksum(bytes(data[at : at + size])))
    for stream in (bytes(data), on_device(bytes(data))):
        with pytest.raises(CorruptStream, match="offset of leading index 1 is not finite"):
            decoded(stream, gpu_backend)


def test_streams_of_another_length_are_refused(small_stream: bytes, gpu_backend: str) -> None:
    for size in (0, 3, 40, 80, len(small_stream) - 1):
        for stream in (small_stream[:size], torch.frombuffer(bytearray(small_stream), dtype=torch.uint8)[:size].to(DEVICE)):
            with pytest.raises(TruncatedStream):
                decoded(stream, gpu_backend)
    with pytest.raises(CorruptStream, match="1 bytes behind the end"):
        DecodeBatch([on_device(small_stream + b"\0")], backend=gpu_backend)


# -- batches ---------------------------------------------------------------------------------------------------------
def mixed() -> tuple[list[torch.Tensor], list[str]]:
    """Tensors of a model with two kinds of layers, some of one kind, as views and whole; and their presets."""
    cache = gaussian(2, TOKENS, 3, 16, seed=9, dtype=torch.bfloat16).to(DEVICE)
    tensors = [
        cache.transpose(1, 2),
        gaussian(2, 5, 48, dtype=torch.float16).to(DEVICE),
        gaussian(1, 3, 7, 16, dtype=torch.bfloat16).to(DEVICE),
        gaussian(0, 16, dtype=torch.bfloat16).to(DEVICE),
        gaussian(6, 16).to(DEVICE),
        gaussian(16, dtype=torch.bfloat16).to(DEVICE) * 1e9,
        cache[:, :1, 0],
    ]
    return tensors, ["pq3", "quad2.5", "pq3", "pq3", "pq6", "paper", "quad3"]


BATCHED: list[dict[str, Any]] = [{"center": "mean", "exact_tokens": 2, "chunk_tokens": 4}, {}]


@pytest.mark.parametrize("options", BATCHED if GPU else sampled(BATCHED), ids=str)
def test_a_batch_makes_and_reads_the_streams_of_one_at_a_time(options: dict[str, Any], gpu_backend: str) -> None:
    tensors, presets = mixed()
    batch = EncodeBatch(tensors, preset=presets, backend=gpu_backend, **options)
    streams = batch.run()
    batch.check()
    alone = [pqcodec.encode(x, preset=name, backend=gpu_backend, **options) for x, name in zip(tensors, presets, strict=True)]
    assert [to_bytes(stream) for stream in streams] == alone
    readers = DecodeBatch(streams, backend=gpu_backend)
    for out, data in zip(readers.run(), alone, strict=True):
        same(out, pqcodec.decode(data, backend="cpu"))
    readers.check()


def test_a_batch_follows_its_tensors(gpu_backend: str) -> None:
    """``run`` again codes what the same tensors hold by then; nothing of the last run is left over."""
    x = torch.ones(2, 9, 16, device=DEVICE)
    batch = EncodeBatch([x], center="mean", exact_tokens=1, backend=gpu_backend)
    readers = None
    for seed, scale in ((1, 1e9), (2, 1.0), (3, 1e-9)):
        new = gaussian(2, 9, 16, seed=seed) * scale
        x.copy_(new)
        batch.run()
        assert to_bytes(batch.streams[0]) == pqcodec.encode(x, center="mean", exact_tokens=1, backend=gpu_backend)
        if readers is None:
            readers = DecodeBatch(batch.streams, backend=gpu_backend)
        same(readers.run()[0], pqcodec.decode(to_bytes(batch.streams[0]), backend="cpu"))
        readers.check()


def test_each_tensor_of_a_batch_may_turn_by_its_own_rope(gpu_backend: str) -> None:
    tensors = [gaussian(2, 9, d).to(DEVICE) for d in (16, 16, 32)]
    ropes = [Rope(theta=1e4, first_position=7), Rope(theta=1e4), Rope(theta=1e6, dim=8, style="interleaved")]
    batch = EncodeBatch(tensors, center="rope", rope=ropes, backend=gpu_backend)
    for stream, x, rope in zip(batch.run(), tensors, ropes, strict=True):
        assert to_bytes(stream) == pqcodec.encode(x, center="rope", rope=rope, backend=gpu_backend)
    for out, stream in zip(DecodeBatch(batch.streams, backend=gpu_backend).run(), batch.streams, strict=True):
        same(out, pqcodec.decode(to_bytes(stream), backend="cpu"))


def test_a_batch_fills_ranges_into_parts_of_caches(gpu_backend: str) -> None:
    streams = [pqcodec.encode(gaussian(3, 9, d, seed=d), chunk_tokens=4, exact_tokens=1, backend="cpu") for d in (16, 32)]
    caches = [torch.zeros(8, 2, d, device=DEVICE) for d in (16, 32)]
    outs = [cache[1:6].transpose(0, 1) for cache in caches]
    batch = DecodeBatch([on_device(s) for s in streams], outs=outs, tokens=(3, 8), leading=(1, 3), backend=gpu_backend)
    assert all(a is b for a, b in zip(batch.run(), outs, strict=True))
    batch.check()
    for cache, data in zip(caches, streams, strict=True):
        expected = torch.zeros(cache.shape)
        expected[1:6] = pqcodec.decode(data, tokens=(3, 8), leading=(1, 3), backend="cpu").transpose(0, 1)
        same(cache, expected)


@needs_gpu  # in the interpreter it takes minutes, and shows nothing that other tests do not
@pytest.mark.parametrize(
    "options",
    [{}, {"center": "mean", "exact_tokens": 1}, {"center": "rope", "rope": Rope()}, {"preset": "quad3"}],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_blocks_of_all_lengths_are_coded_side_by_side(head_dim: int, options: dict[str, Any], gpu_backend: str) -> None:
    """Warps that multiply together have blocks of other lengths, ranges that begin and end elsewhere, or no block at all."""
    lengths = (1, 23, 24, 25, 9)
    tensors = [gaussian(3, tokens, head_dim, seed=tokens, dtype=torch.bfloat16) for tokens in lengths]
    tensors[-1][1, 3] *= 1e30  # these rows alone are brought to another size
    tensors[-1][2, 0] = 0
    options = options | {"chunk_tokens": 16, "preset": "pq3"}
    made = EncodeBatch([x.to(DEVICE) for x in tensors], backend=gpu_backend, **options)
    streams = made.run()
    made.check()
    for x, stream in zip(tensors, streams, strict=True):
        by_cpu = pqcodec.decode(pqcodec.encode(x, backend="cpu", **options), backend="cpu")
        assert differing_rows(pqcodec.decode(to_bytes(stream), backend="cpu"), by_cpu) <= 1
    for tokens in ((0, 1), (0, None), (7, 9), (16, None)):
        chosen = [
            stream for x, stream in zip(tensors, streams, strict=True) if x.shape[1] > max(tokens[0], (tokens[1] or 0) - 1)
        ]
        for stream in chosen:
            last = tokens[1] or pqcodec.inspect(to_bytes(stream)).shape[1]
            want = pqcodec.decode(to_bytes(stream), tokens=(tokens[0], last), backend="cpu")
            same(decoded(stream, gpu_backend, tokens=(tokens[0], last)), want)
    readers = DecodeBatch(streams, backend=gpu_backend)
    for out, stream in zip(readers.run(), streams, strict=True):
        same(out, pqcodec.decode(to_bytes(stream), backend="cpu"))
    readers.check()
    streams[1][-9] ^= 4
    readers.run()
    with pytest.raises(CorruptStream, match="payload, leading index 2"):
        readers.check()
    tensors[-1][0, 5, 3], tensors[-1][2, 8, 60] = float("nan"), float("-inf")
    wrong = EncodeBatch([x.to(DEVICE) for x in tensors], backend=gpu_backend, **options)
    wrong.run()
    with pytest.raises(NonFiniteInput, match="2 vectors hold"):
        wrong.check()


@pytest.mark.parametrize("options", [{}, {"center": "mean", "exact_tokens": 2, "chunk_tokens": 4}], ids=str)
def test_streams_of_the_host_are_moved_and_decoded_together(options: dict[str, Any], gpu_backend: str) -> None:
    tensors, presets = mixed()
    streams = [pqcodec.encode(x.cpu(), preset=name, **options) for x, name in zip(tensors, presets, strict=True)]
    infinite = gaussian(3, 9, 16)
    infinite[1, 4, 3] = torch.inf
    streams.append(pqcodec.encode(infinite, nonfinite="exact", **options))
    outs = [torch.zeros(x.shape, dtype=x.dtype, device=DEVICE) for x in [*tensors, infinite]]
    decode_together([MemorySource(stream) for stream in streams], outs, [0] * len(outs), gpu_backend)
    for out, data in zip(outs, streams, strict=True):
        same(out, pqcodec.decode(data, backend="cpu"))
    broken = bytearray(streams[0])
    broken[-5] ^= 1
    sources = [MemorySource(stream) for stream in [*streams[1:], broken]]
    with pytest.raises(CorruptStream, match="checksum does not hold: payload"):
        decode_together(sources, [*outs[1:], outs[0]], [0] * len(outs), gpu_backend)


def test_streams_of_one_round_and_of_two_lie_in_one_batch(gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(2, TOKENS, 48, dtype=torch.float16)
    streams = [pqcodec.encode(x, preset="pq4", backend="cpu")]
    monkeypatch.setattr(Preset, "rounds", 1)
    streams.append(pqcodec.encode(x, preset="pq4", backend="cpu"))
    assert [Header.from_bytes(data).rounds for data in streams] == [2, 1]
    for found, data in zip(DecodeBatch([on_device(data) for data in streams], backend=gpu_backend).run(), streams, strict=True):
        same(found.cpu(), pqcodec.decode(data, backend="cpu"))
    assert agrees(x, gpu_backend, preset="pq4") <= ties_allowed(48, "pq4", 2 * TOKENS)


def test_a_batch_tells_which_stream_is_damaged(gpu_backend: str) -> None:
    streams = [on_device(pqcodec.encode(gaussian(2, 9, 16), chunk_tokens=4, backend="cpu")) for _ in range(3)]
    batch = DecodeBatch(streams, backend=gpu_backend)
    batch.run()
    batch.check()
    streams[1][-5] ^= 1
    batch.run()
    assert [str(damage) for damage in batch.damage()] == ["payload, leading index 1, tokens 8 .. 8"]
    with pytest.raises(CorruptStream, match="leading index 1, tokens 8"):
        batch.check()
    streams[1][-5] ^= 1
    batch.run()
    batch.check()


def test_wrong_arguments_of_batches_are_named(gpu_backend: str) -> None:
    x = gaussian(4, 16).to(DEVICE)
    stream = on_device(pqcodec.encode(x.cpu(), backend="cpu"))
    meta = torch.empty(4, 16, device="meta")
    shifted = torch.cat([stream.new_zeros(1), stream])[1:]
    wrong: list[tuple[type[Any], tuple[Any, ...], dict[str, Any], str]] = [
        (EncodeBatch, ([],), {}, "lie on none"),
        (EncodeBatch, ([x, meta],), {}, "tensors of one device"),
        (EncodeBatch, ([x.cpu().numpy()],), {}, "not ndarray"),
        (EncodeBatch, ([x] * 3,), {"preset": ["pq3", "pq4"]}, "preset: 2 are given for 3"),
        (EncodeBatch, ([x] * 3,), {"rope": [None]}, "rope: 1 are given for 3"),
        (EncodeBatch, ([x],), {"rope": [Rope()]}, "go together"),
        (EncodeBatch, ([x],), {"preset": "pq9"}, "preset 'pq9' is unknown"),
        (EncodeBatch, ([x.double()],), {}, "float64"),
        (DecodeBatch, ([],), {}, "lie on none"),
        (DecodeBatch, ([bytes(100)],), {}, "not bytes"),
        (DecodeBatch, ([stream.float()],), {}, "contiguous uint8 tensor"),
        (DecodeBatch, ([torch.stack([stream, stream], 1)[:, 0]],), {}, "contiguous uint8 tensor"),
        (DecodeBatch, ([shifted],), {}, "multiple of 4 bytes"),
        (DecodeBatch, ([stream] * 2,), {"outs": [torch.zeros(4, 16, device=DEVICE)]}, "1 outs are given for 2"),
        (DecodeBatch, ([stream],), {"outs": [torch.zeros(4, 17, device=DEVICE)]}, r"the result is float32 \(4, 16\)"),
        (DecodeBatch, ([stream],), {"outs": [torch.zeros(16, 4, device=DEVICE).T]}, "last dimension must be contiguous"),
        (DecodeBatch, ([stream],), {"outs": [meta]}, "out 0 lies on 'meta'"),
        (DecodeBatch, ([stream],), {"tokens": (2, 5)}, "tokens 2 .. 5 is outside"),
    ]
    for kind, arguments, options, message in wrong:
        with pytest.raises(InvalidArgument, match=message):
            kind(*arguments, backend=gpu_backend, **options)
    with pytest.raises(InvalidArgument, match="backend 'cpu' does not code batches"):
        EncodeBatch([x], backend="cpu")


# -- which backend ---------------------------------------------------------------------------------------------------
def test_an_unknown_backend_is_told_what_there_is() -> None:
    message = r"choose from \['cpu', 'cuda', 'reference', 'triton'\] or 'auto'"
    for call in (
        lambda: pqcodec.encode(gaussian(4, 16), backend="abacus"),
        lambda: EncodeBatch([gaussian(4, 16)], backend="abacus"),
    ):
        with pytest.raises(BackendUnavailable, match=message):
            call()


@needs_triton
def test_a_backend_that_cannot_reach_a_tensor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never another backend instead: a GPU's backend refuses tensors of the CPU, and the CPU's those of a GPU."""
    x = gaussian(4, 16)
    data = pqcodec.encode(x, backend="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for backend in ("triton", "cuda"):
        for call in (
            lambda backend=backend: pqcodec.encode(x, backend=backend),
            lambda backend=backend: pqcodec.decode(data, backend=backend),
            lambda backend=backend: pqcodec.verify(data, backend=backend),
            lambda backend=backend: EncodeBatch([x], backend=backend),
        ):
            with pytest.raises(BackendUnavailable, match=f"backend '{backend}' (codes tensors of|needs)"):
                call()
    with pytest.raises(InvalidArgument, match="does not code batches"):
        EncodeBatch([x])
    if not GPU:
        with pytest.raises(BackendUnavailable, match="device 'cuda'"):
            pqcodec.decode(data, device="cuda")


def test_auto_is_a_rule_of_the_device_and_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [backends.names("auto", device)[0] for device in ("cpu", "xpu")] == ["cpu", "triton"]
    monkeypatch.setattr(torch.version, "hip", None)
    for found, backend in ((object(), "cuda"), (None, "triton")):
        monkeypatch.setattr(backends, "find_spec", lambda name, found=found: found)
        assert backends.names("auto", "cuda")[0] == backend
    monkeypatch.setattr(backends, "find_spec", util.find_spec)
    assert [backends.installed(name) for name in ("importlib.util", "no_such_package.part")] == [True, False]
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", "6.4")  # ROCm's GPUs are called cuda, too
    assert backends.names("auto", "cuda")[0] == "triton"


@pytest.mark.skipif(GPU, reason="numpy arrays are the CPU's: only the interpreter takes them")
@needs_triton
def test_the_interpreter_takes_and_gives_numpy_arrays() -> None:
    x = gaussian(2, 5, 16, dtype=torch.float16).numpy()
    data = pqcodec.encode(x, backend="triton")
    assert data == pqcodec.encode(x, backend="cpu")
    y, out = pqcodec.decode(data, backend="triton"), np.zeros_like(x)
    assert pqcodec.decode(data, out=out, backend="triton") is out
    for z in (y, out):
        assert isinstance(z, np.ndarray)
        np.testing.assert_array_equal(bits(z), bits(pqcodec.decode(data, backend="cpu")))


# -- what only a GPU shows -------------------------------------------------------------------------------------------
def big_batch(backend: str, rows: int = 4096, **options: Any) -> tuple[list[torch.Tensor], EncodeBatch, DecodeBatch]:
    """Some tensors of every kind of kernel, and batches over them that have run once."""
    tensors = [
        gaussian(4, rows // 4, 128, seed=1, dtype=torch.bfloat16).to(DEVICE),
        gaussian(rows // 8, 8, 128, seed=2, dtype=torch.bfloat16).to(DEVICE).transpose(0, 1),
        gaussian(2, rows // 8, 100, seed=3).to(DEVICE),
        gaussian(rows // 4, 64, seed=4, dtype=torch.float16).to(DEVICE),
        gaussian(rows // 4, 256, seed=5, dtype=torch.float16).to(DEVICE),
    ]
    batch = EncodeBatch(tensors, backend=backend, **options)
    readers = DecodeBatch(batch.run(), backend=backend)
    readers.run()
    torch.cuda.synchronize()
    return tensors, batch, readers


OPTIONS = [
    {},
    {"center": "rope", "rope": Rope(theta=1e4), "exact_tokens": 4},
    {"preset": "paper", "center": "mean"},
    {"preset": "pq3"},
    {"preset": "pq3", "center": "rope", "rope": Rope(theta=1e4), "exact_tokens": 4},
]


def eager(tensors: list[torch.Tensor], backend: str, **options: Any) -> tuple[list[bytes], list[torch.Tensor]]:
    """Streams and outputs of tensors, one at a time."""
    streams = [pqcodec.encode(x, backend=backend, **options) for x in tensors]
    return streams, [pqcodec.decode(data, backend="cpu") for data in streams]


def check_same(batch: EncodeBatch, readers: DecodeBatch, expected: tuple[list[bytes], list[torch.Tensor]]) -> None:
    assert [to_bytes(stream) for stream in batch.streams] == expected[0]
    for out, y in zip(readers.outs, expected[1], strict=True):
        same(out, y)
    batch.check()
    readers.check()


@needs_gpu
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("preset", ["pq3", "paper"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_numbers_too_small_for_the_dtype_keep_their_sign(
    gpu_backend: str, dtype: torch.dtype, preset: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if preset != "paper":
        monkeypatch.setattr(Preset, "rounds", rounds)
    scales = torch.tensor([1e-4, 1e-6, 1e-7, 3e-8, 1e-8, 1e-20, 1e-37, 1e-39, 0.0])
    x = (gaussian(9, 128, seed=3)[:, None, :] * scales[:, None, None].expand(9, TOKENS, 1)).to(dtype)
    data = pqcodec.encode(x, preset=preset, backend="cpu")
    expected = pqcodec.decode(data, backend="cpu")
    assert (bits(pqcodec.decode(data, backend=gpu_backend, device=DEVICE)) == bits(expected)).all()


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_graph_replays_on_new_numbers(options: dict[str, Any], gpu_backend: str) -> None:
    tensors, batch, readers = big_batch(gpu_backend, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run()
        readers.run()
    for seed in (11, 12):
        for x in tensors:
            x.copy_(gaussian(*x.shape, seed=seed, dtype=x.dtype))
        for buffer in (*(s[s.numel() // 2 :] for s in batch.streams), *readers.outs):
            buffer.zero_()
        graph.replay()
        torch.cuda.synchronize()
        check_same(batch, readers, eager(tensors, gpu_backend, **options))


@needs_gpu
def test_a_graph_places_exact_vectors(gpu_backend: str) -> None:
    x = gaussian(2, 200, 128, dtype=torch.float16)
    x[1, 77, 3] = float("nan")
    data = pqcodec.encode(x, nonfinite="exact", backend="cpu")
    readers = DecodeBatch([on_device(data)], backend=gpu_backend)
    readers.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        readers.run()
    readers.outs[0].zero_()
    graph.replay()
    same(readers.outs[0], pqcodec.decode(data, backend="cpu"))


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_work_is_done_on_the_current_stream(options: dict[str, Any], gpu_backend: str) -> None:
    """New numbers are written late, on a stream of one's own: work on any other stream would still find the old ones."""
    tensors, batch, readers = big_batch(gpu_backend, **options)
    new = [gaussian(*x.shape, seed=21, dtype=x.dtype).to(DEVICE) for x in tensors]
    expected = eager(new, gpu_backend, **options)
    torch.cuda.synchronize()
    own = torch.cuda.Stream()
    with torch.cuda.stream(own):
        torch.cuda._sleep(200_000_000)
        for x, y in zip(tensors, new, strict=True):
            x.copy_(y)
        batch.run()
        readers.run()
    own.synchronize()
    check_same(batch, readers, expected)


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_run_allocates_nothing_and_waits_for_nothing(options: dict[str, Any], gpu_backend: str) -> None:
    tensors, batch, readers = big_batch(gpu_backend, **options)
    expected = eager(tensors, gpu_backend, **options)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.run()
        readers.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    check_same(batch, readers, expected)


@needs_gpu
def test_tensors_of_more_than_2_to_the_31_elements(gpu_backend: str) -> None:
    """Rows behind the 2^31st element are coded where they lie, from and into tensors and from streams of gigabytes."""
    tokens, last = (1 << 24) + 64, 640
    needed = 2 * 2 * 128 * tokens + (3 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"{needed >> 30} GiB of free GPU memory are needed")
    x = torch.empty(1, tokens, 128, dtype=torch.bfloat16, device=DEVICE).normal_()
    batch = EncodeBatch([x], preset="pq2", backend=gpu_backend)
    (stream,) = batch.run()
    batch.check()
    end = x[:, -last:].clone()
    expected = pqcodec.decode(pqcodec.encode(end, preset="pq2", backend=gpu_backend), backend="cpu")
    same(decoded(stream, gpu_backend, tokens=(tokens - last, tokens)), expected)
    middle = slice((1 << 23) - last // 2, (1 << 23) + last // 2)  # stored bytes 2^31 lie in it
    between = pqcodec.decode(pqcodec.encode(x[:, middle], preset="pq2", backend=gpu_backend), backend="cpu")
    x[:, -last:] = 0
    pqcodec.decode(stream, out=x[:, -last:], tokens=(tokens - last, tokens), backend=gpu_backend)
    same(x[:, -last:], expected)
    x.zero_()
    readers = DecodeBatch([stream], outs=[x], backend=gpu_backend)
    readers.run()
    readers.check()
    same(x[:, -last:], expected)
    same(x[:, middle], between)


@needs_cuda
@pytest.mark.parametrize(
    ("head_dim", "preset", "options"),
    [
        *((head_dim, "quad2.5", {}) for head_dim in (96, 128, 192, 576)),
        (128, "quad3.5", {"chunk_tokens": 256}),
        *((head_dim, "quad3", {"center": "rope", "rope": Rope(), "exact_tokens": 4}) for head_dim in (64, 96, 128, 576)),
    ],
    ids=str,
)
def test_very_many_blocks_are_decoded_as_few_are(head_dim: int, preset: str, options: dict[str, Any]) -> None:
    """Each multiprocessor has many, one after another, and claims the last ones; also where a graph is replayed."""
    leads, tokens, few = 32, 1 << 15, 1 << 11
    x = torch.empty(leads, tokens, head_dim, dtype=torch.bfloat16, device=DEVICE).normal_()
    (stream,) = EncodeBatch([x], preset=preset, backend="cuda", **options).run()
    ranges = [(first, first + few) for first in range(0, tokens, few)]
    expected = torch.cat([DecodeBatch([stream], tokens=each, backend="cuda").run()[0] for each in ranges], 1)
    batch = DecodeBatch([stream], outs=[x], backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run()
    for work in (batch.run, graph.replay) * 3:
        x.fill_(float("nan"))
        work()
        batch.check()
        assert torch.equal(x.view(torch.int16), expected.view(torch.int16))


@needs_cuda
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_the_gpu_backends_agree_with_one_another(head_dim: int, dtype: torch.dtype) -> None:
    x = gaussian(16, 1000, head_dim, dtype=dtype).to(DEVICE)
    for preset in ON_GPU:
        for options in ({}, {"center": "rope", "rope": Rope(theta=1e4, style="interleaved")}):
            one, two = (pqcodec.encode(x, preset=preset, backend=name, **options) for name in ("triton", "cuda"))
            assert len(one) == len(two)
            same(decoded(one, "triton"), decoded(one, "cuda"))
            same(decoded(two, "triton"), decoded(two, "cuda"))
            if not looks_at_a_few("cuda", head_dim, preset):
                allowed = ties_allowed(head_dim, preset, 16000, "cuda")
                assert differing_rows(decoded(one, "cuda"), decoded(two, "cuda")) <= allowed


@needs_gpu
@pytest.mark.parametrize("preset", ON_GPU)
def test_ties_are_rare(preset: str, gpu_backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = 1 << 18
    x = gaussian(1, rows, 128, seed=1, dtype=torch.float16)
    differing = agrees(x, gpu_backend, preset=preset)
    with capsys.disabled():
        billion = differing / x.numel() * 1e9
        print(f"\n{gpu_backend} {preset}: ties in {differing} of {rows} rows, {billion:.0f} a billion numbers")
    assert differing <= WORST_TIES * rows


@needs_gpu
def test_auto_takes_the_backend_of_the_device() -> None:
    x = gaussian(4, 16).to(DEVICE)
    assert EncodeBatch([x])._kernel.name == ("cuda" if HAS_CUDA and torch.version.hip is None else "triton")
    y = pqcodec.decode(pqcodec.encode(x), device=DEVICE)
    assert y.device == x.device
    assert pqcodec.decode(pqcodec.encode(x)).device.type == "cpu"


@needs_gpu
def test_streams_and_outs_lie_on_one_device(gpu_backend: str) -> None:
    data = pqcodec.encode(gaussian(4, 16), backend="cpu")
    with pytest.raises(InvalidArgument, match="out 0 lies on 'cpu'"):
        DecodeBatch([on_device(data)], outs=[torch.zeros(4, 16)], backend=gpu_backend)
    with pytest.raises(InvalidArgument, match="tensors of one device"):
        DecodeBatch([on_device(data), torch.frombuffer(bytearray(data), dtype=torch.uint8)], backend=gpu_backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_a_tensor_of_another_gpu_is_coded_there(gpu_backend: str) -> None:
    x = gaussian(4, 70, 128, dtype=torch.float16)
    for device in ("cuda:1", "cuda:0"):
        data = pqcodec.encode(x.to(device), backend=gpu_backend, center="mean")
        out = pqcodec.decode(data, device=device, backend=gpu_backend)
        assert str(out.device) == device
        same(out, pqcodec.decode(data, backend="cpu"))


@needs_triton
def test_sums_see_every_byte_that_changes(summed_weights: None) -> None:
    """Of weights that a model identity looks at: single bytes, tails, rows that change places."""
    from pqcodec.words import Sums, sums_anywhere

    sizes = (1, 7, 8, 4096, (1 << 19) + 3) if not GPU else (1, 7, 8, 4096, (1 << 19) + 3, (5 << 20) + 1)
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE) for size in sizes]
    assert all(map(sums_anywhere, tensors))
    assert not any(map(sums_anywhere, (tensors[3][1:], tensors[3].view(2, -1).T)))
    sums = Sums(tensors)
    assert sums.chunks == [-(-size // (1 << 19)) for size in sizes]
    before = sums.begin()()
    np.testing.assert_array_equal(sums.begin()(), before)
    ends = np.cumsum(sums.chunks)
    for number, x in enumerate(tensors):
        for place in {0, len(x) // 2, len(x) - 1}:
            x[place] ^= 64
            changed = np.flatnonzero(sums.begin()() != before)
            assert changed.tolist() == [ends[number] - sums.chunks[number] + place // (1 << 19)]
            x[place] ^= 64
    rows = tensors[4][: 1 << 19].view(64, -1)
    rows[[3, 5]] = rows[[5, 3]]
    assert (sums.begin()() != before).sum() == 1
