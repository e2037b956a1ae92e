"""Chunks of serving engines: sizes known before, two layouts told apart, and no bytes but the object's own are ever taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, RESTORING, TORCH_DTYPES, gaussian, rel_mse

import pqcodec
from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, NonFiniteInput, TruncatedStream, UnsupportedStream
from pqcodec.formats.engines.chunks import CHUNK_LAYOUTS, LATENT_LAYOUTS, ChunkCodec
from pqcodec.stages.centre import phases, turn
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header

FUSED, SENT, APART = CHUNK_LAYOUTS
LAYERS, TOKENS, HEADS, DIM = 3, 20, 2, 32
PAIR = gaussian(2, LAYERS, HEADS, TOKENS, DIM).half()  # keys and values
NAME = b"an object"
ROPE = pqcodec.Rope(theta=100.0)


def codec_of(**options: Any) -> ChunkCodec:
    return ChunkCodec(**{"head_dim": DIM, "kv_heads": HEADS, "preset": "pq4", "backend": "reference", **options})


def chunk_of(layout: str, pair: torch.Tensor = PAIR) -> torch.Tensor:
    """As engines hold it; written out, so that the test does not repeat the code."""
    keys, values = pair
    layers, _, tokens, _ = keys.shape
    if layout in (FUSED, SENT):
        lying = torch.cat([keys, values], -1).transpose(1, 2).reshape(layers, tokens, -1).contiguous()
        return lying[None] if layout == FUSED else lying
    return torch.stack([keys.transpose(1, 2), values.transpose(1, 2)]).reshape(2, layers, tokens, -1).contiguous()


@pytest.fixture(scope="module")
def encoded() -> np.ndarray:
    return codec_of(rope=ROPE).encode(chunk_of(FUSED), NAME)


# -- what comes back -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", CHUNK_LAYOUTS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_keys_and_values_come_back_to_their_places(layout: str, dtype: torch.dtype, backend: str) -> None:
    x = chunk_of(layout).to(dtype)
    for chosen in (None, layout):
        chunks = codec_of(layout=chosen, preset="pq6", backend=backend)
        y = torch.full_like(x, torch.nan)
        chunks.decode(chunks.encode(x, NAME), y, NAME)
        assert rel_mse(x, y) < 0.001


def test_a_chunk_is_its_streams(backend: str) -> None:
    rope = pqcodec.Rope(theta=100.0, dim=16)
    chunks = codec_of(preset="pq3", rope=rope, exact_tokens=2, backend=backend)
    data = chunks.encode(chunk_of(FUSED), NAME).tobytes()
    keys = pqcodec.encode(PAIR[0], preset="pq3", center="rope", rope=rope, exact_tokens=2, backend=backend)
    values = pqcodec.encode(PAIR[1], preset="pq3", exact_tokens=2, backend=backend)
    assert data[48:] == keys + bytes(-len(keys) % 16) + values + bytes(-len(values) % 16)
    assert c.CHUNK_STRUCT.unpack(data[:48])[2:4] == (len(data), 2)


def streams_of(data: np.ndarray, layers: int) -> list[list[Header]]:
    """The headers of the streams of keys and of values, as SPEC IV.6 tells to find them."""
    found, at = [], 48
    for _ in range(2):
        headers: list[Header] = []
        while sum(h.shape[0] for h in headers) < layers:
            headers.append(
                Header.from_bytes(data[at : at + int.from_bytes(data[at + 8 : at + 12].tobytes(), "little")].tobytes())
            )
            at += -(-headers[-1].stream_bytes // 16) * 16
        found.append(headers)
    assert not data[at:].any()
    return found


def shared_chunk(preset: str, layers: int = 12, tokens: int = 64) -> tuple[ChunkCodec, torch.Tensor, np.ndarray]:
    """A chunk whose fourth layer has keys of sixteen times the norm, encoded."""
    pair = gaussian(2, layers, HEADS, tokens, DIM)
    pair[0, 3] *= 16
    chunks, x = codec_of(preset=preset, backend="cpu"), chunk_of(FUSED, pair.half())
    return chunks, x, chunks.encode(x, NAME)


def test_layers_share_a_presets_bits_and_a_chunks_size_stays() -> None:
    pytest.importorskip("numba")
    chunks, x, data = shared_chunk("pq3")
    keys, values = streams_of(data, 12)
    bits = [[h.row_bytes for h in side for _ in range(h.shape[0])] for side in (keys, values)]
    assert bits[0][3] == max(bits[0]) > min(bits[0])
    assert sum(bits[0]) > sum(bits[1])
    assert sum(bits[0]) + sum(bits[1]) <= 24 * DIM * 3 // 8
    assert data.nbytes == chunks.encode(gaussian(*x.shape).half(), NAME).nbytes == chunks.size(x.shape, x.dtype)
    y = torch.empty_like(x)
    chunks.decode(data, y, NAME)
    (loud, quiet), (was_loud, was_quiet) = ((z[0, 3], z[0, [*range(3), *range(4, 12)]]) for z in (y, x))
    assert rel_mse(was_loud, loud) < rel_mse(was_quiet, quiet) < 0.06


@pytest.mark.parametrize("preset", RESTORING)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_presets_that_share_fill_no_more_than_the_size(preset: str, tokens: int) -> None:
    pytest.importorskip("numba")
    chunks, x, data = shared_chunk(preset, tokens=tokens)
    assert data.nbytes == chunks.size(x.shape, x.dtype)
    y = torch.full_like(x, torch.nan)
    chunks.decode(data, y, NAME)
    assert y.isfinite().all()


def test_a_file_torn_between_two_objects_is_refused_wherever_it_is_torn() -> None:
    """Also where a block, a section or a stream ends: each of its parts is whole, but they were not written together."""
    pytest.importorskip("numba")
    chunks, x, data = shared_chunk("pq3", layers=8, tokens=12)
    other, y = chunks.encode(chunk_of(FUSED, gaussian(2, 8, HEADS, 12, DIM, seed=9).half()), NAME), torch.empty_like(x)
    for at in range(48, data.nbytes):
        if (data[at:] == other[at:]).all():
            continue
        with pytest.raises((CorruptStream, UnsupportedStream, InvalidArgument)):
            chunks.decode(np.concatenate([data[:at], other[at:]]), y, NAME)


@pytest.mark.parametrize("layout", CHUNK_LAYOUTS)
def test_a_gpu_codes_a_chunk_where_it_lies(layout: str, gpu_backend: str) -> None:
    x = chunk_of(layout).to(DEVICE)
    there, here = codec_of(rope=ROPE, backend=gpu_backend), codec_of(rope=ROPE)
    data = there.encode(x, NAME)
    assert data.nbytes == here.size(x.shape, x.dtype)
    y, z = torch.empty_like(x), torch.empty_like(x, device="cpu")
    there.decode(data, y, NAME)
    here.decode(data, z, NAME)
    assert (y.cpu() == z).all()
    assert rel_mse(x, y) < 0.02


def test_one_engine_reads_what_another_wrote() -> None:
    """The bytes do not depend on the layout: that of an engine before an update, and after it."""
    before, after = codec_of(layout=APART), codec_of(layout=FUSED)
    data = before.encode(chunk_of(APART), NAME)
    assert (data == after.encode(chunk_of(FUSED), NAME)).all()
    y = torch.empty_like(chunk_of(FUSED))
    after.decode(data, y, NAME)
    assert rel_mse(chunk_of(FUSED), y) < 0.02


def test_centred_keys_do_not_mind_where_a_chunk_begins() -> None:
    """A key's bias turns with its position; where a chunk begins is not known, but it only turns the mean."""
    bias = 20 * gaussian(DIM, seed=1)
    errors = []
    for first in (0, 1234):
        field = ROPE.field(DIM)
        turned = torch.from_numpy(turn(bias.numpy(), *phases(field, first, TOKENS), field))
        x = chunk_of(FUSED, PAIR.float() + torch.stack([turned, torch.zeros_like(turned)])[:, None, None])
        y, chunks = torch.empty_like(x), codec_of(rope=ROPE)
        chunks.decode(chunks.encode(x, NAME), y, NAME)
        errors.append(float(((x - y) ** 2).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    chunks = codec_of()
    chunks.decode(chunks.encode(x, NAME), y, NAME)
    assert ((x - y) ** 2).sum() > 3 * errors[1]


# -- sizes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", RESTORING)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_sizes_are_exact_and_equal_for_all_numbers(preset: str, tokens: int) -> None:
    chunks = codec_of(preset=preset, rope=pqcodec.Rope())
    size = chunks.size((1, LAYERS, tokens, HEADS * 2 * DIM), "bfloat16")
    assert size == chunks.size(torch.Size([2, LAYERS, tokens, HEADS * DIM]), torch.bfloat16)
    for scale in (0.0, 1e-30, 1.0, 1e30):
        x = (scale * gaussian(1, LAYERS, tokens, HEADS * 2 * DIM)).bfloat16()
        assert chunks.encode(x, NAME).nbytes == size


def test_numbers_that_are_not_finite_are_not_encoded() -> None:
    x = chunk_of(FUSED)
    x[0, 1, 9, 7] = torch.nan
    with pytest.raises(NonFiniteInput):
        codec_of().encode(x, NAME)


# -- what is refused at once ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "head_dim and kv_heads: not given, and keys and values are not told apart by guessing"),
        ({"head_dim": 64}, "kv_heads: not given"),
        ({"kv_heads": 8}, "head_dim: not given"),
        ({"head_dim": 0, "kv_heads": 8}, "head_dim is 0; a whole number from 1"),
        ({"head_dim": 64, "kv_heads": "8"}, "kv_heads is '8'; a whole number from 1"),
        ({"head_dim": 64, "kv_heads": True}, "kv_heads is True"),
        ({"head_dim": 64, "kv_heads": 8, "preset": "pq9"}, "preset 'pq9'"),
        ({"head_dim": 64, "kv_heads": 8, "preset": 5}, "preset 5"),
        ({"head_dim": 64, "kv_heads": 8, "preset": ["pq3", "pq4"]}, "preset"),
        ({"head_dim": 64, "kv_heads": 8, "layout": ["a"]}, "layout"),
        ({"head_dim": 1 << 62, "kv_heads": 8}, "head_dim"),
        ({"head_dim": 64, "kv_heads": 1 << 62}, "elements"),
        ({"head_dim": 64, "kv_heads": 8, "layout": "fused"}, "layout 'fused' is unknown; choose from '1,layers"),
        ({"head_dim": 64, "kv_heads": 8, "Preset": "pq3"}, "option 'Preset' is unknown; choose from preset"),
        ({"head_dim": 64, "kv_heads": 8, "exact_tokens": -1}, "exact_tokens -1"),
        ({"head_dim": 64, "kv_heads": 8, "rope": 10000}, 'rope is 10000; "none" or an object'),
        ({"head_dim": 64, "kv_heads": 8, "rope": {}}, "neither theta nor frequencies"),
        ({"head_dim": 64, "kv_heads": 8, "rope": {"theta": 1e4, "base": 1}}, "rope's member 'base' is unknown"),
        ({"head_dim": 64, "kv_heads": 8, "rope": {"theta": "1e4"}}, "rope.theta '1e4'"),
        ({"head_dim": 64, "kv_heads": 8, "rope": {"frequencies": ["a"]}}, "rope"),
        ({"head_dim": 64, "kv_heads": 8, "rope": {"frequencies": 1.0}}, "rope"),
        ({"head_dim": 64, "kv_heads": 8, "rope": {"theta": 1e4, "dim": 128}}, "rope turns 128 channels"),
        ({"head_dim": 64, "kv_heads": 8, "rope": {"theta": 1e4, "style": "neox"}}, "rope.style 'neox'"),
        ({"head_dim": 64, "kv_heads": 1, "latent_dim": -1}, "latent_dim is -1; a whole number is expected"),
        ({"head_dim": 64, "kv_heads": 8, "latent_dim": 512}, "kv_heads is 8; latent attention has one rotary key"),
        (
            {"head_dim": 64, "kv_heads": 1, "latent_dim": 512, "layout": APART},
            "layout '2,layers.* choose from '1,layers,tokens,dim'",
        ),
        ({"head_dim": 64, "kv_heads": 1, "layout": LATENT_LAYOUTS[0]}, "layout '1,layers,tokens,dim' is unknown"),
        ({"model": "/nowhere"}, "the path of a model's config.json"),
        ({"model": 5}, "model"),
    ],
)
def test_a_wrong_configuration_is_refused_at_start(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        ChunkCodec.from_json(options)


def test_a_model_says_what_is_not_given(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    chunks = ChunkCodec.from_json({"model": str(tmp_path)})
    assert (chunks.head_dim, chunks.kv_heads, chunks.preset) == (128, 8, "quad3")
    assert chunks.rope is not None
    assert chunks.rope.field(128) == pqcodec.Rope(1e6).field(128)
    rank = ChunkCodec.from_json({"model": str(tmp_path), "kv_heads": 2, "rope": "none"})
    assert (rank.kv_heads, rank.rope) == (2, None)
    again = ChunkCodec.from_json({"model": str(tmp_path), "rope": {"theta": 1e6}})
    assert again.rope == pqcodec.Rope(1e6)
    for wrong in ({"theta": 1e4}, {"theta": 1e6, "style": "interleaved"}, {"theta": 1e6, "dim": 64}):
        with pytest.raises(InvalidArgument, match=r"'rope' is not that of the model's config.json"):
            ChunkCodec.from_json({"model": str(tmp_path), "rope": wrong})
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    assert ChunkCodec.from_json({"model": str(tmp_path), "rope": {"theta": 1e4}}).rope == pqcodec.Rope(1e4)


# -- latent attention ------------------------------------------------------------------------------------------------
LATENT, ROTARY = 48, 16
LATENTS = gaussian(LAYERS, TOKENS, LATENT + ROTARY).half() + 1
MLA: dict[str, Any] = {"head_dim": ROTARY, "kv_heads": 1, "latent_dim": LATENT}


@pytest.mark.parametrize("layout", LATENT_LAYOUTS)
def test_latents_and_rotary_keys_come_back_to_their_places(layout: str, backend: str) -> None:
    x = LATENTS[None] if layout.startswith("1") else LATENTS
    rope = pqcodec.Rope(theta=100.0, style="interleaved")
    for chosen in (None, layout):
        chunks = codec_of(**MLA, layout=chosen, preset="pq3", rope=rope, exact_tokens=2, backend=backend)
        data, y = chunks.encode(x, NAME), torch.full_like(x, torch.nan)
        assert data.nbytes == chunks.size(x.shape, x.dtype)
        chunks.decode(data, y, NAME)
        assert rel_mse(x, y) < 0.05
    options = {"preset": "pq3", "exact_tokens": 2, "backend": backend}
    rotary = pqcodec.encode(LATENTS[:, None, :, LATENT:], center="rope", rope=rope, **options)
    latents = pqcodec.encode(LATENTS[:, None, :, :LATENT], center="mean", **options)
    assert data.tobytes()[48:] == rotary + bytes(-len(rotary) % 16) + latents + bytes(-len(latents) % 16)


@pytest.mark.parametrize("shape", [(1, LAYERS, TOKENS, LATENT), (2, LAYERS, TOKENS, 64), (1, LAYERS, TOKENS, 80), (LAYERS, 64)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="with a latent of 48 numbers and a rotary key of 16"):
        codec_of(**MLA).size(shape, "float16")


def test_a_model_says_that_its_attention_is_latent(tmp_path: Path) -> None:
    config = {
        "model_type": "deepseek_v3",
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "rope_theta": 10000,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    chunks = ChunkCodec.from_json({"model": str(tmp_path)})
    assert (chunks.latent_dim, chunks.head_dim, chunks.kv_heads) == (512, 64, 1)
    assert chunks.rope is not None
    assert (chunks.rope.style, len(chunks.rope.frequencies or ())) == ("interleaved", 32)
    shape = (1, 61, 256, 576)
    assert chunks.size(shape, "bfloat16") < 0.3 * 2 * np.prod(shape)
    with pytest.raises(InvalidArgument, match="which is not"):  # the model knows better than who forgets its latents
        ChunkCodec.from_json({"model": str(tmp_path), "head_dim": 576, "kv_heads": 1}).size(shape, "bfloat16")
    del config["qk_rope_head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match="kv_lora_rank 512 and qk_rope_head_dim None"):
        ChunkCodec.from_json({"model": str(tmp_path)})


# -- what is refused when it comes -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, LAYERS, TOKENS, HEADS * DIM)),  # no room for values
        ({}, (2, LAYERS, TOKENS, HEADS * 2 * DIM)),
        ({"layout": APART}, (1, LAYERS, TOKENS, HEADS * 2 * DIM)),
        ({"layout": FUSED}, (2, LAYERS, TOKENS, HEADS * DIM)),
        ({"kv_heads": 1}, (1, LAYERS, TOKENS, HEADS * 2 * DIM)),  # LMCache would read another number of heads
        ({"head_dim": 16}, (1, LAYERS, TOKENS, HEADS * 2 * DIM)),
        ({}, (LAYERS, TOKENS, HEADS * DIM)),
        ({}, (2, 1, LAYERS, TOKENS, HEADS * DIM)),
        ({"layout": FUSED}, (LAYERS, TOKENS, HEADS * 2 * DIM)),
        ({"layout": SENT}, (1, LAYERS, TOKENS, HEADS * 2 * DIM)),
        ({}, (HEADS * 2 * DIM,)),
        ({}, ()),
    ],
)
def test_a_chunk_of_another_shape_is_refused(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    chunks = codec_of(**options)
    for refused in (lambda: chunks.size(shape, "float16"), lambda: chunks.encode(torch.zeros(shape).half(), NAME)):
        with pytest.raises(InvalidArgument, match=r"which is not '.*give the model's head_dim, and as kv_heads"):
            refused()


def test_a_layout_is_not_guessed_where_two_readings_have_one_shape() -> None:
    """Two heads of 32 apart look like one of 64: head_dim and kv_heads are asked for, and both must fit."""
    shape = (2, LAYERS, TOKENS, 64)
    assert codec_of().size(shape, "float16") > 0
    assert codec_of(head_dim=64, kv_heads=1).size(shape, "float16") > 0
    with pytest.raises(InvalidArgument, match="kv_heads: not given"):
        ChunkCodec.from_json({"head_dim": 64, "layout": APART})


@pytest.mark.parametrize("dtype", ["uint8", torch.float8_e4m3fn, torch.float64])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(InvalidArgument, match="only float16, bfloat16, float32 can be encoded"):
        codec_of().size((1, LAYERS, TOKENS, HEADS * 2 * DIM), dtype)


# -- what is a miss ------------------------------------------------------------------------------------------------
def test_every_flipped_bit_is_found(encoded: np.ndarray) -> None:
    """One of every byte: of the head, the streams' headers, sides, rows and checksums, and what is between and behind them."""
    chunks, y = codec_of(rope=ROPE, backend="cpu"), torch.empty_like(chunk_of(FUSED))
    for at in range(encoded.nbytes):
        damaged = encoded.copy()
        damaged[at] ^= 1 << at % 8
        with pytest.raises((CorruptStream, UnsupportedStream)):
            chunks.decode(damaged, y, NAME)


def test_every_proper_prefix_is_refused(encoded: np.ndarray) -> None:
    chunks, y = codec_of(rope=ROPE, backend="cpu"), torch.empty_like(chunk_of(FUSED))
    for size in [*range(200), *range(200, encoded.nbytes, 7)]:
        with pytest.raises(TruncatedStream):
            chunks.decode(encoded[:size], y, NAME)
    with pytest.raises(CorruptStream, match=f"has {encoded.nbytes + 1}"):
        chunks.decode(np.append(encoded, np.uint8(0)), y, NAME)


def foreign(encoded: np.ndarray) -> dict[str, np.ndarray]:
    zeros = np.zeros_like(encoded)
    raw = chunk_of(FUSED).view(torch.uint8).numpy().ravel()[: encoded.nbytes]
    stream = encoded[48:]
    return {"zeros": zeros, "raw numbers": raw, "noise": zeros + np.arange(encoded.nbytes, dtype=np.uint8), "stream": stream}


@pytest.mark.parametrize("kind", ["zeros", "raw numbers", "noise", "stream"])
def test_foreign_bytes_are_refused(encoded: np.ndarray, kind: str) -> None:
    with pytest.raises(CorruptStream, match="pqcodec did not write it"):
        codec_of().decode(foreign(encoded)[kind], torch.empty_like(chunk_of(FUSED)), NAME)


@pytest.mark.parametrize("version", [0, 1, 3, 1 << 31])
def test_other_versions_are_refused(encoded: np.ndarray, version: int) -> None:
    fields = list(c.CHUNK_STRUCT.unpack(encoded[:48].tobytes()))
    fields[1] = version
    fields[-1] = checksum(c.CHUNK_STRUCT.pack(*fields)[:-4])
    other = encoded.copy()
    other[:48] = np.frombuffer(c.CHUNK_STRUCT.pack(*fields), np.uint8)
    with pytest.raises(UnsupportedStream, match=f"version {version}, this release reads 2"):
        codec_of(rope=ROPE).decode(other, torch.empty_like(chunk_of(FUSED)), NAME)


def test_the_bytes_of_another_object_are_refused(encoded: np.ndarray) -> None:
    with pytest.raises(CorruptStream, match="of another object"):
        codec_of(rope=ROPE).decode(encoded, torch.empty_like(chunk_of(FUSED)), b"another")


@pytest.mark.parametrize(
    ("options", "like"),
    [
        ({}, chunk_of(FUSED, PAIR[:, :, :, :16])),  # fewer tokens
        ({}, chunk_of(FUSED, PAIR[:, :2])),  # fewer layers
        ({}, chunk_of(FUSED).bfloat16()),
        ({}, chunk_of(FUSED).float()),
        ({"preset": "pq3"}, chunk_of(FUSED)),
        ({"exact_tokens": 5}, chunk_of(FUSED)),
        ({"rope": None}, chunk_of(FUSED)),
        ({"head_dim": 64, "kv_heads": 1}, chunk_of(FUSED)),
    ],
)
def test_bytes_of_another_shape_dtype_or_preset_are_refused(
    encoded: np.ndarray, options: dict[str, Any], like: torch.Tensor
) -> None:
    with pytest.raises(InvalidArgument):
        codec_of(**{"rope": ROPE, **options}).decode(encoded, torch.empty_like(like), NAME)


def test_another_rope_reads_what_one_wrote(encoded: np.ndarray) -> None:
    """It is in the stream, so that a change of the configuration costs no stored chunk and changes no number."""
    a, b = torch.empty(2, *chunk_of(FUSED).shape).half()
    codec_of(rope=ROPE).decode(encoded, a, NAME)
    codec_of(rope=pqcodec.Rope(500.0)).decode(encoded, b, NAME)
    assert (a == b).all()


@pytest.mark.parametrize("preset", ["pq3", "quad3"])
def test_warm_compiles_what_chunks_take(preset: str) -> None:
    """Also where a layer of quads gets a rate that only split coding has."""
    pytest.importorskip("numba")
    chunks = codec_of(rope=pqcodec.Rope(), preset=preset, backend="cpu")
    chunks.warm()
    ours = [module for name, module in sys.modules.items() if name.startswith("pqcodec.kernels.cpu")]
    kernels = [found for module in ours for found in vars(module).values() if hasattr(found, "nopython_signatures")]
    before = [len(kernel.signatures) for kernel in kernels]
    assert sum(before) > 5
    pair = gaussian(2, 8, HEADS, 128, DIM)
    pair[0, 3] *= 1000
    for dtype in TORCH_DTYPES:
        for layout in CHUNK_LAYOUTS:
            x = chunk_of(layout, pair).to(dtype)
            chunks.decode(chunks.encode(x, NAME), x, NAME)
    assert [len(kernel.signatures) for kernel in kernels] == before
