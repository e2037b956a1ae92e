"""AttendBatch by Triton's kernels, and where no kernel reads the codes: both give what the CPU's attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, gaussian, needs_triton, sampled

import pqcodec
from pqcodec import AttendBatch, Rope, attend_parts
from pqcodec.attention import attend, scores

pytestmark = needs_triton
HEADS, GROUP, DIM = 2, 2, 16


@pytest.fixture(autouse=True)
def few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short streams are of several shares and steps."""
    from pqcodec.kernels.on_triton import attending

    monkeypatch.setattr(attend_parts, "STEP", 8)
    monkeypatch.setattr(attending, "SHARE_TOKENS", 16)
    monkeypatch.setattr(attending, "TILES", dict.fromkeys(attending.TILES, 16))


@pytest.fixture(params=["read", "decoded"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The backend that reads codes: Triton, or none."""
    from pqcodec.kernels.on_triton import attending

    if request.param == "read":
        return "triton"
    monkeypatch.setattr(attending, "MOST_HEAD_DIM", DIM - 1)
    return None


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
    ("reader", "recent", "queries", "arguments"),
    sampled(
        [
            ("read", 0, 1, {}),
            ("read", 3, 1, {"window": 5}),
            ("read", 3, 5, {"window": 13}),
            ("read", 6, 2, {"window": 3}),
            ("read", 3, 5, {"softcap": 1.5, "causal": False}),
            ("read", 4, 2, {"scale": 2.0, "window": 2}),
            ("decoded", 0, 1, {}),
            ("decoded", 3, 5, {"window": 13, "softcap": 1.5}),
        ]
    ),
    ids=str,
    indirect=["reader"],
)
def test_sequences_agree_with_the_cpu(
    reader: str | None, recent: int, queries: int, arguments: dict[str, Any], token_by_token: None
) -> None:
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
    assert batch.reader == reader
    assert batch.from_codes == (reader is not None)
    assert batch.why == (None if reader else "backend 'cuda' is not asked for; head_dim 16 is more than 15")
    first = batch.run().cpu().clone()
    assert torch.equal(batch.run().cpu(), first)
    for got, one in zip(first, sequences, strict=True):
        torch.testing.assert_close(got, one.wanted(**arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["pq3", "paper", "quad2.5"])
@pytest.mark.parametrize(
    ("reader", "dtype"),
    [("read", torch.float16), ("read", torch.float32), ("decoded", torch.float16)],
    ids=str,
    indirect=["reader"],
)
def test_codings_and_exact_vectors_agree_with_the_cpu(reader: str | None, preset: str, dtype: torch.dtype) -> None:
    one = Sequence(12, 2, 1, preset, dtype, exact_vectors=[[0, 5], [1, 11]])
    recent = tuple(x.to(DEVICE) for x in one.recent)
    got = attend(
        one.q.to(DEVICE), on_device(one.keys), one.values, recent=recent, backend="triton"
    ).cpu()  # one lies on the host
    assert got.dtype == dtype
    error = (got.float() - one.wanted()).abs().max() / one.wanted().abs().max()
    assert error <= (2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("number", sampled([float("nan"), float("inf")]))
def test_values_that_are_not_finite_are_of_those_who_see_them(reader: str | None, number: float) -> None:
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
        ("as many streams of each", (q, [k], []), {}),
        ("as many streams of each", (q, [k], [[v, v]]), {}),
        ("as many streams of each", (q, [[]], [[]]), {}),
        ("as many streams of each", (q[0], [k], [v]), {}),
        ("multiple of 2 heads", (q[:, :3], [k], [v]), {}),
        ("multiple of 2 heads", (q[..., :8], [k], [v]), {}),
        ("float16, bfloat16 or float32", (q.double(), [k], [v]), {}),
        ("heads or tokens differ", (q, [k], [on_device(short.values)]), {}),
        ("20 queries stand", (q.repeat(1, 1, 20, 1), [k], [v]), {}),
        ("recent values", (q, [k], [v]), {"recent": pair}),
        ("first values", (q, [k], [v]), {"first": pair}),
        ("tokens 0 .. 13 is outside", (q, [k], [v]), {"tokens": (0, 13)}),
        ("1 queries stand at the end of 0 tokens", (q, [k], [v]), {"tokens": (3, 3), "causal": False}),
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
    other = Sequence(12, 0, 1, "quad3", torch.float16)
    with pytest.raises(pqcodec.InvalidArgument, match="differ in heads, head_dim or dtype"):
        AttendBatch(torch.cat([q, q]), [k, on_device(other.keys)], [v, v], backend="triton")
    batch = AttendBatch(q, [k], [v], backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="the batch was made of"):
        batch.run(q[:, :, :, :8])


@pytest.mark.parametrize("arguments", [{}, {"tokens": (3, 24)}, {"tokens": (0, 9), "causal": False}, {"window": 9}], ids=str)
def test_streams_that_follow_each_other_agree_with_the_cpu(
    reader: str | None, arguments: dict[str, Any], token_by_token: None
) -> None:
    """Of several kinds, with exact tokens of their own, after exact ones and before others."""
    turn = {"center": "rope", "rope": Rope(theta=100.0, style="interleaved")}
    parts = [Sequence(12, 0, 3, "quad3", torch.float32, exact_tokens=1, **turn), Sequence(13, 0, 3, "pq4", torch.float32)]
    q, keys, values = parts[0].q, [s.keys for s in parts], [s.values for s in parts]
    first, recent = ([gaussian(HEADS, 4, DIM, seed=seed + i) for i in range(2)] for seed in (5, 7))
    wanted = attend(q, keys, values, first=first, recent=recent, backend="reference", **arguments)
    pairs = {"first": [x.to(DEVICE) for x in first], "recent": [x.to(DEVICE) for x in recent]}
    got = attend(q.to(DEVICE), list(map(on_device, keys)), values, **pairs, backend="triton", **arguments)
    torch.testing.assert_close(got.cpu(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"tokens": (3, 24), "softcap": 2.0}, {"tokens": (5, 5)}, {"scale": 0.3}], ids=str)
def test_scores_agree_with_the_cpu(reader: str | None, arguments: dict[str, Any], token_by_token: None) -> None:
    turn = {"center": "rope", "rope": Rope(theta=100.0, dim=8, first_position=7), "exact_tokens": 2}
    parts = [
        Sequence(12, 0, 3, "quad3", torch.float32, **turn),
        Sequence(13, 0, 3, "paper", torch.float32, exact_vectors=[[1, 5]]),
    ]
    q, keys, recent = parts[0].q, [s.keys for s in parts], gaussian(HEADS, 3, DIM, seed=9)
    wanted = scores(keys, q, recent=recent, backend="reference", **arguments)
    got = scores(list(map(on_device, keys)), q.to(DEVICE), recent=recent.to(DEVICE), backend="triton", **arguments)
    torch.testing.assert_close(got.cpu(), wanted, atol=1e-5, rtol=1e-5)
    assert got.dtype == torch.float32
    nothing = scores(on_device(keys[0]), q.to(DEVICE), tokens=(5, 5), backend="triton")
    assert nothing.shape == (*q.shape[:-1], 0)


def test_a_batch_of_several_kinds_agrees_with_the_cpu(reader: str | None) -> None:
    """Values centred under RoPE, of another head_dim than keys; recent tokens of any strides."""
    sequences = [Sequence(tokens, 3, 20, preset, torch.bfloat16) for tokens, preset in ((20, "quad2"), (9, "pq3"))]
    v = [gaussian(HEADS, tokens, 20, seed=3).bfloat16() for tokens in (20, 9)]
    turns = ({"rope": Rope(theta=50.0)}, {"rope": Rope(theta=10.0, dim=12, style="interleaved")})
    values = [pqcodec.encode(x, center="rope", backend="reference", **turn) for x, turn in zip(v, turns, strict=True)]
    recent = [torch.stack([s.recent[0] for s in sequences]), gaussian(2, HEADS, 20, 3, seed=1).bfloat16().mT]
    q = torch.stack([s.q for s in sequences])
    batch = AttendBatch(
        q.to(DEVICE),
        [on_device(s.keys) for s in sequences],
        list(map(on_device, values)),
        recent=tuple(x.to(DEVICE) for x in recent),
        causal=False,
        backend="triton",
    )
    assert batch.reader == reader
    got = batch.run().cpu().float()
    for n, one in enumerate(sequences):
        pair = tuple(x[n].float() for x in recent)
        wanted = attend(q[n].float(), one.keys, values[n], recent=pair, causal=False, backend="reference")
        rounded = 5e-3 if reader else 1e-2  # decoded numbers are rounded, too
        assert (got[n] - wanted).abs().max() <= rounded * wanted.abs().max()


def test_a_gpus_attention_takes_what_the_cpus_takes() -> None:
    one = Sequence(12, 0, 1, "quad3", torch.float32)
    q, k, v = one.q.to(DEVICE), on_device(one.keys), on_device(one.values)
    with pytest.raises(pqcodec.InvalidArgument, match="tensors of torch"):
        attend(one.q.numpy(), k, v, backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="does not go with"):
        attend(q.reshape(2, 2, 1, DIM), k, v, backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="a pair of tensors"):
        attend(q, k, v, recent=(q, None), backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="first is a int"):
        attend(q, k, v, first=5, backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="an empty list"):
        scores([], q, backend="triton")
    with pytest.raises(pqcodec.InvalidArgument, match="does not go with keys"):
        scores(k, q[..., :8], backend="triton")
