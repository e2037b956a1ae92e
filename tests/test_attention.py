"""Attention straight from streams, against decoding first: every mask, stage, coding and shape, damage, and wrong arguments."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS

import pqcodec
from pqcodec import attention
from pqcodec.errors import BackendUnavailable, CorruptStream, InvalidArgument, TruncatedStream
from pqcodec.kernels.attention import Partial, merged
from pqcodec.stream.header import read_header
from pqcodec.stream.source import source_of

FIXTURE = "tests/data/smollm2_kv.safetensors"
PRESETS = (
    *("quad2", "quad2.25", "quad2.5", "quad2.75", "quad3", "quad3.25", "quad3.5", "pq2", "pq3", "pq6", "paper"),
    *("wu44", "wu33", "kivi2-key", "int4", "q8_0"),
)
STAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean": {"center": "mean"},
    "rope": {"center": "rope", "rope": pqcodec.Rope(10000.0, first_position=1000)},
    "interleaved": {"center": "rope", "rope": pqcodec.Rope(500.0, dim=32, style="interleaved")},
    "exact": {"center": "mean", "exact_tokens": 4, "exact_vectors": [(0, 17), (1, 140), (1, 2)]},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kv(*shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with strong channels and a mean, and values."""
    keys, values = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    keys[..., 3] *= 12
    keys[..., shape[-1] // 2] += 8
    return keys, values + 0.5


def dense(
    q: Any,
    keys: Any,
    values: Any,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> torch.Tensor:
    """Attention in float64, as its formula: q [..., q_heads, queries, d], keys and values [..., kv_heads, tokens, d]."""
    q, keys, values = (torch.as_tensor(x).double() for x in (q, keys, values))
    keys, values = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (keys, values))
    found = q @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        found = softcap * torch.tanh(found / softcap)
    tokens = torch.arange(keys.shape[-2])
    own = keys.shape[-2] - q.shape[-2] + torch.arange(q.shape[-2])[:, None]
    hidden = (tokens > own) if causal else torch.zeros(q.shape[-2], keys.shape[-2], dtype=torch.bool)
    if window:
        hidden = hidden | (tokens <= own - window)
    return torch.softmax(found.masked_fill(hidden, -torch.inf), -1) @ values


def close(found: Any, expected: Any, most: float = 1e-5) -> None:
    """Within ``most`` of the largest number."""
    found, expected = (torch.as_tensor(x).double() for x in (found, expected))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= most * float(expected.abs().max())


def encoded(x: Any, **options: Any) -> tuple[bytes, Any]:
    """A stream, and what it decodes to where nothing is rounded to a 16-bit dtype."""
    data = pqcodec.encode(x, **options)
    return data, pqcodec.decode(pqcodec.encode(x.float(), **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [128, 64])
def test_every_preset(preset: str, head_dim: int, backend: str) -> None:
    keys, values = kv(2, 150, head_dim)
    (k, keys), (v, values) = encoded(keys, preset=preset, center="mean"), encoded(values, preset=preset)
    q = normal(8, 1, head_dim)
    close(attention.attend(q, k, v, backend=backend), dense(q, keys, values))
    found = attention.scores(k, q, scale=0.3, backend=backend)
    close(found, q.double() @ keys.double().repeat_interleave(4, 0).mT * 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", ["quad3", "pq3", "wu44", "int4"])
def test_every_stage_of_keys_and_of_values(preset: str, stage: str, backend: str, token_by_token: None) -> None:
    keys, values = kv(2, 150, 64)
    for of_keys, of_values in ((STAGES[stage], {}), ({"center": "mean"}, STAGES[stage])):
        k, decoded_k = encoded(keys, preset=preset, **of_keys)
        v, decoded_v = encoded(values, preset=preset, **of_values)
        q = normal(4, 3, 64)
        close(attention.attend(q, k, v, backend=backend), dense(q, decoded_k, decoded_v))
        close(attention.scores(k, q, backend=backend), q.double() @ decoded_k.double().repeat_interleave(2, 0).mT / 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["quad2.75", "paper", "wu33", "kivi4-key"])
@pytest.mark.parametrize("head_dim", [16, 40, 80, 96, 100, 160, 256, 576])
def test_every_order_of_the_rotation(head_dim: int, preset: str, backend: str) -> None:
    keys, values = kv(2, 70, head_dim)
    (k, keys), (v, values) = encoded(keys, preset=preset, center="mean"), encoded(values, preset=preset)
    q = normal(4, 2, head_dim)
    close(attention.attend(q, k, v, backend=backend), dense(q, keys, values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype: torch.dtype, backend: str) -> None:
    """The result has the queries' dtype; in between nothing is rounded, so only float16 comes as near to what decode gives."""
    keys, values = (x.to(dtype) for x in kv(2, 200, 64))
    (k, exactly_k), (v, exactly_v) = encoded(keys, preset="quad3", exact_tokens=4), encoded(values, preset="quad3")
    q = normal(4, 1, 64, dtype=dtype)
    found = attention.attend(q, k, v, backend=backend)
    assert found.dtype == dtype
    close(found, dense(q, exactly_k, exactly_v), {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype])
    close(attention.attend(q.float(), k, v, backend=backend), dense(q, exactly_k, exactly_v))
    if dtype == torch.float16:
        close(attention.attend(q.float(), k, v, backend=backend), dense(q, pqcodec.decode(k), pqcodec.decode(v)), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (2, 8), (1, 8), (2, 12)])
@pytest.mark.parametrize("queries", [1, 5])
def test_groups_of_heads_and_blocks_of_queries(heads: tuple[int, int], queries: int, backend: str) -> None:
    keys, values = kv(2, heads[0], 130, 64)
    (k, keys), (v, values) = encoded(keys, preset="quad3"), encoded(values, preset="quad3", center="mean")
    q = normal(2, heads[1], queries, 64)
    for causal in (True, False):
        close(attention.attend(q, k, v, causal=causal, backend=backend), dense(q, keys, values, causal=causal))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_chunks_ranges_windows_and_exact_tokens_around(chunk_tokens: int, backend: str, token_by_token: None) -> None:
    """Keys and values may be cut into other chunks, and a range may begin and end anywhere."""
    keys, values = kv(2, 200, 64)
    k, decoded_k = encoded(keys, preset="quad3", chunk_tokens=chunk_tokens, **STAGES["rope"])
    v, decoded_v = encoded(values, preset="quad2", chunk_tokens=50, exact_tokens=9)
    first, recent = kv(2, 3, 64, seed=7), kv(2, 11, 64, seed=9)
    q = normal(4, 3, 64)
    for tokens in ((0, 200), (5, 6), (63, 129), (199, 200), (17, 17), (0, 0)):
        whole = [
            torch.cat([a, x[:, slice(*tokens)], b], 1) for a, x, b in zip(first, (decoded_k, decoded_v), recent, strict=True)
        ]
        for options in ({}, {"window": 5}, {"window": 40, "softcap": 2.0}, {"scale": 0.5, "causal": False}):
            found = attention.attend(q, k, v, tokens=tokens, first=first, recent=recent, backend=backend, **options)
            close(found, dense(q, *whole, **options))
    found = attention.scores(k, q, tokens=(63, 129), recent=recent[0], softcap=3.0, backend=backend)
    exactly = q.double() @ torch.cat([decoded_k[:, 63:129], recent[0]], 1).double().repeat_interleave(2, 0).mT / 8
    close(found, 3 * torch.tanh(exactly / 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_that_follow_each_other(backend: str) -> None:
    keys, values = kv(2, 200, 64)
    cuts = [slice(0, 90), slice(90, 91), slice(91, 200)]
    k, v = (
        [encoded(x[:, cut], preset=p) for cut, p in zip(cuts, ("quad3", "pq4", "quad2"), strict=True)] for x in (keys, values)
    )
    q = normal(2, 2, 64)
    for tokens in ((0, 200), (60, 120), (90, 91)):
        whole = [torch.cat([x for _, x in streams], 1)[:, slice(*tokens)] for streams in (k, v)]
        if tokens[1] - tokens[0] > 1:
            found = attention.attend(q, [s for s, _ in k], [s for s, _ in v], tokens=tokens, backend=backend)
            close(found, dense(q, *whole))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recorded_cache(backend: str, token_by_token: None) -> None:
    """SmolLM2's keys and values, with their outlier channels, as they are kept: turned by RoPE, centred, four exact tokens."""
    from safetensors.torch import load_file

    state = load_file(FIXTURE)
    names = sorted(name for name in state if "key" in name)
    assert names
    for name in names:
        keys, values = state[name], state[name.replace("key", "value")]
        options = {"center": "rope", "rope": pqcodec.Rope(100000.0), "exact_tokens": 4, "preset": "quad3"}
        (k, decoded_k), (v, decoded_v) = encoded(keys, **options), encoded(values, preset="quad3")
        q = keys.float()[..., -1:, :].repeat_interleave(3, -3) * 2
        close(attention.attend(q, k, v, backend=backend), dense(q, decoded_k, decoded_v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_with_nan_or_inf_do_what_they_do_in_softmax(backend: str) -> None:
    keys, values = kv(1, 100, 64)
    for x, token, number in ((keys, 30, np.nan), (keys, 60, -np.inf), (values, 80, np.inf), (values, 90, np.nan)):
        bad = [keys.clone(), values.clone()]
        bad[x is values][0, token, 5] = number
        k, v = (pqcodec.encode(each, preset="quad3", nonfinite="exact") for each in bad)
        q = normal(2, 1, 64).abs()
        expected = dense(q, pqcodec.decode(k), pqcodec.decode(v))
        found = attention.attend(q, k, v, backend=backend)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        for tokens in ((0, token), (token + 1, 100)):  # what is not seen does nothing
            assert torch.isfinite(attention.attend(q, k, v, tokens=tokens, backend=backend)).all()
        assert torch.isfinite(attention.attend(q, k, v, window=100 - token - 1, backend=backend)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softcap_bounds_what_is_infinite_and_changes_no_score_far_below_it(backend: str) -> None:
    """Where 1 - exp(-2x) would lose all digits; -Inf becomes -softcap, and is no unseen token."""
    keys, values = kv(1, 100, 64)
    (k, decoded_k), (v, decoded_v) = encoded(keys, preset="quad3"), encoded(values, preset="quad3")
    q = normal(2, 1, 64)
    for softcap in (1e-30, 1e-3, 0.2, 1.0, 30.0, 1e4, 1e6, 1e20, 3e38):
        found = attention.attend(q, k, v, softcap=softcap, backend=backend)
        close(found, dense(q, decoded_k, decoded_v, softcap=softcap))
    keys[0, 30, 5], keys[0, 60, 5] = np.inf, -np.inf
    k = pqcodec.encode(keys, preset="quad3", nonfinite="exact")
    found = attention.attend(q.abs(), k, v, softcap=0.5, backend=backend)
    close(found, dense(q.abs(), pqcodec.decode(k), decoded_v, softcap=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_whose_scores_are_all_minus_inf_has_no_weight(backend: str) -> None:
    keys, values = kv(1, 20, 64)
    (k, decoded_k), (v, decoded_v) = encoded(keys, preset="quad3"), encoded(values, preset="quad3")
    nothing = torch.full((1, 2, 64), -np.inf)
    q = normal(2, 1, 64).abs()
    found = attention.attend(q, k, v, recent=(nothing, nothing.abs().clamp(max=1)), backend=backend)
    close(found, dense(q, decoded_k, decoded_v))
    assert torch.isnan(attention.attend(q, k, v, tokens=(0, 0), recent=(nothing, values[:, :2]), backend=backend)).all()


def test_a_scale_of_every_size() -> None:
    """Queries times a scale beyond float32 are in its range."""
    keys, values = kv(1, 20, 64)
    (k, decoded_k), (v, decoded_v) = encoded(keys), encoded(values)
    q = normal(2, 1, 64)
    for scale in (1e-45, 0.0, -0.1):
        close(attention.attend(q, k, v, scale=scale), dense(q, decoded_k, decoded_v, scale=scale))
    close(attention.attend(q * 1e-30, k, v, scale=1e29), dense(q, decoded_k, decoded_v, scale=0.1))
    close(attention.attend(q * 1e-38, k, v, scale=1e39), dense(q * 1e-38, decoded_k, decoded_v, scale=1e39))
    assert torch.equal(attention.attend(q, k, v, window=1 << 70), attention.attend(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["quad3", "pq3", "paper"])
def test_scores_of_every_size(preset: str, backend: str) -> None:
    """One key far above all others, scores that differ in nothing, a single token, and numbers near the ends of float32."""
    keys, values = kv(1, 100, 64)
    for power in (-120, -60, -20, 20, 60, 100):
        big = keys * 2.0**power
        (k, decoded_k), (v, decoded_v) = encoded(big, preset=preset), encoded(values, preset=preset)
        for scale in (None, 1e-3 * 2.0**-power):
            q = normal(2, 1, 64)
            close(attention.attend(q, k, v, scale=scale, backend=backend), dense(q, decoded_k, decoded_v, scale=scale))
        (v, decoded_v), q = encoded(values * 2.0**power, preset=preset), normal(2, 1, 64) * 2.0**-power
        close(attention.attend(q, k, v, backend=backend), dense(q, decoded_k, decoded_v))
    same = torch.ones(1, 100, 64)
    (k, decoded_k), (v, decoded_v) = encoded(same, preset=preset), encoded(values, preset=preset)
    close(attention.attend(same[:, :1], k, v, backend=backend), decoded_v.double().mean(1, keepdim=True))
    (k, decoded_k), (v, decoded_v) = encoded(torch.zeros(1, 100, 64), preset=preset), encoded(torch.zeros(1, 100, 64))
    assert not attention.attend(same[:, :1], k, v, backend=backend).any()
    k, v = (pqcodec.encode(x[:, :1], preset=preset) for x in (keys, values))
    close(attention.attend(normal(1, 1, 64), k, v, backend=backend), pqcodec.decode(v))
    beyond = pqcodec.encode(torch.full((1, 10, 64), 3e38), preset=preset)
    assert torch.isnan(attention.attend(normal(1, 1, 64).abs() * 1e30, beyond, beyond)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_from_run_to_run_and_for_any_number_of_threads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = kv(3, 3000 if backend == "cpu" else 100, 64)
    k, v = (pqcodec.encode(x, preset="quad3", center="mean") for x in (keys, values))
    q = normal(6, 2, 64)
    found = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("PQCODEC_THREADS", threads)
        found += [attention.attend(q, k, v, backend=backend) for _ in range(2)]
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_in_numpy_out_and_every_place(backend: str, tmp_path: Any) -> None:
    keys, values = (x.numpy() for x in kv(2, 100, 64))
    k, v = (pqcodec.encode(x, preset="quad3") for x in (keys, values))
    q = normal(2, 1, 64).numpy()
    found = attention.attend(q, k, v, backend=backend)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert attention.attend(q.astype(np.float16), k, v, backend=backend).dtype == np.float16
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (k, v)]
    np.testing.assert_array_equal(found, attention.attend(q, *tensors, backend=backend))
    (tmp_path / "k").write_bytes(k)
    (tmp_path / "v").write_bytes(v)
    with open(tmp_path / "k", "rb") as one, open(tmp_path / "v", "rb") as two:
        np.testing.assert_array_equal(found, attention.attend(q, one, two, backend=backend))
    with open(tmp_path / "k", "rb") as one, mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        np.testing.assert_array_equal(found, attention.attend(q, mapped, memoryview(v), backend=backend))
    turned = np.ascontiguousarray(q.swapaxes(0, 1)).swapaxes(0, 1)
    np.testing.assert_array_equal(found, attention.attend(turned, k, v, backend=backend))


def test_files_are_read_some_blocks_at_a_time(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_READ_BYTES", 1 << 12)
    (k, keys), (v, values) = (encoded(x, preset="quad3", exact_tokens=4) for x in kv(2, 500, 64))
    (tmp_path / "k").write_bytes(k)
    q = normal(2, 3, 64)
    with open(tmp_path / "k", "rb") as file:
        close(attention.attend(q, file, v), dense(q, keys, values))
        file.seek(0)
        close(attention.scores(file, q), q.double() @ keys.double().mT / 8)


def test_a_chunk_larger_than_a_read_is_read_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_READ_BYTES", 1 << 12)
    (k, keys), (v, values) = (encoded(x, preset="quad3", chunk_tokens=256) for x in kv(2, 500, 64))
    jobs = []
    real = attention._Asked._job
    monkeypatch.setattr(attention._Asked, "_job", lambda *arguments: jobs.append(1) or real(*arguments))
    q = normal(2, 3, 64)
    (tmp_path / "k").write_bytes(k)
    with open(tmp_path / "k", "rb") as file:
        close(attention.attend(q, file, v), dense(q, keys, values))
    assert len(jobs) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["quad3", "pq3"])
def test_damage_raises_and_never_a_number(preset: str, backend: str) -> None:
    keys, values = kv(2, 200, 64)
    options = {"preset": preset, "center": "mean", "exact_tokens": 4, "exact_vectors": [(0, 50)]}
    k, v = (pqcodec.encode(x, **options) for x in (keys, values))
    q = normal(4, 1, 64)
    header = read_header(source_of(k))
    places = [at for place in header.places.values() if place.entries for at in (place.start, place.end - 1)]
    ends = [(header.blocks.place(*block), header.blocks.size(block[0])) for block in np.ndindex(4, 2)]
    places += [start + at for start, size in ends for at in (0, size // 2, size - 1)]
    for at in places:
        bad = bytearray(k)
        bad[at] ^= 16
        for arguments in ((q, bad, v), (q, k, bytearray(v[:at]) + bytes([v[at] ^ 16]) + v[at + 1 :])):
            with pytest.raises(CorruptStream, match="does not hold"):
                attention.attend(*arguments, backend=backend)
        with pytest.raises(CorruptStream, match="does not hold"):
            attention.scores(bad, q, backend=backend)
    bad = bytearray(k)
    bad[header.blocks.place(3, 1) + 3] ^= 1
    attention.attend(q, bad, v, tokens=(0, 100), backend=backend)  # as ``decode``, other blocks are not read
    attention.attend(q, bad, v, check=False, backend=backend)
    with pytest.raises(TruncatedStream):
        attention.attend(q, k[:-1], v, backend=backend)


def test_wrong_arguments_are_named() -> None:
    keys, values = kv(2, 20, 64)
    k, v = (pqcodec.encode(x, preset="quad3") for x in (keys, values))
    q = normal(4, 1, 64)
    short, wide, flat = (pqcodec.encode(x) for x in (keys[:, :9], normal(2, 20, 32), keys[0]))

    def refused(match: str, *arguments: Any, error: type[Exception] = InvalidArgument, **options: Any) -> None:
        with pytest.raises(error, match=match):
            attention.attend(*arguments, **options)

    refused("does not go with keys", normal(4, 1, 32), k, v)
    refused("does not go with keys", normal(4, 64), k, v)
    refused("does not go with keys", normal(3, 4, 1, 64), k, v)
    refused("no multiple of 2 heads", normal(3, 1, 64), k, v)
    refused("do not go with keys", q, k, short)
    refused("do not go with keys", q, short, v)
    refused("are expected, alike but", q, flat, flat)
    refused("are expected, alike but", q, [k, wide], [v, v])
    refused("1 streams of keys and 2 of values", q, k, [v, v])
    refused("empty list", q, [], [])
    refused("outside 0 .. 20", q, k, v, tokens=(3, 21))
    refused("no token to attend to", q, k, v, tokens=(3, 3))
    refused("2 queries stand at the end of 1 tokens", normal(4, 2, 64), k, v, tokens=(3, 4))
    refused("window 0", q, k, v, window=0)
    refused("window 2.0", q, k, v, window=2.0)
    refused("scale nan", q, k, v, scale=np.nan)
    refused("scale '1'", q, k, v, scale="1")
    refused("softcap 0", q, k, v, softcap=0)
    for softcap in (1e-50, 1e39):  # float32 would make them 0 and Inf
        refused("softcap .* outside", q, k, v, softcap=softcap)
    refused("scale 1000", q, k, v, scale=10**400)
    refused("do not lie side by side", q, memoryview(k + b" ")[::2], v)
    refused("do not lie side by side", q, np.frombuffer(k, np.uint8)[::-1], v)
    refused("a pair of tensors", q, k, v, recent=keys)
    refused("recent keys", q, k, v, recent=(keys[:1], values[:1]))
    refused("2 tokens of keys, 3 of values", q, k, v, first=(keys[:, :2], values[:, :3]))
    refused("bytes or a seekable", q, 5, v)
    refused("a contiguous uint8 tensor", q, keys, v)
    refused("a contiguous uint8 tensor", q, torch.zeros(500, dtype=torch.uint8)[::2], v)
    refused("a torch.Tensor or numpy.ndarray", [1.0], k, v)
    refused("dtype", q.double(), k, v)
    refused("'nothing' is unknown", q, k, v, error=BackendUnavailable, backend="nothing")
    refused("takes tensors of torch", q.numpy(), k, v, backend="triton")
    refused("magic", q, b"no stream" * 20, v, error=CorruptStream)
    with pytest.raises(InvalidArgument, match="does not go with keys"):
        attention.scores(k, normal(4, 1, 32))


def test_nothing_to_do() -> None:
    keys, values = kv(2, 20, 64)
    k, v = (pqcodec.encode(x, preset="quad3") for x in (keys, values))
    assert attention.attend(normal(4, 0, 64), k, v).shape == (4, 0, 64)
    assert attention.scores(k, normal(4, 0, 64)).shape == (4, 0, 20)
    assert attention.scores(k, normal(4, 2, 64), tokens=(7, 7)).shape == (4, 2, 0)
    none = pqcodec.encode(normal(0, 20, 64), preset="quad3")
    assert attention.attend(normal(0, 1, 64), none, none).shape == (0, 1, 64)
    empty = pqcodec.encode(normal(2, 0, 64), preset="quad3")
    q = normal(4, 2, 64)
    close(attention.attend(q, empty, empty, recent=(keys, values)), dense(q, keys, values))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_parts_merge_to_the_whole(kind: Any) -> None:
    """Also a part that nothing of is seen, and one that far larger scores make vanish."""
    rng = np.random.default_rng(0)
    found, values = rng.standard_normal((2, 3, 40)) * 30, rng.standard_normal((2, 40, 8))
    found[..., 20:] += 900

    def part(tokens: slice) -> Partial:
        scores = found[..., tokens]
        maximum = scores.max(-1, initial=-np.inf)
        weights = np.exp(scores - maximum[..., None])
        return Partial(*map(kind, (weights @ values[:, tokens], maximum, weights.sum(-1))))

    parts = [part(slice(*ends)) for ends in ((0, 0), (0, 20), (20, 21), (21, 40), (40, 40))]
    for several in (parts, parts[::-1]):
        assert merged(several).result().shape == (2, 3, 8)
        np.testing.assert_allclose(np.asarray(merged(several).result()), np.asarray(part(slice(0, 40)).result()), rtol=1e-12)
