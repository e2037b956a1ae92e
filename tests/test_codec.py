"""One tensor to a stream and back: shapes, dtypes, strides, ranges, centring, exact parts, extreme numbers."""

from __future__ import annotations

import io
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, DEVICE, RESTORING, TORCH_DTYPES, bits, gaussian, needs_triton, rel_mse
from hypothesis import given, settings
from hypothesis import strategies as st

import pqcodec
from pqcodec import InvalidArgument, NonFiniteInput, Rope, codec
from pqcodec.codings.look_ups import rotation_matrix
from pqcodec.options import EncodeOptions
from pqcodec.stages import centre, rotation
from pqcodec.stream.source import source_of

# relMSE that a preset keeps on Gaussian vectors of head_dim 16 and up: about 1.3 times what is measured at 64
WORST_ERROR = {
    "pq2": 0.19,
    "pq2.5": 0.10,
    "pq3": 0.05,
    "pq3.5": 0.026,
    "pq4": 0.014,
    "pq5": 0.004,
    "pq6": 0.0011,
    "quad2": 0.105,
    "quad2.25": 0.076,
    "quad2.5": 0.054,
    "quad2.75": 0.039,
    "quad3": 0.028,
    "quad3.25": 0.020,
    "quad3.5": 0.0145,
    "paper": 0.036,
    "wu44": 0.017,
    "wu33": 0.066,
    "wu35": 0.012,
    "wu24": 0.046,
    "kivi2-key": 0.18,
    "kivi4-key": 0.0075,
    "int2": 0.18,
    "int4": 0.0075,
    "q4_0": 0.0085,
    "decoquant8": 5e-5,
    "decoquant4": 0.013,
    "decoquant2": 0.65,
    "q8_0": 4e-5,
    "nuq4-key": 0.0082,
    "nuq3-key": 0.033,
    "nuq2-key": 0.128,
    "nuq4": 0.0075,
    "nuq3": 0.032,
    "nuq2": 0.125,
    "kvquant4-key": 0.0082,
    "kvquant3-key": 0.033,
    "kvquant2-key": 0.128,
    "kvquant4": 0.0053,
    "kvquant3": 0.022,
    "kvquant2": 0.088,
}


@pytest.mark.parametrize("preset", RESTORING)
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_round_trip_keeps_shape_dtype_kind_and_error(preset: str, dtype: torch.dtype, backend: str) -> None:
    x = gaussian(2, 3, 70, 64, dtype=dtype)
    data = pqcodec.encode(x, preset=preset, backend=backend)
    y = pqcodec.decode(data, backend=backend)
    assert (y.shape, y.dtype, type(y)) == (x.shape, x.dtype, type(x))
    assert rel_mse(x, y) < WORST_ERROR[preset]
    assert len(data) == pqcodec.encoded_size(x.shape, str(dtype).removeprefix("torch."), preset=preset)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_numpy_in_numpy_out(dtype: Any, backend: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 33, 80)).astype(dtype)
    y = pqcodec.decode(pqcodec.encode(x, preset="pq4", backend=backend), backend=backend)
    assert isinstance(y, np.ndarray)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert rel_mse(torch.from_numpy(x), torch.from_numpy(y)) < WORST_ERROR["pq4"]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    tokens=st.integers(0, 40),
    head_dim=st.one_of(st.integers(1, 130), st.sampled_from([160, 192, 256, 320, 576, 1000, 1024])),
    dtype=st.sampled_from(TORCH_DTYPES),
    preset=st.sampled_from(sorted(RESTORING)),
    exact_tokens=st.sampled_from([0, 1, 4, 100]),
    center=st.sampled_from([None, "mean"]),
    seed=st.integers(0, 2**64 - 1),
    order=st.permutations(range(2)),
)
def test_any_shape_dtype_and_stride(
    shape: list[int],
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    preset: str,
    exact_tokens: int,
    center: str | None,
    seed: int,
    order: list[int],
) -> None:
    x = gaussian(*shape, tokens, head_dim, seed=seed % 1000, dtype=dtype)
    if order != [0, 1] and len(shape) >= 1:  # as an attention module's [batch, tokens, heads, head_dim] seen transposed
        x = x.transpose(-2, -3).contiguous().transpose(-2, -3)
    options: dict[str, Any] = {"preset": preset, "seed": seed, "exact_tokens": exact_tokens, "center": center}
    data = pqcodec.encode(x, backend="reference", **options)
    y = pqcodec.decode(data, backend="cpu")
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(bits(y), bits(pqcodec.decode(data, backend="reference")))
    np.testing.assert_array_equal(bits(y[..., :exact_tokens, :].contiguous()), bits(x[..., :exact_tokens, :].contiguous()))
    if x.numel():
        most = 1 if preset == "decoquant2" else 0.75  # its three levels leave what is below half of the largest number
        assert float((x.double() - y.double()).norm()) <= most * float(x.double().norm()) + 1e-30


def test_strided_views_are_read_in_place(backend: str) -> None:
    base = gaussian(2, 50, 3, 128)
    for x in (base.transpose(1, 2), base[:, ::3], base[:, 7:20, 1:], base.transpose(1, 3), base[..., ::2]):
        data = pqcodec.encode(x, backend=backend)
        assert data == pqcodec.encode(x.contiguous(), backend=backend)


def test_a_single_vector_and_empty_tensors(backend: str) -> None:
    assert pqcodec.decode(pqcodec.encode(gaussian(64), backend=backend), backend=backend).shape == (64,)
    for shape in ((0, 64), (3, 0, 64), (0, 5, 64)):
        x = torch.empty(shape)
        assert pqcodec.decode(pqcodec.encode(x, center="mean", exact_tokens=4, backend=backend), backend=backend).shape == shape


@pytest.mark.parametrize(
    "options", [{}, {"center": "mean", "exact_tokens": 3}, {"center": "rope", "rope": Rope(), "exact_tokens": 3}]
)
def test_ranges_equal_slices_of_the_whole(options: dict[str, Any], backend: str) -> None:
    x = gaussian(2, 2, 150, 32)
    data = pqcodec.encode(x, chunk_tokens=16, backend=backend, **options)
    whole = pqcodec.decode(data, backend=backend)
    for first, last in ((0, 150), (0, 2), (1, 4), (3, 19), (17, 18), (148, 150), (60, 60)):
        part = pqcodec.decode(data, tokens=(first, last), backend=backend)
        np.testing.assert_array_equal(bits(part), bits(whole[..., first:last, :].contiguous()))
        part = pqcodec.decode(data, tokens=(first, last), leading=(1, 3), backend=backend)
        np.testing.assert_array_equal(bits(part), bits(whole.reshape(4, 150, 32)[1:3, first:last].contiguous()))


class CountingFile(io.BytesIO):
    """Remembers how many bytes were read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("head_dim", [64, 80, 100])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_large_results_wherever_they_lie_equal_small_ones(head_dim: int, dtype: torch.dtype) -> None:
    """Large ones are stored past the caches, if their rows are aligned."""
    x = gaussian(2, 4096, head_dim, dtype=dtype)
    data = pqcodec.encode(x, exact_tokens=3)
    small = torch.cat([pqcodec.decode(data, tokens=(first, first + 512)) for first in range(0, 4096, 512)], 1)
    room = torch.zeros(x.numel() + 64, dtype=dtype)
    for first in (0, 1, 8, 64):
        out = room[first:][: x.numel()].view(x.shape)
        assert pqcodec.decode(data, out=out) is out
        np.testing.assert_array_equal(bits(out), bits(small))
    wide = torch.zeros((*x.shape[:-1], head_dim + 3), dtype=dtype)
    pqcodec.decode(data, out=wide[..., :head_dim])
    np.testing.assert_array_equal(bits(wide[..., :head_dim]), bits(small))
    assert not wide[..., head_dim:].any()
    np.testing.assert_array_equal(bits(pqcodec.decode(data)), bits(small))


def test_a_token_range_reads_only_its_blocks() -> None:
    x = gaussian(4, 4096, 128, dtype=torch.float16)
    data = pqcodec.encode(x)
    file = CountingFile(data)
    part = pqcodec.decode(file, tokens=(1024, 1280))
    np.testing.assert_array_equal(bits(part), bits(pqcodec.decode(data)[:, 1024:1280].contiguous()))
    useful = 4 * 256 * 49
    assert useful <= file.count <= 1.01 * useful + 200
    file = CountingFile(data)
    pqcodec.decode(file, tokens=(1024, 1280), leading=(2, 3))
    assert file.count <= 1.01 * useful / 4 + 200


def test_zero_vectors_come_back_as_zero(backend: str) -> None:
    x = gaussian(30, 64)
    x[::3] = 0
    y = pqcodec.decode(pqcodec.encode(x, backend=backend), backend=backend)
    assert not bits(y[::3].contiguous()).any()


@pytest.mark.parametrize("preset", ["pq2", "pq3", "pq6", "paper"])
@pytest.mark.parametrize("center", [None, "mean"])
def test_extreme_magnitudes_keep_the_error(preset: str, center: str | None, backend: str) -> None:
    unit = gaussian(200, 128).clamp(-3, 3) / 3
    for dtype in TORCH_DTYPES:
        info = torch.finfo(dtype)
        for scale in (info.max, info.max / 7, info.tiny * 1e4, 1.0):
            x = (unit.double() * scale).to(dtype)
            y = pqcodec.decode(pqcodec.encode(x, preset=preset, center=center, backend=backend), backend=backend)
            assert torch.isfinite(y).all()
            assert rel_mse(x, y) < WORST_ERROR[preset], (dtype, scale)


@pytest.mark.parametrize("scale", [1e-40, 1.0, 2.0**40, 3.4e38])
def test_vectors_that_a_rotation_adds_up_to_one_number_stay_finite(scale: float, backend: str) -> None:
    """The worst that sums of one round and of both can come to: 64 and 4,096 times a coordinate."""
    first = rotation.hadamard(64) * rotation.signs(0, 64, first_round=True)
    both = rotation_matrix(64, 0, 2).astype(np.float64)
    directions = np.concatenate([first, both / np.abs(both).max(1, keepdims=True), np.ones((1, 64)), np.eye(64)])
    x = torch.from_numpy(directions * scale).float()
    y = pqcodec.decode(pqcodec.encode(x, preset="pq4", backend=backend), backend=backend)
    assert torch.isfinite(y).all()
    assert float(((x.double() - y.double()).norm(dim=1) / x.double().norm(dim=1)).max()) < 0.9


def test_a_mean_that_no_offset_reaches_is_stored_as_the_largest(backend: str) -> None:
    """Offsets end at 65504 * 2^111, half of what float32 holds."""
    x = torch.full((10, 64), torch.finfo(torch.float32).max)
    y = pqcodec.decode(pqcodec.encode(x, center="mean", backend=backend), backend=backend)
    assert rel_mse(x, y) < WORST_ERROR["pq3"]


def test_subnormals_are_as_good_as_their_own_grid(backend: str) -> None:
    for dtype, step in ((torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133), (torch.float32, 2.0**-149)):
        x = (gaussian(50, 64).double() * 20 * step).to(dtype)
        y = pqcodec.decode(pqcodec.encode(x, preset="pq4", backend=backend), backend=backend)
        error = (x.double() - y.double()) / step
        assert float((error**2).mean()) < WORST_ERROR["pq4"] * 400 + 0.5


def test_rows_of_very_different_norm_keep_their_own_error(backend: str) -> None:
    x = gaussian(256, 128).double() * torch.logspace(-36, 36, 256, dtype=torch.float64)[:, None]
    x = x.float()
    y = pqcodec.decode(pqcodec.encode(x, preset="pq3", backend=backend), backend=backend)
    error = ((x.double() - y.double()) ** 2).sum(1) / (x.double() ** 2).sum(1)
    assert float(error.max()) < 2.5 * WORST_ERROR["pq3"]


def test_nan_and_inf_are_refused_by_place(backend: str) -> None:
    x = gaussian(2, 3, 40, 64)
    x[1, 2, 17, 5] = float("inf")
    with pytest.raises(NonFiniteInput, match=r"element \[1, 2, 17, 5\] of the tensor is inf"):
        pqcodec.encode(x, backend=backend)
    y = gaussian(64)
    y[3] = float("nan")
    with pytest.raises(NonFiniteInput, match=r"element \[3\] of the tensor is nan"):
        pqcodec.encode(y, backend=backend)


@pytest.mark.parametrize("center", [None, "mean"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_nan_and_inf_are_kept_exact_when_asked(dtype: torch.dtype, center: str | None, backend: str) -> None:
    x = gaussian(3, 70, 64, dtype=dtype)
    for lead, token, value in ((0, 0, "nan"), (0, 69, "inf"), (2, 33, "-inf")):
        x[lead, token, lead] = float(value)
    data = pqcodec.encode(x, nonfinite="exact", center=center, exact_tokens=1, backend=backend)
    y = pqcodec.decode(data, backend=backend)
    for lead, token in ((0, 0), (0, 69), (2, 33)):
        np.testing.assert_array_equal(bits(x[lead, token].contiguous()), bits(y[lead, token].contiguous()))
    finite = torch.isfinite(x).all(-1)
    assert rel_mse(x[finite], y[finite]) < WORST_ERROR["pq3"]
    np.testing.assert_array_equal(
        bits(pqcodec.decode(data, tokens=(30, 40), leading=(2, 3), backend=backend)), bits(y[2:3, 30:40].contiguous())
    )


def test_centring_removes_a_bias(backend: str) -> None:
    x = gaussian(2, 256, 64)
    x[..., 7] += 100
    plain = pqcodec.decode(pqcodec.encode(x, backend=backend), backend=backend)
    centred = pqcodec.decode(pqcodec.encode(x, center="mean", backend=backend), backend=backend)
    assert rel_mse(x, centred) < rel_mse(x, plain) / 50


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [None, 32])
def test_rope_centring_finds_a_bias_that_turns(style: str, dim: int | None, backend: str) -> None:
    rope = Rope(theta=1e4, dim=dim, style=style, first_position=1000)
    turned = dim or 64
    x = gaussian(2, 300, 64).numpy()
    i = np.arange(turned // 2)
    p, q = (i, i + turned // 2) if style == "half" else (2 * i, 2 * i + 1)
    angle = np.arange(1000, 1300)[:, None] * 1e4 ** (-2 * i / turned)
    x[..., p] += 50 * np.cos(angle)
    x[..., q] += 50 * np.sin(angle)
    x = torch.from_numpy(x.astype(np.float32))
    by_mean = pqcodec.decode(pqcodec.encode(x, center="mean", backend=backend), backend=backend)
    by_rope = pqcodec.decode(pqcodec.encode(x, center="rope", rope=rope, backend=backend), backend=backend)
    noise = gaussian(2, 300, 64)
    assert float(((x - by_rope) ** 2).sum()) < 1.2 * WORST_ERROR["pq3"] * float((noise**2).sum())
    assert rel_mse(x, by_rope) < rel_mse(x, by_mean) / 20


@pytest.mark.parametrize("way", [*BACKENDS, pytest.param("triton", marks=needs_triton)])
def test_a_stream_takes_the_means_of_another(way: str) -> None:
    """What goes on where another stream ends is centred as that one is: the two are one stream."""
    x = gaussian(2, 96, 64) + gaussian(2, 1, 64, seed=1)
    options = {"preset": "quad3", "center": "mean", "chunk_tokens": 32}
    first = pqcodec.encode(x[:, :64], backend="reference", **options)
    header = codec.read_header(source_of(first))
    means = centre.stored_means(source_of(first), header)
    assert means is not None
    if way == "triton":
        batch = pqcodec.EncodeBatch([x[:, 64:].to(DEVICE)], means=means, backend=way, **options)
        stream = batch.run()[0].cpu().numpy().tobytes()
    else:
        stream = codec.encode_by(EncodeOptions(**options), x[:, 64:], way, means=means)[1]
    assert (codec.means(stream) == codec.means(first)).all()
    assert pqcodec.verify(stream) == []
    rest = codec.read_header(source_of(stream)).payload_start
    whole = header.with_tokens(96).to_bytes() + first[header.header_bytes :] + stream[rest:]
    pieces = [pqcodec.decode(data) for data in (first, stream)]
    assert (bits(pqcodec.decode(whole)) == bits(torch.cat(pieces, 1))).all()
    assert rel_mse(x, torch.cat(pieces, 1)) < 0.03
    wrong: list[tuple[str, Any, str | None]] = [
        ("not centred", means, None),
        ("float16 .1, 64. times", (means[0][:1], means[1]), "mean"),
        ("means are float32", (means[0].astype(np.float32), means[1]), "mean"),
        ("times 2.500", (means[0], 500), "mean"),
    ]
    for words, bad, center in wrong:
        with pytest.raises(InvalidArgument, match=words):
            codec.encode_by(EncodeOptions(center=center), x.to(DEVICE) if way == "triton" else x, way, means=bad)


def test_rope_frequencies_may_be_given(backend: str) -> None:
    x = gaussian(1, 40, 32)
    by_theta = pqcodec.encode(x, center="rope", rope=Rope(theta=500.0), backend=backend)
    frequencies = [500.0 ** (-2 * i / 32) for i in range(16)]
    assert by_theta == pqcodec.encode(x, center="rope", rope=Rope(frequencies=frequencies), backend=backend)


def test_streams_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(3, 500, 128)
    monkeypatch.setenv("PQCODEC_THREADS", "1")
    one = pqcodec.encode(x)
    monkeypatch.setenv("PQCODEC_THREADS", "5")
    assert pqcodec.encode(x) == one


def test_seeds_differ_and_are_kept() -> None:
    x = gaussian(10, 64)
    streams = [pqcodec.encode(x, seed=seed, backend="reference") for seed in (0, 1, 2**64 - 1)]
    assert len(set(streams)) == 3
    assert [pqcodec.inspect(data).seed for data in streams] == [0, 1, 2**64 - 1]


def test_inspect_tells_what_was_asked_for() -> None:
    info = pqcodec.inspect(
        pqcodec.encode(gaussian(2, 20, 80), preset="pq2.5", center="mean", exact_tokens=4, backend="reference")
    )
    assert (info.preset, info.shape, info.dtype, info.centered, info.exact_tokens) == (
        "pq2.5",
        (2, 20, 80),
        "float32",
        "mean",
        4,
    )
    assert info.header_bytes + info.side_bytes + info.payload_bytes == info.stream_bytes


def test_progress_reaches_the_end(backend: str) -> None:
    seen: list[tuple[int, int]] = []
    pqcodec.encode(gaussian(3, 200, 32), backend=backend, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


def test_an_interrupt_reaches_the_caller(backend: str) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pqcodec.encode(gaussian(3, 200, 32), backend=backend, progress=interrupt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "pq9"}, "preset 'pq9' is unknown; choose from pq2"),
        ({"preset": ("pq4", "pq3")}, "one is expected here; save_cache and EncodedCache take a pair"),
        ({"center": "median"}, "choose None, 'mean' or 'rope'"),
        ({"center": "rope"}, "go together"),
        ({"rope": Rope()}, "go together"),
        ({"center": "rope", "rope": Rope(dim=100)}, "turns 100 channels"),
        ({"center": "rope", "rope": Rope(style="spiral")}, "rope.style 'spiral' is unknown"),
        ({"exact_tokens": -1}, "exact_tokens -1"),
        ({"chunk_tokens": 0}, "chunk_tokens 0"),
        ({"seed": -1}, "seed -1"),
        ({"nonfinite": "zero"}, "nonfinite 'zero' is unknown"),
        ({"backend": "abacus"}, "backend 'abacus' is unknown; choose from"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message.replace("(", r"\(")):
        pqcodec.encode(gaussian(4, 64), **({"backend": "reference"} | change))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, 2.0], "not list"),
        (torch.zeros(4, 64, dtype=torch.float64), "float64"),
        (np.zeros((4, 64), np.int32), "int32"),
        (torch.zeros(4, 1025), "head_dim 1025"),
        (torch.zeros(4, 0), "head_dim 0"),
        (torch.zeros(()), "dimensions"),
    ],
)
def test_wrong_tensors_are_named(x: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        pqcodec.encode(x, backend="reference")


def test_tensors_of_other_devices_are_refused() -> None:
    x = torch.empty(4, 64, device="meta")
    with pytest.raises(pqcodec.BackendUnavailable, match="device 'meta': no backend codes tensors there; choose a device of"):
        pqcodec.encode(x)
    with pytest.raises(InvalidArgument, match=r"is on 'meta'.*pass x.cpu"):
        pqcodec.encode(x, backend="reference")


def test_ranges_outside_the_tensor_are_refused() -> None:
    data = pqcodec.encode(gaussian(4, 64), backend="reference")
    for tokens in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(InvalidArgument, match="tokens"):
            pqcodec.decode(data, tokens=tokens, backend="reference")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")
def test_a_forked_child_decodes() -> None:
    """The threads that the parent keeps are not the child's."""
    x = gaussian(4, 512, 64)
    stream = pqcodec.encode(x, backend="cpu")
    expected = bits(pqcodec.decode(stream, backend="cpu"))
    child = os.fork()
    if child == 0:
        ok = False
        try:
            ok = np.array_equal(bits(pqcodec.decode(pqcodec.encode(x, backend="cpu"), backend="cpu")), expected)
        finally:
            os._exit(0 if ok else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (done, os.waitstatus_to_exitcode(status)) == (child, 0)


def test_an_interrupt_leaves_threads_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQCODEC_THREADS", "3")
    x = gaussian(4, 4096, 64)

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pqcodec.encode(x, backend="cpu", progress=interrupted)
    stream = pqcodec.encode(x, backend="cpu")
    assert rel_mse(x, pqcodec.decode(stream, backend="cpu")) < 0.04
