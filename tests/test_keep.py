"""Streams that hold only some tokens (SPEC 17): rows, positions, RoPE, sizes, attention, damage, and who refuses them."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, TORCH_DTYPES, bits, gaussian, needs_triton, rel_mse, sampled
from damage import every_flipped_bit_is_found, every_proper_prefix_is_truncated

import pqcodec
from pqcodec import BackendUnavailable, CorruptStream, InvalidArgument, NonFiniteInput, Rope
from pqcodec.attention import attend, scores
from pqcodec.codec import decode_together
from pqcodec.formats import PQKVAppender, PQKVFile, PQKVWriter, append_cache, load_cache, save_cache
from pqcodec.options import EncodeOptions
from pqcodec.stages import centre
from pqcodec.stream.header import Header
from pqcodec.stream.sections import KEEP
from pqcodec.stream.source import MemorySource

ROPE = Rope(theta=1e4, first_position=2**32 - 100)  # positions pass 2^32
PRESETS = ["pq3", "paper", "quad3", "wu44", "int4"]


def lists(leading: int, n: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Other positions for each leading index, ascending: int64 [leading, n]."""
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.permutation(tokens)[:n]) for _ in range(leading)])


def kept_of(x: torch.Tensor, keep: np.ndarray) -> torch.Tensor:
    """The kept rows of a tensor [leading, tokens, head_dim]."""
    return torch.stack([one[at] for one, at in zip(x, np.resize(keep, (len(x), keep.shape[-1])), strict=True)])


# -- rows and positions --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", sampled(PRESETS))
@pytest.mark.parametrize("n", [3, 150])  # numbers, and a bitmap
@pytest.mark.parametrize("shared", [True, False])
def test_rows_come_with_their_positions_or_in_the_whole_shape(backend: str, preset: str, n: int, shared: bool) -> None:
    x = gaussian(6, 400, 64) + 3
    keep = lists(1 if shared else 6, n, 400)
    given = keep[0] if shared else keep.reshape(2, 3, n)
    options: dict[str, Any] = {"preset": preset, "center": "rope", "rope": ROPE, "exact_tokens": 2, "exact_last": 1}
    data = pqcodec.encode(x.reshape(2, 3, 400, 64), keep=given, backend=backend, **options)
    assert len(data) == pqcodec.encoded_size((2, 3, 400, 64), "float32", keep=given, **options)
    rows, positions = pqcodec.decode_kept(data, backend=backend)
    assert positions.dtype == torch.int64
    np.testing.assert_array_equal(positions, given)
    wanted, rows = kept_of(x, keep), rows.reshape(6, n, 64)
    np.testing.assert_array_equal(bits(rows[:, :2]), bits(wanted[:, :2]))
    np.testing.assert_array_equal(bits(rows[:, -1]), bits(wanted[:, -1]))
    assert rel_mse(wanted, rows) < 0.03
    np.testing.assert_array_equal(second_decoder.decode(data).reshape(6, n, 64), bits(rows))
    whole = pqcodec.decode(data, fill=-7, backend=backend).reshape(6, 400, 64)
    np.testing.assert_array_equal(bits(kept_of(whole, keep)), bits(rows))
    mask = torch.ones(6, 400, dtype=torch.bool)
    for lead in range(6):
        mask[lead, keep[lead % len(keep)]] = False
    assert bool((whole[mask] == -7).all())
    assert pqcodec.verify(data, backend=backend) == []
    for other in BACKENDS:
        np.testing.assert_array_equal(bits(pqcodec.decode_kept(data, backend=other)[0].reshape(6, n, 64)), bits(rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_is_never_decoded_to_fewer_tokens_unsaid(backend: str) -> None:
    data = pqcodec.encode(gaussian(2, 9, 16), keep=[0, 8], backend=backend)
    for work in (
        lambda: pqcodec.decode(data, backend=backend),
        lambda: pqcodec.decode(data, tokens=(0, 1), backend=backend),
        lambda: decode_together([MemorySource(data)], [np.zeros((2, 2, 16), np.float32)], [0], backend),
    ):
        with pytest.raises(InvalidArgument, match=r"fill=value .*decode_kept"):
            work()
    with pytest.raises(InvalidArgument, match="the stream holds 2 of 9 tokens"):
        pqcodec.decode(data, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_range_is_that_of_the_whole(backend: str) -> None:
    x, keep = gaussian(3, 200, 32), lists(3, 70, 200)
    data = pqcodec.encode(x, center="rope", rope=ROPE, keep=keep, chunk_tokens=16, backend=backend)
    whole = pqcodec.decode(data, fill=0.5, backend=backend)
    for tokens in ((0, 0), (0, 1), (5, 60), (60, 61), (199, 200), (0, 200)):
        for leading in ((0, 3), (1, 2), (2, 2)):
            part = pqcodec.decode(data, fill=0.5, tokens=tokens, leading=leading, backend=backend)
            np.testing.assert_array_equal(bits(part), bits(whole[slice(*leading), slice(*tokens)]))
    rows, positions = pqcodec.decode_kept(data, leading=(1, 3), backend=backend)
    np.testing.assert_array_equal(positions, keep[1:])
    np.testing.assert_array_equal(bits(rows), bits(kept_of(whole[1:], keep[1:])))
    room = torch.full((3, 210, 40), 7.0)
    assert pqcodec.decode(data, fill=0.5, out=room[:, 5:205, :32], backend=backend).data_ptr() == room[:, 5:].data_ptr()
    np.testing.assert_array_equal(bits(room[:, 5:205, :32]), bits(whole))
    assert bool((room[:, :5] == 7).all() and (room[:, 205:] == 7).all() and (room[..., 32:] == 7).all())
    turned = torch.zeros(3, 32, 200).mT  # rows that do not lie as they are written
    np.testing.assert_array_equal(bits(pqcodec.decode(data, fill=0.5, out=turned, backend=backend)), bits(whole))
    with pytest.raises(InvalidArgument, match=r"tokens 0 \.\. 201"):
        pqcodec.decode(data, fill=0, tokens=(0, 201), backend=backend)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("fill", [0, -0.0, 1.5, float("nan"), float("inf"), float("-inf")])
def test_a_fill_value_is_the_dtypes(dtype: torch.dtype, fill: float) -> None:
    data = pqcodec.encode(gaussian(1, 5, 16, dtype=dtype), keep=[2], backend="cpu")
    found = pqcodec.decode(data, fill=fill, backend="cpu")[0, [0, 1, 3, 4]]
    assert found.dtype == dtype
    wanted = torch.full_like(found, fill)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert bool((torch.signbit(found) == torch.signbit(wanted)).all() or fill != fill)


def test_fill_values_that_a_dtype_has_not_are_refused() -> None:
    data = pqcodec.encode(gaussian(1, 5, 16, dtype=torch.float16), keep=[2], backend="cpu")
    for wrong in ("0", True, 1e9, -65505):
        with pytest.raises(InvalidArgument, match="fill"):
            pqcodec.decode(data, fill=wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_stream_that_holds_all_both_ways_are_plain(backend: str) -> None:
    x = gaussian(2, 9, 16)
    data = pqcodec.encode(x, backend=backend)
    whole = pqcodec.decode(data, backend=backend)
    np.testing.assert_array_equal(bits(pqcodec.decode(data, fill=0, backend=backend)), bits(whole))
    rows, positions = pqcodec.decode_kept(data, backend=backend)
    np.testing.assert_array_equal(bits(rows), bits(whole))
    assert positions.tolist() == list(range(9))
    everything = pqcodec.encode(x, keep=range(9), backend=backend)
    np.testing.assert_array_equal(bits(pqcodec.decode(everything, fill=0, backend=backend)), bits(whole))
    assert len(everything) == len(data) + 16 + 2 + 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(9, 16), (2, 9, 16), (0, 9, 16), (2, 0, 16)])
def test_nothing_may_be_kept(backend: str, shape: tuple[int, ...]) -> None:
    data = pqcodec.encode(np.ones(shape, np.float16), center="mean", keep=[], backend=backend)
    rows, positions = pqcodec.decode_kept(data, backend=backend)
    assert (rows.shape, positions.shape) == ((*shape[:-2], 0, 16), (0,))
    assert isinstance(rows, np.ndarray)
    assert isinstance(positions, np.ndarray)
    whole = pqcodec.decode(data, fill=2, backend=backend)
    assert whole.shape == shape
    assert bool((whole == 2).all())
    assert pqcodec.verify(data, backend=backend) == []


# -- RoPE ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["pq3", "quad2", "wu44"])
def test_kept_keys_are_turned_at_their_own_positions(backend: str, preset: str) -> None:
    """A mean that turns is all that there is: at any other positions an error would be as large as the keys."""
    rope, tokens, keep = Rope(theta=50.0, first_position=9), 300, lists(2, 40, 300)
    offset = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32) + 2
    field = rope.field(64)
    keys = np.stack([centre.turn(one, *centre.phases(field, 0, tokens), field) for one in offset])
    data = pqcodec.encode(keys, preset=preset, center="rope", rope=rope, keep=keep, backend=backend)
    rows, positions = pqcodec.decode_kept(data, backend=backend)
    wanted = np.take_along_axis(keys, positions[..., None], 1)
    assert ((rows - wanted) ** 2).sum() / (wanted**2).sum() < 1e-6
    elsewhere = pqcodec.encode(wanted, preset=preset, center="rope", rope=rope, backend=backend)
    assert ((pqcodec.decode(elsewhere, backend=backend) - wanted) ** 2).sum() / (wanted**2).sum() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_follow_each_other_are_coded_as_by_themselves(backend: str) -> None:
    x = gaussian(2, 90, 32) + 1
    options = {"preset": "pq3", "center": "rope", "backend": backend}  # of quads means turn run by run, but not of lists
    kept = pqcodec.encode(x, rope=Rope(first_position=5), keep=range(30, 70), **options)
    alone = pqcodec.encode(x[:, 30:70], rope=Rope(first_position=35), **options)
    np.testing.assert_array_equal(bits(pqcodec.decode_kept(kept)[0]), bits(pqcodec.decode(alone)))


# -- what is asked -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (3, "positions are expected"),
        ([0.0, 1.0], "positions are expected"),
        ([True, False], "positions are expected"),
        ([1, 0], "do not ascend"),
        ([3, 3], "do not ascend"),
        ([0, 9], "not all below 9"),
        ([-1, 3], "not all below 9"),
        ([[0], [1], [2]], "does not go with the tensor"),
        (np.zeros((2, 1, 1), int), "does not go with the tensor"),
    ],
)
def test_positions_that_are_none_are_refused(keep: Any, message: str) -> None:
    for work in (
        lambda: pqcodec.encode(gaussian(2, 9, 16), keep=keep, backend="cpu"),
        lambda: pqcodec.encoded_size((2, 9, 16), keep=keep),
    ):
        with pytest.raises(InvalidArgument, match=message):
            work()


def test_a_single_vector_has_no_tokens_to_choose_from() -> None:
    with pytest.raises(InvalidArgument, match="no tokens to choose from"):
        pqcodec.encode(gaussian(16), keep=[0], backend="cpu")


def test_positions_may_be_of_torch_or_numpy_and_options_stay_hashable() -> None:
    x = gaussian(2, 9, 16)
    wanted = pqcodec.encode(x, keep=[1, 4], backend="cpu")
    for keep in (torch.tensor([1, 4]), np.array([1, 4], np.uint8), (1, 4)):
        assert pqcodec.encode(x, keep=keep, backend="cpu") == wanted
        hash(EncodeOptions(keep=keep))


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_are_those_of_the_tensor(backend: str) -> None:
    """In errors, and where exact vectors are named."""
    x = gaussian(2, 9, 16)
    x[1, 7, 3], x[0, 2, 2] = float("inf"), float("nan")
    keep = [[0, 4, 6], [1, 5, 7]]  # the token with NaN is not kept
    with pytest.raises(NonFiniteInput, match=r"element \[1, 7, 3\] of the tensor is inf"):
        pqcodec.encode(x, keep=keep, backend=backend)
    data = pqcodec.encode(x, keep=keep, nonfinite="exact", exact_vectors=[(0, 4), (1, 1)], backend=backend)
    assert pqcodec.inspect(data).exact_vectors == 3
    rows, _ = pqcodec.decode_kept(data, backend=backend)
    for lead, kept in ((0, 1), (1, 0), (1, 2)):
        np.testing.assert_array_equal(bits(rows[lead, kept]), bits(x[lead, keep[lead][kept]]))
    for wrong in ((0, 1), (1, 8), (5, 0), (-1, 1)):
        with pytest.raises(InvalidArgument, match="exact vector"):
            pqcodec.encode(x, keep=keep, exact_vectors=[wrong], backend=backend)
    with pytest.raises(InvalidArgument, match="pairs"):
        pqcodec.encode(x, keep=keep, exact_vectors=[1, 2, 3], backend=backend)


def test_inspect_tells_and_counts_the_lists() -> None:
    x = gaussian(2, 800, 64, dtype=torch.float16)
    plain = pqcodec.inspect(pqcodec.encode(x[:, :50], backend="cpu"))
    few = pqcodec.inspect(pqcodec.encode(x, keep=lists(2, 20, 800), backend="cpu"))
    shared = pqcodec.inspect(pqcodec.encode(x, keep=range(50), backend="cpu"))
    each = pqcodec.inspect(pqcodec.encode(x, keep=lists(2, 50, 800), backend="cpu"))
    assert (plain.kept_of, each.kept_of, each.shape) == (None, 800, (2, 50, 64))
    assert (few.side_bytes, shared.side_bytes, each.side_bytes) == (2 * (80 + 4), 100 + 4, 2 * (100 + 4))
    assert each.stream_bytes == plain.stream_bytes + 16 + each.side_bytes
    assert each.tensor_bytes == 2 * 800 * 64 * 2
    assert each.ratio == each.tensor_bytes / each.stream_bytes > 70
    assert each.bits_per_coordinate == 8 * each.stream_bytes / (2 * 50 * 64)


# -- damage --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["numbers", "bitmap"])
def stream(request: pytest.FixtureRequest) -> bytes:
    """A stream with every section, of two blocks a leading index."""
    x = gaussian(2, 300, 16, seed=3)
    x[1, 5, 2] = float("nan")
    keep = [[0, 1, 5, 100, 101, 102, 299], [2, 3, 4, 5, 6, 7, 8]] if request.param == "numbers" else [range(8), range(1, 9)]
    x = x if request.param == "numbers" else x[:, :20]
    options: dict[str, Any] = {"center": "rope", "rope": Rope(theta=100.0, dim=8), "nonfinite": "exact", "chunk_tokens": 4}
    return pqcodec.encode(x, preset="pq2", keep=keep, exact_tokens=1, exact_last=1, backend="reference", **options)


def test_every_proper_prefix_is_truncated(stream: bytes) -> None:
    for decode in (pqcodec.decode_kept, pqcodec.decode):
        every_proper_prefix_is_truncated(stream, partial(decode, backend="cpu"))


def test_every_flipped_bit_is_found(stream: bytes) -> None:
    every_flipped_bit_is_found(stream, partial(pqcodec.decode_kept, backend="cpu"))


def test_a_damaged_list_is_named_and_touches_no_other(stream: bytes) -> None:
    place = Header.from_bytes(stream).places[KEEP]
    damaged = bytearray(stream)
    damaged[place.start + place.entry_bytes] ^= 1
    assert [str(one) for one in pqcodec.verify(bytes(damaged))] == ["keep list, leading index 1"]
    for work in (pqcodec.decode_kept, lambda data: pqcodec.decode(data, fill=0)):
        with pytest.raises(CorruptStream, match="keep list, leading index 1"):
            work(bytes(damaged))
    rows, positions = pqcodec.decode_kept(bytes(damaged), leading=(0, 1))
    wanted, at = pqcodec.decode_kept(stream, leading=(0, 1))
    np.testing.assert_array_equal(bits(rows), bits(wanted))
    np.testing.assert_array_equal(positions, at)


def test_a_whole_tensor_that_no_memory_holds_is_refused() -> None:
    """A stream of 2^48 numbers, as its header has it, of which a few are there: 2^50 bytes are beyond every address space."""
    x = gaussian(64, 100, 1024)
    data = pqcodec.encode(x, preset="pq2", keep=[3], backend="cpu")
    h = Header.from_bytes(data)
    assert h.keep is not None
    forged = bytearray(replace(h, keep=replace(h.keep, tokens=1 << 32)).to_bytes() + data[h.header_bytes :])
    whole = r"float32 \(64, 4294967296, 1024\), 1125899906842624 bytes"
    with pytest.raises(InvalidArgument, match=f"fill asks for {whole}, .* decode fewer tokens .*decode_kept"):
        pqcodec.decode(bytes(forged), fill=0, backend="cpu")
    part = pqcodec.decode(bytes(forged), fill=0, tokens=(0, 100), backend="cpu")
    np.testing.assert_array_equal(bits(part), bits(pqcodec.decode(data, fill=0, backend="cpu")))
    for place, said in ((h.places[KEEP].start, "keep list"), (len(forged) - 5, "payload, leading index 63")):
        forged[place] ^= 1  # what is there is checked before the tensor is made
        with pytest.raises(CorruptStream, match=said):
            pqcodec.decode(bytes(forged), fill=0, backend="cpu")
        forged[place] ^= 1


# -- attention -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["quad3", "pq3", "wu44"])
@pytest.mark.parametrize("shared", [True, False])
def test_attention_is_that_to_the_kept_tokens(backend: str, preset: str, shared: bool) -> None:
    keep = lists(1 if shared else 2, 60, 300)
    k, v, q = gaussian(2, 300, 64) + 1, gaussian(2, 300, 64, seed=1), gaussian(1, 4, 3, 64, seed=2)
    new = gaussian(1, 2, 3, 64, seed=3), gaussian(1, 2, 3, 64, seed=4)
    given = keep[0] if shared else keep
    options: dict[str, Any] = {"exact_tokens": 4, "exact_last": 3, "keep": given, "backend": backend}
    keys = pqcodec.encode(k[None], preset=preset, center="rope", rope=ROPE, **options)
    values = pqcodec.encode(v[None], preset="pq4", center="mean", **options)
    rows = [pqcodec.decode_kept(x, backend=backend)[0][0] for x in (keys, values)]
    one, two = (torch.cat([x, y[0]], 1).double().repeat_interleave(2, 0) for x, y in zip(rows, new, strict=True))
    expected = q[0].double() @ one.mT / 8
    mask = torch.ones(3, 63).tril(60)
    out = attend(q, keys, values, recent=new, backend=backend)[0].double()
    torch.testing.assert_close(out, expected.masked_fill(mask == 0, -torch.inf).softmax(-1) @ two, rtol=1e-4, atol=1e-5)
    lone = attend(q[..., :1, :], keys, values, backend=backend)[0].double()
    torch.testing.assert_close(lone, expected[:, :1, :60].softmax(-1) @ two[:, :60], rtol=1e-4, atol=1e-5)
    free = attend(q, keys, values, causal=False, backend=backend)[0].double()
    torch.testing.assert_close(free, expected[..., :60].softmax(-1) @ two[:, :60], rtol=1e-4, atol=1e-5)
    found = scores(keys, q, backend=backend)
    assert found.shape == (1, 4, 3, 300)
    for head in range(4):
        at = keep[head // 2 % len(keep)]
        torch.testing.assert_close(found[0, head][:, at].double(), expected[head, :, :60], rtol=1e-4, atol=1e-5)
    assert int(torch.isinf(found).sum()) == 4 * 3 * 240


def test_attention_refuses_what_kept_tokens_do_not_tell() -> None:
    x, q = gaussian(1, 2, 90, 16), gaussian(1, 2, 3, 16)
    one, other, whole = (pqcodec.encode(x, keep=keep, backend="cpu") for keep in ([0, 5], [0, 6], None))
    two = pqcodec.encode(x[..., :2, :], backend="cpu")
    for work, message in (
        (lambda: attend(q, one, one), "causal queries"),
        (lambda: attend(q[..., :1, :], one, one, window=1), "window="),
        (lambda: attend(q[..., :1, :], one, one, tokens=(0, 1)), "tokens="),
        (lambda: scores(one, q, tokens=(0, 1)), "tokens="),
        (lambda: attend(q[..., :1, :], one, other), "keep other tokens"),
        (lambda: attend(q[..., :1, :], one, two), "keep other tokens"),
        (lambda: attend(q[..., :1, :], one, whole), "do not go with keys"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            work()


# -- containers, and who refuses -----------------------------------------------------------------------------------
def test_a_file_holds_them(tmp_path: Path) -> None:
    x, path = gaussian(2, 9, 16), tmp_path / "kv.pqkv"
    with PQKVWriter(path) as writer:
        writer.add("k", x, layer=0, role="key", keep=[2, 7], backend="cpu")
        writer.add_exact("n", np.arange(3))
    with PQKVFile(path) as file:
        assert (file.entry("k").shape, file.inspect("k").kept_of) == ((2, 2, 16), 9)
        with pytest.raises(InvalidArgument, match=r"tensor 'k': .*decode_kept"):
            file.decode("k")
        rows, positions = file.decode_kept("k")
        assert positions.tolist() == [2, 7]
        whole = file.decode("k", fill=0)
        np.testing.assert_array_equal(bits(whole[:, [2, 7]]), bits(rows))
        assert file.verify() == []
        with pytest.raises(InvalidArgument, match="is not one stream"):
            file.decode_kept("n")
    with PQKVAppender(path) as appender:
        with pytest.raises(InvalidArgument, match="kept tokens"):
            appender.extend("k", x, keep=[1], backend="cpu")
        appender.add("v", x, layer=0, role="value", keep=[1], backend="cpu")


def test_a_cache_is_saved_with_its_positions_and_loaded_only_by_them(tmp_path: Path) -> None:
    path, keep = tmp_path / "kv.pqkv", [lists(2, 20, 90), [0, 1, 88, 89]]
    layers = [(gaussian(1, 2, 90, 64, seed=i) + 2, gaussian(1, 2, 90, 64, seed=9 + i)) for i in range(2)]
    told: list[tuple[int, int]] = []
    save_cache(path, layers, rope=ROPE, keep=[keep[0][None], keep[1]], backend="cpu", progress=lambda *x: told.append(x))
    assert told == [(n, 4) for n in range(1, 5)]
    with PQKVFile(path) as file:
        for number, layer in enumerate(layers):
            for role, x in zip(("key", "value"), layer, strict=True):
                rows, positions = file.decode_kept(f"layers.{number}.{role}")
                wanted = np.resize(keep[number], (2, rows.shape[-2]))
                np.testing.assert_array_equal(np.broadcast_to(positions, rows.shape[:-1])[0], wanted)
                assert rel_mse(kept_of(x[0], wanted), rows[0]) < 0.05
                info = file.inspect(f"layers.{number}.{role}")
                assert (info.kept_of, info.exact_tokens, info.centered) == (90, 4, "rope" if role == "key" else None)
    for work in (lambda: load_cache(path), lambda: append_cache(path, layers, rope=ROPE)):
        with pytest.raises(InvalidArgument, match=r"layers\.0\.key.*tokens"):
            work()
    with pytest.raises(InvalidArgument, match="positions of 1 layers are given for 2"):
        save_cache(path, layers, keep=keep[:1])


def test_a_writer_to_memory_has_the_same_bytes() -> None:
    file, x = io.BytesIO(), gaussian(2, 9, 16)
    with PQKVWriter(file) as writer:
        info = writer.add("k", x, keep=[2, 7], backend="cpu")
    assert pqcodec.encode(x, keep=[2, 7], backend="cpu") in file.getvalue()
    assert info.kept_of == 9


@needs_triton
def test_backends_of_gpus_refuse_them_by_name(stream: bytes) -> None:
    x = gaussian(2, 9, 16)
    for work in (
        lambda: pqcodec.encode(x, keep=[2], backend="triton"),
        lambda: pqcodec.decode(stream, backend="triton"),
        lambda: pqcodec.decode(stream, fill=0, backend="triton"),
        lambda: pqcodec.verify(stream, backend="triton"),
        lambda: decode_together([MemorySource(stream)], [torch.zeros(2, 7, 16)], [0], "triton"),
    ):
        with pytest.raises(BackendUnavailable, match="with a keep list"):
            work()
