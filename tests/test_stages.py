"""Stages that make rows of vectors before these are coded (SPEC 18, 19), with every coding: numbers, ranges, damage, files."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, bits, gaussian, needs_triton, rel_mse
from damage import every_flipped_bit_is_found, every_proper_prefix_is_truncated
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import pqcodec
from pqcodec import BackendUnavailable, InvalidArgument, NonFiniteInput, Rope
from pqcodec.attention import attend, scores
from pqcodec.backends import backend as backend_of
from pqcodec.codec import decode_together
from pqcodec.formats import PQKVAppender, PQKVFile, PQKVWriter, append_cache, load_cache
from pqcodec.formats.containers import convert, open_encoded
from pqcodec.stages import centre
from pqcodec.stream.header import Header
from pqcodec.stream.source import MemorySource

ROPE = Rope(theta=1e4, first_position=2**32 - 5)  # positions pass 2^32
TURNED = Rope(theta=9.0, dim=8, style="interleaved", first_position=7)
BASIS = np.linalg.qr(np.random.default_rng(5).standard_normal((20, 20)))[0]
BIG = np.linalg.qr(np.random.default_rng(6).standard_normal((64, 64)))[0]
PRESETS = ["pq4", "paper", "quad3.5", "wu44", "int4", "q8_0", "nuq4", "kvquant4-key"]  # every coding, every part of them
STAGES: dict[str, dict[str, Any]] = {  # of tensors [2, 4, tokens, 20]
    "before rope": {"rope": ROPE, "before_rope": True},
    "before rope, less a mean": {"rope": TURNED, "before_rope": True, "center": "mean"},
    "heads joined": {"join_heads": True},
    "heads joined, less a mean under rope": {"join_heads": True, "center": "rope", "rope": ROPE},
    "heads joined before rope": {"join_heads": True, "center": "mean", "rope": TURNED, "before_rope": True},
    "channels": {"channels": [0, 1, 2, 3, 5, 8, 9, 19]},
    "heads joined, channels": {"join_heads": True, "channels": [range(40, 80), range(1, 80, 2)], "center": "mean"},
    "heads joined, blocks": {"join_heads": True, "block_basis": True, "center": "rope", "rope": ROPE},
    "basis": {"basis": BASIS, "rope": TURNED, "before_rope": True},
    "heads joined, basis": {"join_heads": True, "basis": 9, "center": "mean"},
}
MIXED = ("heads joined before rope", "channels", "heads joined, basis")  # every part of every stage
SMALL = {  # of a tensor [2, 5, 8]
    "channels": {"channels": [[0, 2, 7], [3, 4, 5]]},
    "heads joined, basis": {"basis": 2},
}
LOST = {"channels": 0.8, "heads joined, channels": 0.5, "heads joined, basis": 0.9}  # relMSE at the most, where it is large
SHAPE = (2, 4, 13, 20)
FIXTURE = Path(__file__).parent / "data" / "smollm2_kv.safetensors"


def lists(leading: int, n: int, tokens: int) -> np.ndarray:
    """Other positions for each leading index, ascending: int64 [leading, n]."""
    rng = np.random.default_rng(0)
    return np.stack([np.sort(rng.permutation(tokens)[:n]) for _ in range(leading)])


def keys(tokens: int, head_dim: int, rope: Rope) -> torch.Tensor:
    """A vector a leading index [2, tokens, head_dim] that RoPE turns: before it, all tokens have the same."""
    field = rope.field(head_dim)
    offset = np.random.default_rng(1).standard_normal((2, head_dim)).astype(np.float32) + 2
    return torch.from_numpy(np.stack([centre.turn(one, *centre.phases(field, 0, tokens), field) for one in offset]))


# -- numbers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stage", "preset"),
    [(stage, preset) for stage in STAGES for preset in (PRESETS if stage in MIXED else ["int4", "quad3.5"])],
)
def test_every_coding_decodes_alike_everywhere(stage: str, preset: str) -> None:
    """By both backends and by a decoder that was written from the specification; exact numbers stay as they are."""
    x = gaussian(*SHAPE, seed=1, dtype=torch.bfloat16) + 1
    x[1, 0, 5, 3], x[0, 2, 12, 0] = float("nan"), float("-inf")
    options = {"preset": preset, "exact_tokens": 2, "exact_last": 1, "chunk_tokens": 4, "nonfinite": "exact", **STAGES[stage]}
    for keep in (None, lists(8, 9, 13)):
        some = [(2, 12), (3, 5)] if keep is None else [(2, keep[2, 4]), (3, keep[3, 5])]
        data = pqcodec.encode(x, keep=keep, exact_vectors=some, **options, backend="reference")
        (rows, at), other = (pqcodec.decode_kept(data, backend=backend) for backend in ("reference", "cpu"))
        np.testing.assert_array_equal(bits(rows), bits(other[0]))
        np.testing.assert_array_equal(bits(rows), second_decoder.decode(data))
        places = at.reshape(*(1, 1) if keep is None else (2, 4), -1, 1)
        wanted = torch.take_along_dim(x.view(torch.int16), places, 2).view(torch.bfloat16)
        finite = torch.isfinite(wanted).all(-1)
        assert rel_mse(wanted[finite].float(), rows[finite].float()) < LOST.get(stage, 0.05)
        assert keep is not None or not bool(finite.all())
        np.testing.assert_array_equal(bits(rows[:, :, :2]), bits(wanted[:, :, :2]))
        np.testing.assert_array_equal(bits(rows[:, :, -1]), bits(wanted[:, :, -1]))
        np.testing.assert_array_equal(bits(rows[~finite]), bits(wanted[~finite]))
        assert [pqcodec.verify(data, backend=backend) for backend in BACKENDS] == [[], []]


@pytest.mark.parametrize("stage", STAGES)
def test_sizes_are_told_before_and_cpu_encodes_as_well(stage: str) -> None:
    x = gaussian(*SHAPE, dtype=torch.float16)
    for preset in ("pq6", "int4"):
        data = [pqcodec.encode(x, preset=preset, **STAGES[stage], backend=backend) for backend in BACKENDS]
        assert {len(one) for one in data} == {pqcodec.encoded_size(SHAPE, preset=preset, **STAGES[stage])}
        first, second = (rel_mse(x.float(), pqcodec.decode(one).float()) for one in data)
        assert first == pytest.approx(second, rel=1e-3)
        info = pqcodec.inspect(data[0])
        assert info.before_rope == STAGES[stage].get("before_rope", False)
        assert info.centered == STAGES[stage].get("center")
        assert info.joined_heads == (4 if STAGES[stage].get("join_heads") else None)


# -- before RoPE ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rope", [Rope(theta=50.0, first_position=2**40), TURNED], ids=["half", "interleaved"])
def test_turning_is_alike_everywhere_and_undone(rope: Rope) -> None:
    header = Header.from_bytes(pqcodec.encode(gaussian(2, 150, 20), rope=rope, before_rope=True, backend="cpu"))
    for positions in (None, lists(2, 150, 9000).astype(np.uint32), lists(1, 150, 9000).astype(np.uint32)):
        x = gaussian(2, 140, 20).numpy()
        turned = {name: x.copy() for name in BACKENDS}
        for name, found in turned.items():
            backend_of(name).turn(found, header, (0, 10), positions, back=False)
        np.testing.assert_array_equal(bits(turned["cpu"]), bits(turned["reference"]))
        assert not np.allclose(turned["cpu"], x, atol=0.1)
        for name, found in turned.items():
            backend_of(name).turn(found, header, (0, 10), positions, back=True)
            assert ((found - x) ** 2).sum() < 1e-12 * (x**2).sum()
        np.testing.assert_array_equal(bits(turned["cpu"]), bits(turned["reference"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["int4", "pq3", "wu44"])
def test_keys_are_constant_before_their_rope(backend: str, preset: str) -> None:
    """A mean is all that there is, kept tokens or not; under another RoPE there is much more."""
    x, options = keys(300, 64, TURNED), {"preset": preset, "before_rope": True, "center": "mean", "backend": backend}
    keep = lists(2, 40, 300)
    data = pqcodec.encode(x, rope=TURNED, **options)
    assert rel_mse(x, pqcodec.decode(data, backend=backend)) < 1e-6
    rows, _ = pqcodec.decode_kept(pqcodec.encode(x, rope=TURNED, keep=keep, **options), backend=backend)
    wanted = torch.take_along_dim(x, torch.from_numpy(keep)[..., None], 1)
    assert rel_mse(wanted, rows) < 1e-6
    assert rel_mse(x, pqcodec.decode(pqcodec.encode(x, rope=ROPE, **options), backend=backend)) > 1e-4


def test_channels_keep_their_range_before_rope() -> None:
    """What KVQuant takes keys before RoPE for: a scale and a zero a channel."""
    x = keys(300, 64, ROPE) + gaussian(2, 300, 64) / 10
    after, before = (pqcodec.encode(x, preset="kivi4-key", **how) for how in ({}, {"rope": ROPE, "before_rope": True}))
    assert len(before) - len(after) == 16 + 4 * 32
    assert rel_mse(x, pqcodec.decode(before)) < rel_mse(x, pqcodec.decode(after)) / 4


# -- heads joined --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["int4", "quad3", "wu33"])
def test_joined_heads_are_coded_as_the_tensor_that_they_are(backend: str, preset: str) -> None:
    x = gaussian(2, 3, 90, 20)
    data = pqcodec.encode(x, preset=preset, join_heads=True, backend=backend)
    alone = pqcodec.encode(x.swapaxes(1, 2).reshape(2, 90, 60), preset=preset, backend=backend)
    assert len(data) == len(alone) + 8
    wanted = pqcodec.decode(alone, backend=backend).reshape(2, 90, 3, 20).swapaxes(1, 2)
    np.testing.assert_array_equal(bits(pqcodec.decode(data, backend=backend)), bits(wanted.contiguous()))


# -- a linear stage ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "lost"), [({"channels": range(48)}, 1 / 4), ({"basis": 32}, 0), ({"basis": BIG[:40]}, 3 / 8)]
)
def test_what_is_not_coded_is_lost_and_no_more(options: dict[str, Any], lost: float) -> None:
    """Of iid numbers as much as channels, or directions, are missing; nothing of numbers that have no others."""
    x = gaussian(1, 4000, 64) if lost else gaussian(1, 4000, 32) @ torch.from_numpy(BIG[:32]).float()
    found = pqcodec.decode(pqcodec.encode(x, preset="q8_0", **options))
    assert rel_mse(x, found) == pytest.approx(lost, rel=0.02, abs=1e-4)


def test_blocks_are_of_least_error_as_decoquant_finds_them() -> None:
    x = gaussian(1, 2000, 64) * torch.logspace(0, 2, 16).repeat(4)
    plain, fitted = (rel_mse(x, pqcodec.decode(pqcodec.encode(x, preset="int4", **how))) for how in ({}, {"block_basis": True}))
    assert fitted < plain
    given = np.diag(np.logspace(0, 2, 16))
    again = pqcodec.encode(x, preset="int4", block_basis=given)
    assert rel_mse(x, pqcodec.decode(again)) < 2 * plain


@pytest.mark.parametrize(("preset", "key", "value"), [("decoquant4", 0.0247, 0.0291), ("decoquant2", 0.498, 0.646)])
def test_decoquant_errs_as_is_known(preset: str, key: float, value: float) -> None:
    """Of SmolLM2, within 5 %; of Gaussian numbers the factor gains nothing, and 8 bits are 127 levels on either side."""
    tensors = load_file(FIXTURE)
    for role, known in (("key", key), ("value", value)):
        given = [x[0].float() for name, x in tensors.items() if name.endswith(role)]
        coded = [pqcodec.encode(x, preset=preset, join_heads=True, block_basis=True) for x in given]
        errors = [rel_mse(x, pqcodec.decode(y)) for x, y in zip(given, coded, strict=True)]
        assert np.mean(errors) == pytest.approx(known, rel=0.05)
    x = gaussian(4, 1000, 128)
    plain, blocks = (pqcodec.encode(x, preset=preset, join_heads=True, block_basis=how) for how in (None, True))
    errors = [rel_mse(x, pqcodec.decode(data)) for data in (plain, blocks)]
    assert errors == pytest.approx({"decoquant4": (0.0183, 0.0180), "decoquant2": (0.708, 0.705)}[preset], rel=0.02)
    info = pqcodec.inspect(blocks)
    assert (info.preset, info.linear, info.group, info.levels[:2]) == (preset, "blocks", (1, 1024), (-1, -1))
    assert rel_mse(x, pqcodec.decode(pqcodec.encode(x, preset="decoquant8", join_heads=True))) < 7e-5


@pytest.mark.parametrize("shape", [(20, 7), (16, 16), (3, 100)])
def test_products_are_alike_everywhere_and_never_infinite(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((300, shape[0])).astype(np.float32)
    x[5], x[6], x[7, ::2] = 3e38, -3e38, 3e38
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float16).astype(np.float64)
    matrix[0] = 65504
    one, other = (backend_of(name).product(x, matrix) for name in BACKENDS)
    np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))
    assert bool(np.isfinite(one).all())
    np.testing.assert_allclose(one[:5], x[:5] @ matrix, rtol=1e-4, atol=1e-3)


def test_channels_that_are_not_chosen_are_zeros_or_means() -> None:
    x = gaussian(2, 50, 20) + 3
    kept = [[0, 1, 5], [7, 8, 19]]
    for center in (None, "mean"):
        found = pqcodec.decode(pqcodec.encode(x, preset="q8_0", channels=kept, center=center))
        for lead in range(2):
            others = [i for i in range(20) if i not in kept[lead]]
            assert rel_mse(x[lead][:, kept[lead]], found[lead][:, kept[lead]]) < 1e-3
            assert bool((found[lead][:, others] == (0 if center is None else found[lead][:1, others])).all())
            assert center is None or rel_mse(x[lead].mean(0)[others], found[lead][0, others]) < 1e-3


# -- ranges --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_any_range_is_that_of_the_whole(backend: str, stage: str) -> None:
    x = gaussian(2, 4, 40, 20)
    data = pqcodec.encode(x, **STAGES[stage], exact_tokens=3, exact_last=2, chunk_tokens=8, backend=backend)
    whole = pqcodec.decode(data, backend=backend)
    flat = whole.reshape(8, 40, 20)
    for tokens in ((0, 0), (0, 3), (2, 4), (5, 30), (11, 12), (38, 40), (0, 40)):
        for leading in ((0, 8), (1, 2), (2, 5), (8, 8)):
            part = pqcodec.decode(data, tokens=tokens, leading=leading, backend=backend)
            np.testing.assert_array_equal(bits(part), bits(flat[slice(*leading), slice(*tokens)]))
    room = torch.full((2, 4, 50, 32), 7.0)
    assert pqcodec.decode(data, out=room[..., 5:45, :20], backend=backend).data_ptr() == room[..., 5:, :].data_ptr()
    np.testing.assert_array_equal(bits(room[..., 5:45, :20]), bits(whole))
    assert bool((room[..., :5, :] == 7).all() and (room[..., 45:, :] == 7).all() and (room[..., 20:] == 7).all())
    plain = pqcodec.encode(x, backend=backend)
    room = torch.full((2, 4, 85, 20), 7.0)
    decode_together([MemorySource(one) for one in (data, plain)], [room, room], [0, 45], backend)
    np.testing.assert_array_equal(bits(room[..., :40, :]), bits(whole))
    np.testing.assert_array_equal(bits(room[..., 45:, :]), bits(pqcodec.decode(plain, backend=backend)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_decodes_alike_by_both_backends(data: st.DataObject) -> None:
    dims = [*data.draw(st.lists(st.integers(0, 3), max_size=2)), data.draw(st.integers(0, 9)), data.draw(st.integers(1, 40))]
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    x = gaussian(*dims, dtype=torch.float32).mul_(10.0 ** data.draw(st.integers(-40, 37))).to(dtype)
    options: dict[str, Any] = {"nonfinite": "exact", "chunk_tokens": data.draw(st.integers(1, 9))}
    options |= {"exact_tokens": data.draw(st.integers(0, 3)), "exact_last": data.draw(st.integers(0, 3))}
    options |= {"preset": data.draw(st.sampled_from(PRESETS)), "center": data.draw(st.sampled_from([None, "mean"]))}
    options["join_heads"] = len(dims) > 2 and dims[-3] > 0 and data.draw(st.booleans())
    numbers = dims[-1] * (dims[-3] if options["join_heads"] else 1)
    linear: list[dict[str, Any]] = [{}, {"basis": data.draw(st.integers(1, numbers))}]
    linear.append({"channels": sorted(data.draw(st.sets(st.integers(0, numbers - 1), min_size=1)))})
    options |= data.draw(st.sampled_from([*linear, *([{"block_basis": True}] if numbers % 16 == 0 else [])]))
    if dims[-1] > 1:
        dim = 2 * data.draw(st.integers(1, dims[-1] // 2))
        style = data.draw(st.sampled_from(["half", "interleaved"]))
        options |= {"before_rope": True, "rope": Rope(100.0, dim, style, data.draw(st.integers(0, 2**61)))}
    streams = [pqcodec.encode(x, **options, backend=backend) for backend in BACKENDS]
    for stream in streams:
        one, other = (pqcodec.decode(stream, backend=backend) for backend in BACKENDS)
        assert (one.shape, one.dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(bits(one), bits(other))
        assert pqcodec.verify(stream, backend="cpu") == []


# -- damage --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=MIXED)
def stream(request: pytest.FixtureRequest) -> bytes:
    """A small stream with every section, of two blocks a leading index."""
    x = gaussian(2, 5, 8, seed=3, dtype=torch.float16)
    x[1, 3, 2] = float("nan")
    options: dict[str, Any] = {"preset": "pq2", "nonfinite": "exact", "chunk_tokens": 2, "exact_tokens": 1, "exact_last": 1}
    how = STAGES[request.param] | SMALL.get(request.param, {})
    return pqcodec.encode(x, **{"center": "mean", **how}, **options, backend="reference")


def test_every_proper_prefix_is_truncated(stream: bytes) -> None:
    every_proper_prefix_is_truncated(stream, partial(pqcodec.decode, backend="cpu"))


def test_every_flipped_bit_is_found(stream: bytes) -> None:
    every_flipped_bit_is_found(stream, partial(pqcodec.decode, backend="cpu"))


def test_damage_is_named_and_touches_no_other(stream: bytes) -> None:
    h = Header.from_bytes(stream)
    damaged = bytearray(stream)
    damaged[h.blocks.place(1, h.blocks.leading - 1)] ^= 1
    told = [f"payload, leading index {lead}, tokens 3 .. 3" for lead in range(2 - 2 // h.blocks.leading, 2)]
    assert [[str(one) for one in pqcodec.verify(bytes(damaged), backend=backend)] for backend in BACKENDS] == [told, told]
    for part in ({"tokens": (0, 3)}, {"leading": (0, 2 - 2 // h.blocks.leading)}):
        np.testing.assert_array_equal(bits(pqcodec.decode(bytes(damaged), **part)), bits(pqcodec.decode(stream, **part)))


# -- what is asked -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"before_rope": True}, "give rope="),
        ({"before_rope": 1, "rope": ROPE}, "before_rope 1"),
        ({"before_rope": True, "rope": ROPE, "center": "rope"}, "choose center='mean'"),
        ({"rope": ROPE}, "before_rope=True"),
        ({"join_heads": "yes"}, "join_heads 'yes'"),
        ({"channels": [0], "basis": 3}, "channels and basis are given"),
        ({"channels": [3, 1]}, "channels: positions do not ascend"),
        ({"channels": [0, 20]}, "channels: positions 0 .. 20"),
        ({"channels": []}, "rows of 0 numbers"),
        ({"channels": 3}, "rows of 0 numbers"),
        ({"channels": [[0], [1]]}, "channels .* does not go"),
        ({"block_basis": True}, "blocks of 16"),
        ({"block_basis": np.eye(15)}, "block_basis"),
        ({"basis": np.eye(19)}, "basis .* is none"),
        ({"basis": 21}, "rows of 21 numbers"),
        ({"basis": np.full((3, 20), np.inf)}, "not finite"),
        ({"rope": ROPE, "center": "mean"}, "before_rope=True"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        pqcodec.encode(gaussian(*SHAPE), **options, backend="cpu")


@pytest.mark.parametrize("shape", [(9, 16), (52, 9, 20), (2, 0, 9, 20)])
def test_heads_that_cannot_be_joined_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="join_heads: "):
        pqcodec.encode(np.ones(shape, np.float32), join_heads=True, backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_places_are_those_of_the_tensor(backend: str, stage: str) -> None:
    x = gaussian(*SHAPE)
    x[1, 2, 7, 3] = float("inf")
    with pytest.raises(NonFiniteInput, match=r"element \[1, 2, 7, 3\] of the tensor is inf \(1 vectors"):
        pqcodec.encode(x, **STAGES[stage], backend=backend)


# -- attention -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", MIXED)
def test_attention_is_that_to_decoded_numbers(backend: str, stage: str) -> None:
    k, v, q = gaussian(2, 4, 90, 20) + 1, gaussian(2, 4, 90, 20, seed=1), gaussian(2, 8, 2, 20, seed=2)
    options: dict[str, Any] = {"exact_tokens": 3, "chunk_tokens": 16, "backend": backend}
    coded = [pqcodec.encode(x, **how, **options) for x, how in ((k, STAGES[stage]), (v, {"preset": "quad3"}))]
    k, v = (pqcodec.decode(x, backend=backend).repeat_interleave(2, 1).double() for x in coded)
    expected = q.double() @ k.mT / 20**0.5
    torch.testing.assert_close(scores(coded[0], q, backend=backend).double(), expected, rtol=1e-4, atol=1e-5)
    found = scores(coded[0], q, tokens=(2, 40), backend=backend).double()
    torch.testing.assert_close(found, expected[..., 2:40], rtol=1e-4, atol=1e-5)
    mask = torch.ones(2, 90).tril(88)
    out = attend(q, *coded, backend=backend).double()
    torch.testing.assert_close(out, expected.masked_fill(mask == 0, -torch.inf).softmax(-1) @ v, rtol=1e-4, atol=1e-5)
    out = attend(q[..., :1, :], *coded[::-1], backend=backend).double()  # staged values
    torch.testing.assert_close(out, (q[..., :1, :].double() @ v.mT / 20**0.5).softmax(-1) @ k, rtol=1e-4, atol=1e-5)


# -- containers, and who refuses -----------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_files_hold_them_and_convert_them_and_grow(stage: str, tmp_path: Path) -> None:
    x, path = gaussian(2, 4, 40, 20), tmp_path / "kv.pqkv"
    with PQKVWriter(path) as writer:
        writer.add("k", x[..., :30, :], layer=0, role="key", **STAGES[stage], backend="cpu")
    with PQKVAppender(path) as appender:
        how = {name: value for name, value in STAGES[stage].items() if name != "rope"}  # the file holds it
        appender.extend("k", x[..., 30:, :], **how, backend="cpu")
    with PQKVFile(path) as file:
        whole = file.decode("k")
        assert rel_mse(x, whole) < LOST.get(stage, 0.05)
        assert file.verify() == []
    for target in ("kv.safetensors", "kv.zarr"):
        if target == "kv.zarr":
            pytest.importorskip("zarr")
        convert(path, tmp_path / target)
        with open_encoded(tmp_path / target) as file:
            np.testing.assert_array_equal(bits(file.decode("k")), bits(whole))
            np.testing.assert_array_equal(bits(file.decode("k", tokens=(20, 35))), bits(whole[..., 20:35, :]))
            assert file.verify() == []


def test_files_hold_tensors_of_more_numbers_than_bits(tmp_path: Path) -> None:
    x, path = gaussian(4, 300, 1024), tmp_path / "kv.pqkv"
    stream = pqcodec.encode(x, preset="pq2", join_heads=True, channels=[1000], backend="cpu")  # 4 bytes stand for 4,096 numbers
    whole = pqcodec.decode(stream, backend="cpu")
    assert x.numel() > 8 * 10 * len(stream)
    with PQKVWriter(path) as writer:
        writer.add_stream("k", stream, layer=0, role="key")
    for target in (path.name, "kv.safetensors", *(["kv.zarr"] if importlib.util.find_spec("zarr") else [])):
        if target != path.name:
            convert(path, tmp_path / target)
        with open_encoded(tmp_path / target) as file:
            assert file.verify() == []
            np.testing.assert_array_equal(file.decode("k"), whole)


def test_caches_grow_as_they_were_begun(tmp_path: Path) -> None:
    x, path = keys(60, 64, TURNED)[None].half(), tmp_path / "kv.pqkv"
    for how in ({"before_rope": True, "rope": TURNED, "join_heads": True, "center": "mean"}, {"basis": 64}):
        with PQKVWriter(path) as writer:
            writer.add("layers.0.key", x[..., :40, :], layer=0, role="key", **how, backend="cpu")
            writer.add("layers.0.value", x[..., :40, :], layer=0, role="value", backend="cpu")
        if "basis" in how:
            with pytest.raises(InvalidArgument, match="linear stage"):
                append_cache(path, [(x[..., 40:, :], x[..., 40:, :])], backend="cpu")
            continue
        append_cache(path, [(x[..., 40:, :], x[..., 40:, :])], backend="cpu")
        assert rel_mse(x, load_cache(path, backend="cpu")[0][0]) < 1e-6


@needs_triton
def test_backends_of_gpus_refuse_them_by_name(stream: bytes) -> None:
    named = "with .*(before RoPE|heads joined|a linear stage)"
    for work in (
        lambda: pqcodec.encode(gaussian(*SHAPE), **STAGES["before rope"], backend="triton"),
        lambda: pqcodec.decode(stream, backend="triton"),
        lambda: pqcodec.verify(stream, backend="triton"),
        lambda: decode_together([MemorySource(stream)], [torch.zeros(2, 5, 8).half()], [0], "triton"),
    ):
        with pytest.raises(BackendUnavailable, match=named):
            work()
