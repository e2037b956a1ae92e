"""Attention to codes by Triton's kernels gives what attention to decoded numbers gives: every coding, dtype and shape.

Without a GPU they run in Triton's interpreter, on small shapes. ``test_attend_batch`` has the arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE, GPU, gaussian, needs_cuda, needs_gpu, needs_triton
from safetensors.torch import load_file

import pqcodec
from pqcodec import AttendBatch, Rope
from pqcodec.attention import attend, scores

pytestmark = needs_triton
FIXTURE = Path(__file__).parent / "data" / "smollm2_kv.safetensors"
PRESETS = ["pq2", "pq4", "paper", "quad2.25", "quad3"]
TOLERANCE = 5e-5  # of the largest number: that of sums in float32, and of scores of some tens
TOKENS, HEADS = (1000, 4) if GPU else (40, 1)
OPTIONS: dict[str, Any] = {"backend": "cpu", "exact_tokens": 2, "chunk_tokens": 24}


def on_device(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE)


def decoded(data: bytes) -> torch.Tensor:
    return pqcodec.decode(data, backend="cpu").double()


def softmax_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Attention of queries [q_heads, queries, head_dim] at the end of keys and values [heads, tokens, head_dim]: float64."""
    group = len(q) // len(k)
    found = q.double() @ k.repeat_interleave(group, 0).mT / q.shape[-1] ** 0.5
    own = k.shape[1] - q.shape[1] + torch.arange(q.shape[1])[:, None]
    token = torch.arange(k.shape[1])
    seen = (token <= own) & (token > own - (window or len(token)))
    return found.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 0)


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error, of the largest number."""
    return float((found.cpu().double() - wanted).abs().max() / wanted.abs().max())


def streams_of(preset: str, dim: int, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[bytes, bytes]:
    """Keys that are centred under RoPE, and values."""
    k, v = (gaussian(HEADS, tokens, dim, seed=i).add(gaussian(HEADS, 1, dim, seed=5) * 2).to(dtype) for i in range(2))
    turn = {"center": "rope", "rope": Rope(theta=1e4, style="interleaved")}
    return pqcodec.encode(k, preset=preset, **turn, **OPTIONS), pqcodec.encode(v, preset=preset, center="mean", **OPTIONS)


@pytest.mark.parametrize("dim", [16, 64, 80, 112, 128, 192, 256] if GPU else [48])
@pytest.mark.parametrize("preset", [*PRESETS, "pq3", "pq6", "quad2", "quad3.5"] if GPU else PRESETS)
def test_every_coding_agrees_with_decoded_numbers(preset: str, dim: int, token_by_token: None) -> None:
    keys, values = streams_of(preset, dim)
    q = gaussian(HEADS * 4, 1, dim, seed=7).bfloat16().float()
    batch = AttendBatch(q[None].to(DEVICE), [on_device(keys)], [on_device(values)], backend="triton")
    assert batch.reader == "triton"
    first = batch.run().clone()
    assert error_of(first[0], softmax_of(q, decoded(keys), decoded(values))) <= TOLERANCE
    assert torch.equal(batch.run(), first)


SHARING = [("wu44", "int4"), ("wu35", "wu24"), ("kivi4-key", "q8_0"), ("nuq3-key", "q4_0")]  # presets of keys, and of values


@pytest.mark.parametrize("dim", [20, 128, 256] if GPU else [20])
@pytest.mark.parametrize("presets", [*SHARING, ("wu33", "kivi2-key"), ("quad3", "nuq4")] if GPU else SHARING[:3], ids=str)
def test_codes_that_share_fields_agree_with_decoded_numbers(presets: tuple[str, str], dim: int) -> None:
    """Scores of groups of tokens and of tiles that begin within one; values whose fields each row reads for itself."""
    tokens = 700 if GPU else 140
    k, v = (gaussian(HEADS, tokens, dim, seed=i).add(gaussian(HEADS, 1, dim, seed=5)) for i in range(2))
    keys_with, values_with = ({"preset": name, "backend": "cpu", "exact_tokens": 3} for name in presets)
    if "nuq" not in presets[0]:
        keys_with |= {"center": "rope", "rope": Rope(theta=1e4, style="interleaved")}
    keys, values = pqcodec.encode(k, **keys_with), pqcodec.encode(v, **values_with)
    q = gaussian(HEADS * 4, 1, dim, seed=7)
    got = attend(q.to(DEVICE), on_device(keys), on_device(values), backend="triton")
    assert error_of(got, softmax_of(q, decoded(keys), decoded(values))) <= TOLERANCE
    for first in (0, 50):
        found = scores(on_device(keys), q.to(DEVICE), tokens=(first, tokens), backend="triton")
        wanted = q.double() @ decoded(keys)[:, first:].mT.repeat_interleave(4, 0) / dim**0.5
        assert error_of(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_codes_in_float16_are_good_to_its_digits(dtype: torch.dtype) -> None:
    """Of tensors of 16 bits units are rounded to float16, whatever their size."""
    heads, tokens, dim = (8, 1000, 128) if GPU else (1, 20, 16)
    for scale in (1e-3, 1e3):
        keys = pqcodec.encode((gaussian(heads, tokens, dim) * scale).to(dtype), preset="wu44", backend="cpu")
        numbers = pqcodec.decode(keys, backend="cpu").double()
        q = gaussian(heads * 4, 1, dim, seed=7).to(dtype)
        found = scores(on_device(keys), q.to(DEVICE), backend="triton")
        wanted = q.double() @ numbers.mT.repeat_interleave(4, 0) / dim**0.5
        assert error_of(found, wanted) <= (1e-3 if dtype == torch.float16 else 5e-3)  # decoded numbers are rounded to bfloat16


@pytest.mark.parametrize("dim", [64, 128, 256] if GPU else [32])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 1.5e-3), (torch.bfloat16, 5e-3)], ids=str)
def test_every_dtype_agrees_with_decoded_numbers(dtype: torch.dtype, rounding: float, dim: int) -> None:
    keys, values = streams_of("pq3", dim, dtype)
    q = gaussian(HEADS * 2, 1, dim, seed=7).to(dtype)
    got = attend(q.to(DEVICE), on_device(keys), on_device(values), backend="triton")
    assert got.dtype == dtype
    assert error_of(got[None], softmax_of(q, decoded(keys), decoded(values))) <= rounding


@pytest.mark.parametrize("window", [None, 7])
def test_more_rows_than_a_program_takes_agree_with_decoded_numbers(window: int | None, token_by_token: None) -> None:
    """Rows are query heads of a head of keys, times queries."""
    keys, values = streams_of("quad3", 64)
    q = gaussian(HEADS * 7, 5, 64, seed=7)
    got = attend(q.to(DEVICE), on_device(keys), on_device(values), window=window, backend="triton")
    assert error_of(got, softmax_of(q, decoded(keys), decoded(values), window)) <= TOLERANCE


@pytest.mark.parametrize("layer", [0, 29])
@pytest.mark.parametrize("preset", ["pq3", "paper", "quad3"])
def test_a_real_models_keys_and_values_agree_with_decoded_numbers(preset: str, layer: int, token_by_token: None) -> None:
    """SmolLM2's, whose keys have outliers; the queries are its last keys."""
    tensors = load_file(FIXTURE)
    k, v = (tensors[f"layers.{layer}.{name}"][0][:, : None if GPU else 50].float() for name in ("key", "value"))
    turn = {"center": "rope", "rope": Rope(theta=100000.0)}
    keys, values = pqcodec.encode(k, preset=preset, **turn, **OPTIONS), pqcodec.encode(v, preset=preset, **OPTIONS)
    q = k[:, -1:].bfloat16().float().repeat_interleave(3, 0)
    got = attend(q.to(DEVICE), on_device(keys), on_device(values), backend="triton")
    assert error_of(got, softmax_of(q, decoded(keys), decoded(values))) <= TOLERANCE
    found = scores(on_device(keys), q.to(DEVICE), backend="triton")
    assert error_of(found, q.double() @ decoded(keys).repeat_interleave(3, 0).mT / 8) <= TOLERANCE


def test_values_of_very_different_sizes_keep_their_digits() -> None:
    """Of a token with a large value and next to no weight, and of one with all the weight and a small value."""
    k, v = torch.zeros(1, 17, 16), torch.zeros(1, 17, 16)
    k[0, 16, 0], v[0, 16], v[0, 3] = 4 * 18.0, 1e-6, 1.0  # weights 1 and exp(-18)
    keys, values = (pqcodec.encode(x, preset="pq6", backend="cpu") for x in (k, v))
    q = torch.zeros(1, 1, 16)
    q[..., 0] = 1.0
    got = attend(q.to(DEVICE), on_device(keys), on_device(values), backend="triton")
    assert error_of(got, softmax_of(q, decoded(keys), decoded(values))) <= TOLERANCE


def test_long_vectors_are_decoded() -> None:
    keys, values = streams_of("quad2", 288, tokens=5)
    q = gaussian(HEADS, 1, 288, seed=7)
    batch = AttendBatch(q[None].to(DEVICE), [on_device(keys)], [on_device(values)], backend="triton")
    assert not batch.from_codes
    assert batch.why == "backend 'cuda' is not asked for; head_dim 288 is more than 256"
    assert error_of(batch.run()[0], softmax_of(q, decoded(keys), decoded(values))) <= TOLERANCE


@pytest.mark.parametrize("interprets", [False, True])
def test_fields_of_what_a_kernel_is_compiled_for_are_constants(interprets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Triton from 3.2 on minds where they stand; a compiled kernel is found again by their record alone."""
    import triton.language as tl

    from pqcodec.kernels.on_triton.numbers import Constants, Quads

    monkeypatch.setenv("TRITON_INTERPRET", "1" if interprets else "0")
    record = Quads(1, 2, 3, 4, 5)
    one, same, other = Constants(record), Constants(Quads(*record)), Constants(record._replace(codes=6))
    assert {type(getattr(one.value, name)) for name in record._fields} == {int if interprets else tl.constexpr}
    assert one.steps == 3
    assert one == same
    assert hash(one) == hash(same)
    assert repr(one) == repr(same) == repr(record)
    assert one != other


# -- on a GPU ----------------------------------------------------------------------------------------------------------
def gpu_batch(
    backend: str = "triton", dtype: torch.dtype = torch.bfloat16
) -> tuple[AttendBatch, torch.Tensor, list[torch.Tensor]]:
    """Three sequences of long streams, with recent tokens; their queries and recent tokens."""
    pairs = [streams_of("quad3", 128, dtype, tokens) for tokens in (5000, 300, 9000)]
    q = gaussian(3, 4 * HEADS, 1, 128, seed=3, dtype=dtype).to(DEVICE)
    recent = [gaussian(3, HEADS, 70, 128, seed=i, dtype=dtype).to(DEVICE) for i in (1, 2)]
    sides = [[on_device(pair[i]) for pair in pairs] for i in (0, 1)]
    return AttendBatch(q, *sides, recent=recent, backend=backend), q, recent


@needs_gpu
def test_a_captured_graph_sees_new_queries_and_recent_tokens() -> None:
    batch, q, recent = gpu_batch()
    batch.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run()
    q.neg_()
    recent[1].neg_()
    graph.replay()
    replayed = batch.out.clone()
    assert torch.equal(replayed, batch.run())


@needs_gpu
def test_run_allocates_nothing_and_waits_for_nothing() -> None:
    batch, _, _ = gpu_batch()
    batch.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@needs_cuda
def test_the_kernels_agree_with_one_another() -> None:
    triton, cuda = gpu_batch("triton", torch.float32)[0], gpu_batch("cuda", torch.float32)[0]
    assert (triton.reader, cuda.reader) == ("triton", "cuda")
    assert error_of(cuda.run(), triton.run().cpu().double()) <= 1e-3


@needs_cuda
@pytest.mark.parametrize("options", [{"center": "mean"}, {}], ids=str)
def test_streams_that_follow_each_other_are_read_by_both(options: dict[str, Any]) -> None:
    """The CUDA kernel reads them where values are not centred, Triton's anywhere."""
    parts = [[gaussian(HEADS, tokens, 128, seed=tokens + i) for tokens in (500, 256, 100)] for i in range(2)]
    keys, values = ([on_device(pqcodec.encode(x, preset="quad3", **options)) for x in side] for side in parts)
    first, recent = ([gaussian(1, HEADS, 4, 128, seed=i).to(DEVICE) for i in seeds] for seeds in ((1, 2), (3, 4)))
    q = gaussian(1, HEADS * 4, 1, 128, seed=9).to(DEVICE)
    batches = [AttendBatch(q, [keys], [values], first=first, recent=recent, backend=name) for name in ("auto", "triton")]
    assert [batch.reader for batch in batches] == [None if options else "cuda", "triton"]
    assert error_of(batches[0].run(), batches[1].run().cpu().double()) <= 1e-3
