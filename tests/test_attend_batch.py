"""AttendBatch where no kernel reads the codes: what it decodes by turns gives what the CPU's attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, gaussian, needs_triton

import pqcodec
from pqcodec import AttendBatch, Rope, attend_batch
from pqcodec.attention import attend

pytestmark = needs_triton
HEADS, GROUP, DIM = 2, 2, 16


@pytest.fixture(autouse=True)
def few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_batch, "STEP", 8)


def on_device(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE)


class Sequence:
    """Streams of a sequence, its recent tokens and its queries."""

    def __init__(self, tokens: int, recent: int, queries: int, preset: str, dtype: torch.dtype, **options: Any) -> None:
        k, v = (gaussian(HEADS, tokens, DIM, seed=tokens + i).to(dtype) for i in range(2))
        self.keys = pqcodec.encode(k, preset=preset, backend="reference", **options)
        self.values = pqcodec.encode(v, preset="quad2", backend="reference", exact_tokens=1)
        self.recent = tuple(gaussian(HEADS, recent, DIM, seed=2 + i).to(dtype) for i in range(2))
        self.q = gaussian(HEADS * GROUP, queries, DIM, seed=tokens).to(dtype)

    def wanted(self, **options: Any) -> torch.Tensor:
        recent = tuple(x.float() for x in self.recent) if self.recent[0].shape[1] else None
        return attend(self.q.float(), self.keys, self.values, recent=recent, backend="reference", **options)


@pytest.mark.parametrize(
    ("recent", "queries", "arguments"),
    [
        (0, 1, {}),
        (3, 1, {"window": 5}),
        (3, 5, {"window": 13}),
        (3, 5, {"softcap": 1.5}),
        (4, 2, {"scale": 2.0, "window": 2}),
    ],
    ids=str,
)
def test_sequences_agree_with_the_cpu(recent: int, queries: int, arguments: dict[str, Any]) -> None:
    options = {"center": "rope", "rope": Rope(theta=100.0), "exact_tokens": 2}
    sequences = [Sequence(tokens, recent, queries, "quad3", torch.float32, **options) for tokens in (20, 7, 16)]
    stacked = tuple(torch.stack([s.recent[i] for s in sequences]).to(DEVICE) for i in range(2)) if recent else None
    batch = AttendBatch(
        torch.stack([s.q for s in sequences]).to(DEVICE),
        [on_device(s.keys) for s in sequences],
        [on_device(s.values) for s in sequences],
        recent=stacked,
        backend="triton",
        **arguments,
    )
    assert not batch.from_codes
    assert batch.why == "only backend 'cuda' reads codes"
    for _ in range(2):
        for got, one in zip(batch.run().cpu(), sequences, strict=True):
            torch.testing.assert_close(got, one.wanted(**arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", ["pq3", "paper", "quad2.5"])
def test_codings_and_exact_vectors_agree_with_the_cpu(preset: str, dtype: torch.dtype) -> None:
    one = Sequence(12, 2, 1, preset, dtype, exact_vectors=[[0, 5], [1, 11]])
    recent = tuple(x.to(DEVICE) for x in one.recent)
    got = attend(
        one.q.to(DEVICE), on_device(one.keys), one.values, recent=recent, backend="triton"
    ).cpu()  # one lies on the host
    assert got.dtype == dtype
    error = (got.float() - one.wanted()).abs().max() / one.wanted().abs().max()
    assert error <= (2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_of_those_who_see_them(number: float) -> None:
    """Also where a shorter sequence's room still holds them, and among recent tokens."""
    sequences = [Sequence(tokens, 3, 2, "quad3", torch.float32) for tokens in (20, 7)]
    values = gaussian(HEADS, 20, DIM, seed=21)
    values[0, 5, 3] = number
    sequences[0].values = pqcodec.encode(values, preset="quad2", backend="reference", nonfinite="exact")
    sequences[1].recent[1][0, 2, 1] = number  # the first query does not see it
    q, k, v = ([getattr(s, name) for s in sequences] for name in ("q", "keys", "values"))
    recent = tuple(torch.stack([s.recent[i] for s in sequences]).to(DEVICE) for i in range(2))
    for window in (None, 6):
        batch = AttendBatch(
            torch.stack(q).to(DEVICE),
            [on_device(x) for x in k],
            [on_device(x) for x in v],
            recent=recent,
            window=window,
            backend="triton",
        )
        for got, one in zip(batch.run().cpu(), sequences, strict=True):
            torch.testing.assert_close(got, one.wanted(window=window), atol=1e-5, rtol=1e-5, equal_nan=True)


def test_no_recent_token() -> None:
    one = Sequence(12, 0, 1, "quad3", torch.float32)
    recent = tuple(x.to(DEVICE) for x in one.recent)
    got = attend(one.q.to(DEVICE), on_device(one.keys), on_device(one.values), recent=recent, backend="triton")
    torch.testing.assert_close(got.cpu(), one.wanted(), atol=1e-5, rtol=1e-5)


def test_damage_is_told_when_the_batch_is_made() -> None:
    one = Sequence(12, 0, 1, "quad3", torch.float32)
    damaged = bytearray(one.keys)
    damaged[-60] ^= 4
    q = one.q[None].to(DEVICE)
    with pytest.raises(pqcodec.CorruptStream):
        AttendBatch(q, [on_device(bytes(damaged))], [on_device(one.values)], backend="triton")


def test_wrong_arguments_are_named() -> None:
    one = Sequence(12, 0, 1, "quad3", torch.float32)
    q, k, v = one.q[None].to(DEVICE), on_device(one.keys), on_device(one.values)
    short = Sequence(11, 0, 1, "quad3", torch.float32)
    pair = (torch.zeros(1, HEADS, 2, DIM, device=DEVICE), torch.zeros(1, HEADS, 3, DIM, device=DEVICE))
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("a stream of each|one stream of each", (q, [k], []), {}),
        ("one stream of each", (q[0], [k], [v]), {}),
        ("multiple of 2 heads", (q[:, :3], [k], [v]), {}),
        ("multiple of 2 heads", (q[..., :8], [k], [v]), {}),
        ("float16, bfloat16 or float32", (q.double(), [k], [v]), {}),
        ("heads or tokens differ", (q, [k], [on_device(short.values)]), {}),
        ("20 queries stand", (q.repeat(1, 1, 20, 1), [k], [v]), {}),
        ("recent values", (q, [k], [v]), {"recent": pair}),
        ("window 0", (q, [k], [v]), {"window": 0}),
        ("window 2.5", (q, [k], [v]), {"window": 2.5}),
        ("window True", (q, [k], [v]), {"window": True}),
        ("softcap -1.0", (q, [k], [v]), {"softcap": -1.0}),
        ("softcap 1e-50", (q, [k], [v]), {"softcap": 1e-50}),
        ("scale '1'", (q, [k], [v]), {"scale": "1"}),
        ("lists of streams", (q, k, v), {}),
        ("a pair of tensors", (q, [k], [v]), {"recent": 5}),
        ("scale nan", (q, [k], [v]), {"scale": float("nan")}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(pqcodec.InvalidArgument, match=message):
            AttendBatch(*arguments, backend="triton", **options)
    other = Sequence(12, 0, 1, "quad2", torch.float32)
    with pytest.raises(pqcodec.InvalidArgument, match="make a batch for each kind"):
        AttendBatch(torch.cat([q, q]), [k, on_device(other.keys)], [v, v], backend="triton")
    batch = AttendBatch(q, [k], [v], backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="the batch was made of"):
        batch.run(q[:, :, :, :8])


def test_a_gpus_attention_says_what_it_leaves_to_the_cpu() -> None:
    one = Sequence(12, 0, 1, "quad3", torch.float32)
    with pytest.raises(pqcodec.BackendUnavailable, match="tokens="):
        attend(one.q.to(DEVICE), on_device(one.keys), on_device(one.values), tokens=(0, 5), backend="triton")


def test_a_gpus_attention_takes_what_the_cpus_takes() -> None:
    one = Sequence(12, 0, 1, "quad3", torch.float32)
    q, k, v = one.q.to(DEVICE), on_device(one.keys), on_device(one.values)
    with pytest.raises(pqcodec.InvalidArgument, match="tensors of torch"):
        attend(one.q.numpy(), k, v, backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="does not go with"):
        attend(q.reshape(2, 2, 1, DIM), k, v, backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="a pair of tensors"):
        attend(q, k, v, recent=(q, None), backend="triton")
