"""Attention to codes on a GPU: the same as on the CPU, from the same streams, deterministic, and capturable."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_TRITON, needs_cuda
from safetensors.torch import load_file

import pqcodec
from pqcodec import AttendBatch, Rope
from pqcodec.attention import attend

pytestmark = [needs_cuda, pytest.mark.usefixtures("token_by_token")]
CUDA = "cuda"
FIXTURE = Path(__file__).parent / "data" / "smollm2_kv.safetensors"
ROPE: dict[str, Any] = {"center": "rope", "rope": Rope(theta=10000.0)}
# Of the largest number of a result: what queries, weights and turns lose as float16, and the rounding of the result.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1.5e-3, torch.bfloat16: 5e-3}


def with_turning_mean(shape: tuple[int, ...], mean: float = 2.0, first: int = 0) -> torch.Tensor:
    """Keys whose mean turns as RoPE has it: float32."""
    heads, tokens, dim = shape
    level = mean * torch.randn(heads, 1, dim)
    angle = torch.arange(first, first + tokens)[:, None] * 1e4 ** (-torch.arange(0, dim, 2) / dim)
    cos, sin = angle.cos(), angle.sin()
    a, b = level[..., : dim // 2], level[..., dim // 2 :]
    return torch.randn(shape) + torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def on_gpu(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(CUDA)


class Case:
    """Streams of keys and values, recent ones and queries, as options say."""

    def __init__(
        self,
        preset: str = "quad3",
        values: str | None = None,
        heads: int = 2,
        group: int = 4,
        tokens: int = 1000,
        dim: int = 128,
        dtype: torch.dtype = torch.float32,
        queries: int = 1,
        recent: int = 70,
        mean: float = 2.0,
        center: str | None = "rope",
        v_center: str | None = "mean",
        exact: int = 4,
        chunk: int = 64,
        rope: Rope | None = None,
    ) -> None:
        torch.manual_seed(tokens + dim)
        turn = rope or Rope(theta=10000.0)
        options = {"chunk_tokens": chunk, "exact_tokens": exact}
        k = with_turning_mean((heads, tokens, dim), mean, turn.first_position).to(dtype)
        v = (torch.randn(heads, tokens, dim) + 0.3).to(dtype)
        self.keys = pqcodec.encode(
            k, preset=preset, center=center, rope=turn if center == "rope" else None, backend="reference", **options
        )
        self.values = pqcodec.encode(v, preset=values or preset, center=v_center, backend="reference", **options)
        self.q = torch.randn(heads * group, queries, dim).to(dtype)
        self.recent = tuple(torch.randn(2, heads, recent, dim).to(dtype)) if recent else None

    def agrees(self, **options: Any) -> None:
        """On the GPU the same as on the CPU, and twice the same bits."""
        asked = options | {"backend": "reference"}
        wanted = attend(self.q.float(), self.keys, self.values, recent=self.recent_in(torch.float32), **asked)
        recent = self.recent and tuple(x.to(CUDA) for x in self.recent)
        got = [
            attend(self.q.to(CUDA), on_gpu(self.keys), on_gpu(self.values), recent=recent, **options).cpu() for _ in range(2)
        ]
        assert torch.equal(*got)
        assert got[0].dtype == self.q.dtype
        error = (got[0].float() - wanted).abs().max() / wanted.abs().max()
        assert error <= TOLERANCE[self.q.dtype], float(error)

    def recent_in(self, dtype: torch.dtype) -> Any:
        return self.recent and tuple(x.to(dtype) for x in self.recent)


@pytest.mark.parametrize("preset", ["quad2", "quad2.25", "quad2.5", "quad2.75", "quad3", "quad3.25", "quad3.5"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_rate_agrees_with_the_cpu(preset: str, dim: int) -> None:
    Case(preset, dim=dim).agrees()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16, "mean": 0.5},
        {"dtype": torch.bfloat16},
        {"values": "quad2.5"},
        {"center": None, "v_center": None},
        {"center": "mean"},
        {"group": 1},
        {"group": 7},
        {"group": 8, "dim": 64},
        {"group": 16, "heads": 1},
        {"queries": 4, "group": 4},
        {"queries": 5, "group": 1},
        {"chunk": 24},
        {"chunk": 100},
        {"chunk": 256, "tokens": 4000},
        {"exact": 0, "recent": 0},
        {"tokens": 3},
        {"tokens": 5, "recent": 1},
        {"tokens": 64 + 4},
        {"rope": Rope(theta=500000.0, style="interleaved", first_position=123456)},
        {"rope": Rope(theta=10000.0, dim=64)},
        {"tokens": 6000, "heads": 4},
    ],
    ids=str,
)
def test_every_option_agrees_with_the_cpu(options: dict[str, Any]) -> None:
    Case(**options).agrees()


@pytest.mark.parametrize(
    "options", [{"window": 400}, {"window": 70}, {"window": 5000}, {"softcap": 5.0}, {"scale": 0.3}], ids=str
)
def test_arguments_agree_with_the_cpu(options: dict[str, Any]) -> None:
    Case().agrees(**options)


def test_scores_far_apart_and_all_alike() -> None:
    case = Case()
    case.agrees(scale=50.0)
    case.agrees(scale=0.0)


@pytest.mark.parametrize("layer", [0, 1, 15, 29])
def test_a_real_models_keys_and_values_agree_with_the_cpu(layer: int) -> None:
    """SmolLM2's, whose keys have outliers; the queries are its keys, which is harder than its queries, and random ones."""
    tensors = load_file(FIXTURE)
    k, v = (tensors[f"layers.{layer}.{name}"].float()[0] for name in ("key", "value"))
    keys = pqcodec.encode(k, preset="quad3", center="rope", rope=Rope(theta=100000.0), exact_tokens=4, backend="reference")
    values = pqcodec.encode(v, preset="quad3", exact_tokens=4, backend="reference")
    torch.manual_seed(0)
    for q in (k[:, -1:].repeat_interleave(3, 0), torch.randn(9, 1, 64) * k.abs().mean()):
        wanted = attend(q, keys, values, backend="reference")
        got = attend(q.to(CUDA), on_gpu(keys), on_gpu(values)).cpu()
        assert (got - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_sequences_of_other_lengths_lie_in_one_batch() -> None:
    cases = [Case(tokens=tokens) for tokens in (100, 2000, 777)]
    recent = tuple(torch.stack([case.recent[i] for case in cases]).to(CUDA) for i in (0, 1))
    q = torch.stack([case.q for case in cases]).to(CUDA)
    batch = AttendBatch(q, *([on_gpu(getattr(case, name)) for case in cases] for name in ("keys", "values")), recent=recent)
    for got, case in zip(batch.run().cpu(), cases, strict=True):
        wanted = attend(case.q, case.keys, case.values, recent=case.recent, backend="reference")
        assert (got - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_a_captured_graph_sees_new_queries_and_recent_tokens() -> None:
    case = Case()
    recent = tuple(x[None].to(CUDA) for x in case.recent)
    q = case.q[None].to(CUDA)
    batch = AttendBatch(q, [on_gpu(case.keys)], [on_gpu(case.values)], recent=recent)
    batch.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run()
    q.neg_()
    recent[1].neg_()
    graph.replay()
    wanted = attend(-case.q, case.keys, case.values, recent=(case.recent[0], -case.recent[1]), backend="reference")
    assert (batch.out[0].cpu() - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_strided_recent_tokens_are_read_where_they_lie() -> None:
    case = Case()
    room = [torch.randn(1, 2, 200, 128, device=CUDA) for _ in range(2)]
    for x, kept in zip(room, case.recent, strict=True):
        x[0, :, 50:120] = kept.to(CUDA)
    recent = tuple(x[:, :, 50:120] for x in room)
    got = AttendBatch(case.q[None].to(CUDA), [on_gpu(case.keys)], [on_gpu(case.values)], recent=recent).run()[0].cpu()
    wanted = attend(case.q, case.keys, case.values, recent=case.recent, backend="reference")
    assert (got - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_an_exact_token_that_is_not_finite_does_what_it_does_in_softmax() -> None:
    case = Case()
    recent = tuple(x.to(CUDA) for x in case.recent)
    recent[0][0, 3, 5] = float("nan")
    got = attend(case.q.to(CUDA), on_gpu(case.keys), on_gpu(case.values), recent=recent).cpu()
    assert got[:4].isnan().all()  # the query heads of the first head of keys
    assert got[4:].isfinite().all()


def test_damage_is_told_and_no_number() -> None:
    case = Case(recent=0)
    data = bytearray(case.values)
    data[-100] ^= 1
    with pytest.raises(pqcodec.CorruptStream):
        attend(case.q.to(CUDA), on_gpu(case.keys), on_gpu(bytes(data)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "pq3"}, "quads"),
        ({"dim": 96}, "head_dim 96"),
        ({"group": 20, "heads": 1}, "more than 16"),
        ({"queries": 3, "recent": 2}, "recent ones"),
        ({"preset": "quad3", "values": "pq3"}, "quads"),
    ],
    ids=str,
)
def test_what_this_kernel_does_not_read_is_read_by_tritons_or_decoded(options: dict[str, Any], message: str) -> None:
    case = Case(**options)
    case.agrees()
    case.agrees(backend="cuda")
    recent = case.recent and tuple(x[None].to(CUDA) for x in case.recent)
    arguments = case.q[None].to(CUDA), [on_gpu(case.keys)], [on_gpu(case.values)]
    if HAS_TRITON:
        case.agrees(backend="triton")
        assert AttendBatch(*arguments, recent=recent, backend="triton").reader == "triton"
    batch = AttendBatch(*arguments, recent=recent)
    assert not batch.from_codes
    assert message in (batch.why or "")


def test_wrong_arguments_are_named() -> None:
    case = Case(recent=0)
    q, k, v = case.q[None].to(CUDA), on_gpu(case.keys), on_gpu(case.values)
    wrong: list[tuple[Any, ...]] = [(q[:, :3], [k], [v]), (q, [k], []), (q[..., :64], [k], [v]), (q.double(), [k], [v])]
    for arguments in wrong:
        with pytest.raises(pqcodec.InvalidArgument):
            AttendBatch(*arguments)
    for window, cap in itertools.product((0, None), (-1.0, float("nan"))):
        with pytest.raises(pqcodec.InvalidArgument):
            AttendBatch(q, [k], [v], window=window, softcap=cap)
