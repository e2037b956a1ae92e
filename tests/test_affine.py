"""What codings promise whose numbers share affine fields (SPEC 13 to 15): pair polar and scalar coding, held to closed forms.

Figures are those of arXiv 2502.00527's algorithm in plain numpy, measured beforehand on the same kind of data.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, bits, gaussian, rel_mse, sampled
from damage import every_flipped_bit_is_found, every_proper_prefix_is_truncated
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pqcodec
from pqcodec import CorruptStream, InvalidArgument, Rope
from pqcodec import constants as c
from pqcodec.attention import attend, scores
from pqcodec.codings import pairs, scalar
from pqcodec.codings.declared import Affine
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.stream.header import Header
from pqcodec.tools.cli import app

SHARING = [name for name, preset in pqcodec.PRESETS.items() if preset.affine]
FIXTURE = Path(__file__).parent / "data" / "smollm2_kv.safetensors"
# Gaussian vectors of 128 numbers, 4 x 2,048 of them: bits a coordinate with fields, without headers and checksums; relMSE
GAUSSIAN = {
    "wu44": (4.25, 0.0145),
    "wu33": (3.25, 0.0577),
    "wu35": (4.25, 0.0100),
    "wu24": (3.25, 0.0396),
    "int2": (3.0, 0.155),
    "kivi2-key": (3.0, 0.155),
}
KEYS = {  # of SmolLM2, 256 tokens, layers 0, 1, 15, 29: relMSE, with the arc of the paper and with the shortest one
    "wu44": (0.0060, 0.0047),
    "wu33": (0.0242, 0.0185),
    "wu24": (0.0172, None),
}
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # the least error of so many levels on Gaussian numbers


def coded(x: Any, preset: str, **options: Any) -> Any:
    """What a preset makes of a tensor."""
    return pqcodec.decode(pqcodec.encode(x, preset=preset, backend="cpu", **options), backend="cpu")


# -- figures -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", GAUSSIAN)
def test_gaussian_vectors_have_the_errors_and_bits_that_are_known(preset: str) -> None:
    x = gaussian(4, 2048, 128)
    rate, error = GAUSSIAN[preset]
    assert rel_mse(x, coded(x, preset)) == pytest.approx(error, rel=0.02)
    assert pqcodec.PRESETS[preset].rate == rate
    data = pqcodec.encode(x, preset=preset, backend="cpu")
    h = Header.from_bytes(data)
    beside = h.header_bytes + h.chunks * h.leading * (c.AFFINE_EXPONENT_BYTES + c.CHECKSUM_BYTES)
    assert 8 * (len(data) - beside) == rate * x.numel()
    assert h.bits_per_coordinate == rate
    assert len(data) == pqcodec.encoded_size(x.shape, "float32", preset=preset)


@pytest.mark.parametrize("preset", KEYS)
def test_keys_of_a_model_have_the_errors_that_are_known(preset: str) -> None:
    keys = [x[..., :256, :].contiguous() for name, x in load_file(FIXTURE).items() if name.endswith("key")]
    for effort, error in zip(("fast", "best"), KEYS[preset], strict=True):
        if error is not None:
            assert np.mean([rel_mse(x, coded(x, preset, effort=effort)) for x in keys]) == pytest.approx(error, rel=0.05)


def plan_of(coding: int, row_bits: int, radius_bits: int, affine: Affine, head_dim: int) -> Plan:
    """A plan that no preset has."""
    shape = (affine.tokens, head_dim)
    header = Header(coding, 3, shape, row_bits, radius_bits, chunk_tokens=affine.tokens, rounds=0, affine=affine)
    return plan_for(header)


@pytest.mark.parametrize(("bits_of_angle", "error"), [(2, 0.1994), (3, 0.0510), (4, 0.0128), (5, 0.0032)])
def test_the_error_of_angles_is_the_closed_form(bits_of_angle: int, error: float) -> None:
    """2 (1 - sinc(pi / 2^t)) on a full circle, with radii of 8 bits, whose own error is some hundred thousandths."""
    assert error == pytest.approx(2 * (1 - np.sinc(2.0**-bits_of_angle)), rel=0.01)
    affine = Affine(4096, 2, c.AFFINE_POLAR, c.ROPE_HALF, bits_of_angle)
    plan = plan_of(c.CODING_PAIRS, (8 + bits_of_angle) * 32, 8, affine, 64)
    x = np.random.default_rng(0).standard_normal((4096, 64))
    y, factor, _ = pairs.decode(pairs.encode(x, plan, 0, "fast"), 4096, (0, 4096), plan, 0)
    assert (factor == 1).all()
    assert ((x - y) ** 2).sum() / (x**2).sum() == pytest.approx(2 * (1 - np.sinc(2.0**-bits_of_angle)), rel=0.02)


def test_the_error_of_radii_is_the_closed_form() -> None:
    """A twelfth of a squared step, of a mean square of 2, with angles of 8 bits, whose own error is 2 (1 - sinc(pi / 256))."""
    plan = plan_of(c.CODING_PAIRS, 14 * 32, 6, Affine(128, 2, c.AFFINE_POLAR, c.ROPE_HALF, 8), 64)
    errors, wanted = [], []
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((128, 64))
        y, _, _ = pairs.decode(pairs.encode(x, plan, 0, "fast"), 128, (0, 128), plan, 0)
        radius = np.hypot(x[:, :32], x[:, 32:])
        steps = (radius.max(0) - radius.min(0)) / 64
        errors.append(((x - y) ** 2).sum())
        wanted.append(128 * (steps**2).sum() / 12 + (x**2).sum() * 2 * (1 - np.sinc(2.0**-8)))
    assert np.sum(errors) == pytest.approx(np.sum(wanted), rel=0.02)


@pytest.mark.parametrize("levels", LLOYD_MAX)
def test_a_uniform_grid_is_no_better_than_the_best_levels(levels: int) -> None:
    """Its range is that of all numbers, so the error is a twelfth of a squared step: that of Lloyd-Max levels is below."""
    affine = Affine(4096, 1024, c.AFFINE_SCALE_ZERO)
    plan = plan_of(c.CODING_SCALAR, levels * 16, 0, affine, 16)
    x = np.random.default_rng(0).standard_normal((4096, 16))
    y, _, _ = scalar.decode(scalar.encode(x, plan, 0, "fast"), 4096, (0, 4096), plan, 0)
    step = (x.max() - x.min()) / (2**levels - 1)
    error = ((x - y) ** 2).mean()
    assert error > LLOYD_MAX[levels]
    if levels >= 3:  # where the density is about even within a cell
        assert error == pytest.approx(step**2 / 12, rel=0.05)


# -- what an encoder does ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", SHARING)
@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("head_dim", sampled([1, 16, 50, 128, 7]))
def test_both_encoders_write_the_same_bytes(preset: str, effort: str, head_dim: int) -> None:
    for dtype, pairing in ((torch.float16, "half"), (torch.float32, "interleaved")):
        x = gaussian(2, 150, head_dim, dtype=dtype)
        x[:, :, head_dim // 3] = 0  # a pair's angles are then two or four, or none
        x[0, 5:20] = 0
        one, two = (pqcodec.encode(x, preset=preset, effort=effort, pairing=pairing, backend=name) for name in BACKENDS)
        assert one == two


@pytest.mark.parametrize("preset", SHARING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", sampled([1e-40, 1e-30, 1.0, 1e30, 3e38]))
def test_any_magnitude_is_coded_alike(preset: str, backend: str, scale: float) -> None:
    """Fields are float16, so blocks have an exponent, which reaches down into float32's subnormal numbers."""
    x = (gaussian(2, 130, 32, seed=1).double().clamp(-1, 1) * scale).float()
    y = pqcodec.decode(pqcodec.encode(x, preset=preset, backend=backend), backend=backend)
    assert y.isfinite().all()
    assert rel_mse(x / scale, y / scale) < (0.2 if "2" in preset else 0.08)


@pytest.mark.parametrize("preset", SHARING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_equal_numbers_are_kept(preset: str, backend: str) -> None:
    """Steps are 0 there, and nothing is divided by them. Zeros stay zeros, never -0."""
    for value in (0.0, 1.0, -2.0):
        x = torch.full((3, 140, 16), value, dtype=torch.float16)
        y = pqcodec.decode(pqcodec.encode(x, preset=preset, backend=backend), backend=backend)
        assert not np.signbit(y.numpy()[x.numpy() == 0]).any()
        torch.testing.assert_close(x, y, rtol=1e-3, atol=0)  # a radius of sqrt(2) is none of float16's


@pytest.mark.parametrize("preset", SHARING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_that_are_not_finite_widen_no_range(preset: str, backend: str) -> None:
    x = gaussian(2, 130, 16) + 8
    whole = x.clone()
    x[0, 3, 2], x[1, 0, 0], x[1, 129, 15] = float("nan"), float("inf"), float("-inf")
    data = pqcodec.encode(x, preset=preset, nonfinite="exact", backend=backend)
    y = pqcodec.decode(data, backend=backend)
    finite = x.isfinite().all(-1)
    np.testing.assert_array_equal(bits(y)[~finite.numpy()], bits(x)[~finite.numpy()])
    usual = coded(whole, preset)
    assert rel_mse(whole[finite], y[finite]) < 1.05 * rel_mse(whole[finite], usual[finite])
    nothing = torch.full((1, 3, 16), float("nan"))
    again = pqcodec.decode(pqcodec.encode(nothing, preset=preset, nonfinite="exact", backend=backend), backend=backend)
    assert again.isnan().all()


def test_pairs_are_those_that_the_stream_says() -> None:
    x = gaussian(2, 140, 32)
    mixed = torch.stack([x[..., :16], x[..., 16:]], -1).flatten(-2)  # channels i and i + 16 side by side
    one, two = coded(x, "wu44"), coded(mixed, "wu44", pairing="interleaved")
    torch.testing.assert_close(two, torch.stack([one[..., :16], one[..., 16:]], -1).flatten(-2), rtol=0, atol=0)
    found = [
        Header.from_bytes(pqcodec.encode(x, preset="wu44", backend="cpu", **options)).affine.pairing  # type: ignore[union-attr]
        for options in (
            {},
            {"pairing": "interleaved"},
            {"center": "rope", "rope": Rope(style="interleaved")},
            {"center": "rope", "rope": Rope(style="interleaved"), "pairing": "half"},
        )
    ]
    assert found == [c.ROPE_HALF, c.ROPE_INTERLEAVED, c.ROPE_INTERLEAVED, c.ROPE_HALF]
    with pytest.raises(InvalidArgument, match="pairing 'both' is unknown"):
        pqcodec.encode(x, preset="wu44", pairing="both")


def test_the_shortest_arc_is_never_longer() -> None:
    """Angles around the cut at 0: of a full circle the paper's range makes of them, two sixteenths are enough."""
    rng = np.random.default_rng(0)
    angle, radius = rng.uniform(-np.pi / 16, np.pi / 16, (128, 8)), rng.uniform(1, 2, (128, 8))
    x = torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32))
    errors = [rel_mse(x, coded(x, "wu44", effort=effort)) for effort in ("fast", "best")]
    assert errors[1] < errors[0] / 4


# -- chunks and groups ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "asked", "given"),
    [("wu44", 24, 128), ("wu33", 129, 256), ("kivi2-key", 64, 64), ("int4", 7, 7), ("nuq2-key", 64, 2048), ("nuq2", 7, 7)],
)
def test_chunks_are_whole_groups(preset: str, asked: int, given: int) -> None:
    x = gaussian(1, 300, 16)
    data = pqcodec.encode(x, preset=preset, chunk_tokens=asked, backend="cpu")
    assert pqcodec.inspect(data).chunk_tokens == given
    assert pqcodec.inspect(data).preset == preset
    assert len(data) == pqcodec.encoded_size(x.shape, "float32", preset=preset, chunk_tokens=asked)
    with pytest.raises(InvalidArgument, match="chunk_tokens 192 is no multiple of the 128 tokens of a group"):
        Header(4, 3, (4, 16), 64, 4, chunk_tokens=192, rounds=0, affine=Affine(128, 2, 3, 1, 4))


@pytest.mark.parametrize("preset", SHARING)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"center": "rope", "rope": Rope(), "exact_tokens": 3}], ids=["plain", "rope"])
def test_ranges_are_slices_of_the_whole(preset: str, backend: str, options: dict[str, Any]) -> None:
    x = gaussian(2, 300, 32)
    data = pqcodec.encode(x, preset=preset, chunk_tokens=256, backend="cpu", **options)
    whole = pqcodec.decode(data, backend=backend)
    for first, last in ((0, 300), (0, 2), (100, 140), (127, 129), (255, 258), (299, 300), (60, 60)):
        part = pqcodec.decode(data, tokens=(first, last), leading=(1, 2), backend=backend)
        np.testing.assert_array_equal(bits(part), bits(whole[1:, first:last]))


def test_a_header_has_no_more_bytes_than_there_may_be() -> None:
    """Of 8 dimensions and RoPE of all 1,024 channels it would, with affine fields."""
    rope = Rope(frequencies=tuple(0.001 for _ in range(512)))
    x = np.zeros((1, 1, 1, 1, 1, 1, 2, 1024), np.float32)
    pqcodec.decode(pqcodec.encode(x, preset="pq3", center="rope", rope=rope, backend="cpu"))
    with pytest.raises(InvalidArgument, match="2180 are the most; give the tensor fewer dimensions"):
        pqcodec.encode(x, preset="wu44", center="rope", rope=rope, backend="cpu")
    pqcodec.decode(pqcodec.encode(x[0, 0], preset="wu44", center="rope", rope=rope, backend="cpu"))


# -- damage --------------------------------------------------------------------------------------------------------
@pytest.fixture(params=sampled(["wu33", "int4", "kivi2-key", "nuq3", "kvquant2"], of=3))
def stream(request: pytest.FixtureRequest) -> bytes:
    """A stream with every section, of two blocks a leading index where groups are small."""
    x = gaussian(2, 40, 16, seed=3)
    x[1, 5, 2] = float("nan")
    options: dict[str, Any] = {"center": "rope", "rope": Rope(theta=100.0, dim=8), "exact_tokens": 1, "nonfinite": "exact"}
    return pqcodec.encode(x, preset=request.param, chunk_tokens=32, backend="cpu", **options)


def test_every_proper_prefix_is_truncated(stream: bytes) -> None:
    every_proper_prefix_is_truncated(stream, partial(pqcodec.decode, backend="cpu"))


def test_every_flipped_bit_is_found(stream: bytes) -> None:
    every_flipped_bit_is_found(stream, partial(pqcodec.decode, backend="cpu"))


# -- files ---------------------------------------------------------------------------------------------------------
def test_the_command_line_takes_pairs_and_tells_groups(tmp_path: Path) -> None:
    save_file({"layers.0.key": gaussian(1, 2, 150, 16).half()}, tmp_path / "kv.safetensors")
    options = ["--preset", "wu33", "--center", "none", "--effort", "best", "--pairing"]
    file = str(tmp_path / "kv.pqkv")
    one = CliRunner().invoke(app, ["encode", str(tmp_path / "kv.safetensors"), file, *options, "interleaved"])
    assert one.exit_code == 0, one.stderr
    (tensor,) = json.loads(CliRunner().invoke(app, ["inspect", file, "--json"]).stdout)["tensors"]
    found = tensor["stream"]
    assert (found["preset"], found["coding"], found["group"]) == ("wu33", "pair polar", [128, 2])
    assert (found["pairing"], found["chunk_tokens"]) == ("interleaved", 128)
    other = CliRunner().invoke(app, ["encode", str(tmp_path / "kv.safetensors"), file, "--force", *options, "both"])
    assert other.exit_code == 2
    assert "pairing 'both' is unknown" in other.stderr


# -- attention -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["wu44", "kivi4-key", "int4", "nuq4"])
def test_attention_is_that_to_decoded_keys_and_values(backend: str, preset: str) -> None:
    keys, values, q = gaussian(2, 200, 32), gaussian(2, 200, 32, seed=1), gaussian(4, 1, 32, seed=2)
    k, v = (pqcodec.encode(x[None], preset=preset, center="mean", backend="cpu") for x in (keys, values))
    one, two = (pqcodec.decode(data).double()[0].repeat_interleave(2, 0) for data in (k, v))
    expected = q.double() @ one.transpose(-1, -2) / 32**0.5
    torch.testing.assert_close(scores(k, q[None], backend=backend)[0].double(), expected, rtol=1e-4, atol=1e-5)
    out = attend(q[None], k, v, backend=backend)[0].double()
    torch.testing.assert_close(out, expected.softmax(-1) @ two, rtol=1e-4, atol=1e-5)


def test_scores_tell_damage_and_take_ranges() -> None:
    keys, q = gaussian(2, 300, 32), gaussian(2, 40, 32, seed=2)  # more queries than kernels of rotated codings take at once
    data = bytearray(pqcodec.encode(keys[None], preset="wu44", exact_tokens=2, backend="cpu"))
    decoded = pqcodec.decode(bytes(data), backend="cpu").double()[0]
    found = scores(bytes(data), q[None], tokens=(100, 290), backend="cpu")[0].double()
    torch.testing.assert_close(found, q.double() @ decoded[:, 100:290].mT / 32**0.5, rtol=1e-4, atol=1e-5)
    h = Header.from_bytes(bytes(data))
    data[h.blocks.place(1, 1) + 5] ^= 1
    with pytest.raises(CorruptStream, match=r"payload, leading index 1, tokens 130 \.\. 257"):
        scores(bytes(data), q[None], backend="cpu")
    scores(bytes(data), q[None], check=False, backend="cpu")
    scores(bytes(data), q[None], tokens=(0, 130), backend="cpu")


@pytest.mark.parametrize("preset", ["int2", "int4", "wu44", "q4_0"])
def test_zeros_of_both_signs_are_encoded_alike_by_all(preset: str) -> None:
    """Which of +0 and -0 is the least of a group depends on the order in which they are compared."""
    x = torch.zeros(1, 130, 64) * torch.randn(130, 64, generator=torch.Generator().manual_seed(0)).sign()
    assert pqcodec.encode(x, preset=preset, backend="cpu") == pqcodec.encode(x, preset=preset, backend="reference")
