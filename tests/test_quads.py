"""The quads coding: its errors, its radii, its search, and what its blocks are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, gaussian

import pqcodec
from pqcodec import constants as c
from pqcodec.codings import quads
from pqcodec.codings.plan import plan_for
from pqcodec.errors import InvalidArgument, UnsupportedStream
from pqcodec.kernels.on_cuda import quads_encoder, tables
from pqcodec.kernels.on_cuda.factors import MOST_WHOLE
from pqcodec.options import EncodeOptions
from pqcodec.stages import centre
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header

PRESETS = [name for name in pqcodec.PRESETS if name.startswith("quad")]
WORST = {  # relMSE of Gaussian vectors of 128 numbers: fast, and best
    "quad2": (0.102, 0.1005),
    "quad2.25": (0.0745, 0.0722),
    "quad2.5": (0.053, 0.0512),
    "quad2.75": (0.0375, 0.0357),
    "quad3": (0.0268, 0.0253),
    "quad3.25": (0.0190, 0.0178),
    "quad3.5": (0.0138, 0.0131),
}


def error(x: np.ndarray, y: np.ndarray) -> float:
    """||x - y||^2 / ||x||^2."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(((x - y) ** 2).sum() / (x**2).sum())


@pytest.mark.parametrize("preset", PRESETS)
def test_errors_of_gaussian_vectors(preset: str) -> None:
    x = gaussian(4, 1000, 128, seed=5).float().numpy()
    for effort, most in zip(("fast", "best"), WORST[preset], strict=True):
        data = pqcodec.encode(x, preset=preset, effort=effort, backend="cpu")
        assert error(x, pqcodec.decode(data)) <= most
        assert len(data) == pqcodec.encoded_size(x.shape, "float32", preset=preset)


@pytest.mark.parametrize("bits", c.QUADS_INDEX_BITS)
def test_the_search_finds_the_nearest_point(bits: int) -> None:
    """Against all points, one by one."""
    table = quads.points_of(bits)
    points = table.points.astype(np.float64)
    assert len(np.unique(points, axis=0)) == 1 << bits
    assert points.min() >= 1
    x = np.abs(np.random.default_rng(bits).standard_normal((500, 4))) * table.grid
    _, codes, _ = quads._nearest(x.reshape(1, -1), table, "fast")
    norm = np.sqrt((x**2).mean())
    unit = 2 ** (np.floor(8 * np.log2(norm) + 0.5) / 8) / table.aim
    off = ((x[:, None] / unit - points) ** 2).sum(2)
    np.testing.assert_allclose(off[np.arange(len(x)), codes[0]], off.min(1), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_keeps_radii_from_its_largest_vector_on(backend: str) -> None:
    """2^-31.75 of it is the least that is not zero; another block counts anew."""
    x = np.ones((12, 64), np.float32) * np.float32(2.0) ** np.arange(20, -40, -5, dtype=np.float32)[:, None]
    x[5] = 0
    data = pqcodec.encode(x, preset="quad3", chunk_tokens=8, backend=backend)
    y = pqcodec.decode(data, backend=backend)
    kept = np.array([True] * 5 + [False, True, False] + [True] * 4)  # 2^-10 is the last above 2^-11.75
    assert (y.any(1) == kept).all()
    assert error(x[kept], y[kept]) < 0.05
    assert (np.signbit(y) == 0)[~kept].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_every_size(backend: str) -> None:
    for power in range(-140, 128, 7):
        x = np.ldexp(gaussian(3, 64, seed=1).float().numpy().clip(-1, 1), power).astype(np.float32)
        y = pqcodec.decode(pqcodec.encode(x, preset="quad3", backend=backend), backend=backend)
        assert error(x, y) < (0.06 if power > -120 else 1.1), power


def test_blocks_are_multiples_of_sixteen_bytes_whose_rest_is_zero() -> None:
    for head_dim, tokens in ((16, 5), (64, 1), (80, 33), (128, 64)):
        data = pqcodec.encode(gaussian(2, tokens, head_dim), preset="quad2.25", chunk_tokens=32)
        h = Header.from_bytes(data)
        for chunk in range(h.chunks):
            for lead in range(h.leading):
                place, size = h.blocks.place(chunk, lead), h.blocks.size(chunk)
                assert size % 16 == 0
                block, rows = data[place : place + size], h.blocks.tokens(chunk)
                assert not any(block[rows * h.row_bytes + 2 : -4])
                assert checksum(block[:-4]) == int.from_bytes(block[-4:], "little")
        assert place + size == len(data)


def test_any_block_decodes_to_finite_numbers_and_alike() -> None:
    rng = np.random.default_rng(0)
    for preset in PRESETS:
        data = bytearray(pqcodec.encode(gaussian(2, 7, 96).float(), preset=preset))
        h = Header.from_bytes(data)
        for lead in range(2):
            place, size = h.blocks.place(0, lead), h.blocks.size(0)
            body = rng.bytes(size - 4)
            data[place : place + size] = body + checksum(body).to_bytes(4, "little")
        outs = [pqcodec.decode(bytes(data), backend=backend).numpy() for backend in ("reference", "cpu")]
        np.testing.assert_array_equal(outs[0].view(np.uint32), outs[1].view(np.uint32))
        assert np.isfinite(outs[0]).all()


def test_what_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="effort 'most' is unknown; choose 'fast' or 'best'"):
        pqcodec.encode(gaussian(4, 64), preset="quad3", effort="most")
    header = Header.from_bytes(pqcodec.encode(gaussian(4, 64), preset="quad3"))
    for change in ({"row_bits": header.row_bits + 1}, {"row_bits": header.row_bits + 128}, {"radius_bits": 11}, {"rounds": 1}):
        with pytest.raises(InvalidArgument):
            replace(header, **change)
    reserved = bytearray(header.to_bytes())
    reserved[45] = 3  # states of a trellis
    reserved[-4:] = checksum(bytes(reserved[:-4])).to_bytes(4, "little")
    with pytest.raises(UnsupportedStream, match="states"):
        Header.from_bytes(bytes(reserved))


def test_best_effort_is_the_same_format_and_never_worse() -> None:
    x = gaussian(3, 200, 64, seed=3).float()
    for preset in PRESETS:
        fast, best = (pqcodec.encode(x, preset=preset, effort=effort) for effort in ("fast", "best"))
        assert Header.from_bytes(fast) == Header.from_bytes(best)
        table = quads.table_of(plan_for(Header.from_bytes(fast)))
        decoded = [pqcodec.decode(data) for data in (fast, best)]
        errors = [((x * table.aim / table.grid - y) ** 2).sum(-1) for y in decoded]  # of what encoders aim at
        assert (errors[1] <= errors[0] * 1.0001).all()
        assert error(x.numpy(), decoded[1].numpy()) < error(x.numpy(), decoded[0].numpy())


@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoded_vectors_keep_their_norm(backend: str, effort: str) -> None:
    """A nearest point is shorter than what it stands for, so encoders aim further out; at 2 bits they go half of the way.

    The split coding's encoders do the same with their radii.
    """
    x = gaussian(2, 128, 128, seed=6).float().numpy()
    for preset in pqcodec.PRESETS if effort == "fast" else PRESETS:
        if not pqcodec.PRESETS[preset].own:
            continue
        y = pqcodec.decode(pqcodec.encode(x, preset=preset, effort=effort, backend=backend), backend=backend)
        assert abs((y**2).sum() / (x**2).sum() - 1) < (0.07 if preset in ("quad2", "pq2") else 0.006), preset


@pytest.mark.parametrize(
    ("style", "order", "dim"),
    [
        *(("half", 128, 128), ("half", 96, 96), ("half", 128, 80), ("interleaved", 64, 64), ("interleaved", 96, 20)),
        *(("half", 320, 320), ("half", 320, 128), ("half", 320, 32), ("half", 320, 80), ("interleaved", 320, 20)),  # in factors
    ],
)
def test_means_that_the_cuda_encoder_turns_by_tiles_are_where_the_rows_want_them(style: str, order: int, dim: int) -> None:
    rope = pqcodec.Rope(theta=1e4, dim=dim, style=style, first_position=99).field(order)
    factors = order > MOST_WHOLE
    pairs, rows, interleaved = np.arange(dim // 2), 8 if factors else 16, style == "interleaved"
    first, second = (2 * pairs, 2 * pairs + 1) if interleaved else (pairs, pairs + len(pairs))
    partner = np.arange(order)
    partner[first], partner[second] = second, first
    whole = len(pairs) % (64 if factors else 32) == 0
    apart = len(pairs) // 32 if not interleaved and whole else 0  # pieces to that with the same turns
    found = tables.turns_of_tile(rope, rows, factors)
    wanted = centre.offset_at(rope, gaussian(order).numpy(), np.arange(3 * rows))
    turned = wanted[0].copy()
    for tile in range(3):
        for part, lane, piece in np.ndindex(rows // 8, 32, order // 32):
            first_channel = 32 * piece + 8 * (lane % 4)
            if factors:
                first_channel = piece // 2 * 64 + lane % 4 * 16 + (piece % 2 ^ lane // 4 % 2) * 8
            channels, row = first_channel + np.arange(8), rows * tile + 8 * part + lane // 4
            of = piece % apart if piece < 2 * apart else piece
            cos, sin = np.ones(8), np.zeros(8)
            if of < len(found["ROW_TURNS"]):
                cos, sin = np.repeat(found["ROW_TURNS"][of, part, :, lane].reshape(-1, 2), 2 if interleaved else 1, 0).T
            signs = np.array([1, -1] * 4) if interleaved else -1 if apart and piece >= apart else 1
            offsets = turned[channels] * cos - turned[partner[channels]] * sin * signs
            assert np.allclose(offsets, wanted[row, channels], atol=1e-3), (tile, part, lane, piece)
        cos, sin = found["TILE_TURN"].T
        one, two = turned[first], turned[second]
        turned[first], turned[second] = one * cos - two * sin, two * cos + one * sin


@pytest.mark.parametrize("bits", [4, 7, 8, 9, 10])
@pytest.mark.parametrize("cells", quads_encoder.CELLS, ids=str)
def test_candidates_of_cells_nearly_always_hold_the_nearest(bits: int, cells: quads_encoder.Cells) -> None:
    """What the CUDA encoder looks at, against all representatives: at most 1.7 % more error, rounding to steps included."""
    table = quads.points_of(bits)
    step = table.aim * quads_encoder.REACH / quads_encoder.STEPS
    x = np.sort(np.abs(np.random.default_rng(bits).standard_normal((200000, 4))), 1)[:, ::-1] * table.aim
    steps = np.minimum(np.floor(x / step + 0.5), quads_encoder.STEPS)
    candidates = quads_encoder.cells_of(bits, cells)[cells.places(steps)][:, : quads_encoder.CANDIDATES[bits]].astype(np.int64)

    def scores(y: np.ndarray) -> np.ndarray:
        """The larger, the nearer: half of each square less than half of each squared distance."""
        return y @ table.representatives.T - (table.representatives**2).sum(1) / 2

    def error(representatives: np.ndarray) -> float:
        return float(((x - table.representatives[representatives]) ** 2).sum())

    best = np.take_along_axis(scores(steps * step), candidates, 1).argmax(1)
    assert error(candidates[np.arange(len(x)), best]) <= 1.017 * error(scores(x).argmax(1))


@pytest.mark.parametrize("bits", [bits for bits, count in quads_encoder.CANDIDATES.items() if count == 2])
@pytest.mark.parametrize("copies", quads_encoder.COPIES[:-1], ids=str)
def test_groups_among_cells_take_no_cell_that_quads_have(bits: int, copies: quads_encoder.Copies) -> None:
    plan = plan_for(replace(EncodeOptions("quad3").header((1, 64, 128), c.DTYPE_BFLOAT16), row_bits=(bits + 4) * 32 + 8))
    few, many = (quads_encoder.encoder_tables(plan, each, "fast") for each in (copies._replace(own=1, groups=1), copies))
    magnitudes = np.random.default_rng(bits).normal(size=(1 << 16, 4)) * np.array([[1], [2], [4], [16]]).repeat(1 << 14, 0)
    steps = np.minimum(np.sort(np.abs(magnitudes))[:, ::-1] * 32, quads_encoder.STEPS)
    cell = np.unique(quads_encoder.CELLS[copies.cells].places(steps))
    heads = few["HEADS"][few["CELLS"][cell] // 4], many["CELLS"][cell]
    points = (1 << bits) - 1  # of a candidate's word; where its pattern is depends on how many copies there are
    assert np.array_equal(heads[0] >> 16 & points, heads[1] >> 16 & points)
    size, count = few["GROUPS"][0].nbytes, copies.groups
    begins = [(head & 0xFFFF).astype(np.int64) for head in heads]
    assert (begins[1] % (size * count) == 0).all()  # kernels add the place of a lane's copy by "or"
    one, own = few["GROUPS"].ravel(), many.get("GROUPS", many["CELLS"]).view(np.int32).ravel()
    expected = np.tile(one[begins[0][:, None] // 4 + np.arange(size // 4)], count).reshape(len(cell), -1, 2)
    found = own[begins[1][:, None] // 4 + np.arange(size * count // 4)].reshape(len(cell), -1, 2)
    assert np.array_equal(found[..., 0], expected[..., 0])
    for bits_of in (lambda word: word >> quads_encoder.SCORE_AT, lambda word: word & points):
        assert np.array_equal(bits_of(found[..., 1]), bits_of(expected[..., 1]))


def test_the_tables_are_those_that_were_trained() -> None:
    trained = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "quad_tables.json").read_text())["tables"]
    for bits in c.QUADS_INDEX_BITS:
        grid, listed = c.QUADS_TABLES[bits]
        assert grid == trained[str(bits)]["grid"]
        assert [list(map(int, each.split())) for each in listed.split(",")] == trained[str(bits)]["representatives"]
