"""SPEC.md's own claims: derived numbers lie far from the edges of their rounding, and the tables are those it names."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Iterator
from decimal import Decimal, localcontext
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import second_decoder
import second_reader
import spec_vectors as vectors

import pqcodec
from pqcodec import constants as c
from pqcodec.codings import angles, paper, quads, sketch
from pqcodec.codings.declared import Sketch
from pqcodec.codings.plan import plan_for
from pqcodec.formats import PQKVFile
from pqcodec.formats.store.keys import Chain
from pqcodec.stages import centre, rotation
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header

ROOT = Path(__file__).parents[1]
SPEC = (ROOT / "formats" / "SPEC.md").read_text()
MARGIN = 5e-5  # of a rounding step, as section 6.6 says
KINDS = sorted({(table.m_a, table.m_b) for order in c.ROTATION_ORDERS for table in angles.tree(order).tables})


def to_integer(x: np.ndarray) -> float:
    """Distance to the nearest integer, the smallest of an array's."""
    return float(np.abs(x - np.rint(x)).min(initial=1.0))


def truncation_margin(x: np.ndarray) -> float:
    """Distance to the nearest float16 number, in steps; exact zeros and ones are left out."""
    x = np.abs(x[(np.abs(x) > 1e-12) & (np.abs(x) != 1)])
    return to_integer(x / np.exp2(np.maximum(np.frexp(x)[1] - 11, -24)))


def rounding_margin(x: np.ndarray) -> float:
    """Distance to the nearest middle between two float32 numbers, in steps."""
    return to_integer(x / np.exp2(np.frexp(x)[1] - 24) - 0.5)


def bound_margin(m_a: int, m_b: int, n: int) -> float:
    harmonic = 2 * m_a * m_b / (m_a + m_b) + c.CELL_SPREAD_OFFSET
    spread = c.CELL_SPREAD / np.sqrt(harmonic) * (1 + c.CELL_SPREAD_SMALL / harmonic)
    j = np.array([j for j in range(1, n) if not (m_a == m_b and 2 * j == n)], np.float64)
    tan2 = m_b / m_a * (j / (n - j)) ** (2 * spread)
    return to_integer((1 << angles.grid_bits(m_a + m_b)) * tan2 / (1 + tan2) + 0.5)


def margins() -> Iterator[tuple[str, float]]:
    for m_a, m_b in KINDS:
        for width in range(c.MAX_ANGLE_BITS + 1):
            place = f"node ({m_a}, {m_b}), {width} bits"
            cos, sin = angles.cell_means(angles.cell_bounds(m_a, m_b, 1 << width), m_a, m_b)
            yield f"{place}, bounds", bound_margin(m_a, m_b, 1 << width)
            yield f"{place}, cos", truncation_margin(cos)
            yield f"{place}, sin", truncation_margin(sin)
            if width:
                yield f"{place}, shift", to_integer(m_a * m_b / (m_a + m_b) * np.log2(cos / sin * np.sqrt(m_b / m_a)) + 0.5)
    quads = angles.quad_table()
    for budget, (n, first, codes) in enumerate(zip(quads.cells, quads.first, quads.per_cell, strict=True)):
        cos, sin = angles.cell_means(angles.cell_bounds(2, 2, n), 2, 2)
        records, k = slice(first, first + n), np.arange(n)
        ratio = np.where(2 * k <= n - 1, cos / sin, sin / cos)[2 * k != n - 1]
        yield f"quad of {budget}, bounds", bound_margin(2, 2, n)
        yield f"quad of {budget}, split", to_integer(np.sqrt(codes * ratio))
        yield f"quad of {budget}, cos", truncation_margin(cos * angles.circle_shrink(quads.n_a[records]))
        yield f"quad of {budget}, sin", truncation_margin(sin * angles.circle_shrink(quads.n_b[records]))
        if budget % 3:
            yield f"quad of {budget}, cells", to_integer(np.array([2 ** (budget / 3 - 1) + 0.5]))
    for x in angles.full_circle(c.CIRCLE):
        yield "circle", truncation_margin(x)
    for order in c.ROTATION_ORDERS:
        for bits, steps in c.RADIUS_STEPS_PER_OCTAVE.items():
            yield (
                f"radius, order {order}, {bits} bits",
                min(rounding_margin(np.exp2(np.arange(steps) / steps) / (c.GRID * np.sqrt(m))) for m in (order, order**2)),
            )
    size = 1 << c.PHASE_TABLE_BITS
    for x in (*angles.full_circle(size), *(table[:size] for table in angles.full_circle(size * size))):
        yield "phases", rounding_margin(np.abs(x[(x != 0) & (np.abs(x) != 1)]))


def test_no_derived_number_is_near_an_edge_of_its_rounding() -> None:
    """float64 is good to 1e-12 of a step here, so every implementation finds the same tables."""
    place, smallest = min(margins(), key=lambda found: found[1])
    assert smallest > MARGIN, place
    assert "nearer\nto an edge of its rounding than 5e-5 of a step" in SPEC


def test_means_are_accurate_far_beyond_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    for m_a, m_b in KINDS:
        bounds = angles.cell_bounds(m_a, m_b, 8)
        usual = angles.cell_means(bounds, m_a, m_b)
        with monkeypatch.context() as patch:
            patch.setattr(angles, "_PARTS", 16)
            finer = angles.cell_means(bounds, m_a, m_b)
        np.testing.assert_allclose(usual, finer, rtol=1e-14)


def tables() -> Iterator[tuple[str, list[np.ndarray]]]:
    for pair in KINDS:
        node = angles.node_table(*pair)
        yield f"node {pair[0]}, {pair[1]}", [node.cos[1:], node.sin[1:], node.shift[1:]]
    leaves = angles.quad_table()
    yield "quads", [leaves.n_a, leaves.n_b, leaves.cos, leaves.sin]
    yield "circle", list(angles.circle_table())
    yield "permutations", [rotation.permutation(order) for order in c.ROTATION_ORDERS]
    yield "base matrices", [rotation.base_matrix(base).astype(np.int8) for base in c.HADAMARD_BASES[1:]]
    yield "paper", [x for level in (2, 3, 4) for x in paper.paper_cells(level)[1:]]
    yield "phases", list(centre.phase_tables())
    every = product((1, 2), c.RADIUS_BITS, c.ROTATION_ORDERS)
    yield "m", [mantissas(c.CODING_SPLIT, order, order, bits, rounds) for rounds, bits, order in every]
    every = product(c.QUADS_INDEX_BITS, c.ROTATION_ORDERS)
    yield (
        "m of quads",
        [mantissas(c.CODING_QUADS, n, c.QUADS_RADIUS_BITS + n + b * n // 4, c.QUADS_RADIUS_BITS, 2) for b, n in every],
    )


def mantissas(coding: int, order: int, row_bits: int, radius_bits: int, rounds: int) -> np.ndarray:
    """The factors m of a kind of rows."""
    return plan_for(Header(coding, c.DTYPE_FLOAT32, (order,), row_bits, radius_bits, rounds=rounds)).mantissas


@pytest.mark.parametrize(("name", "arrays"), list(tables()), ids=lambda value: value if isinstance(value, str) else "")
def test_tables_have_the_hashes_of_the_specification(name: str, arrays: list[np.ndarray]) -> None:
    digest = hashlib.sha256(b"".join(x.astype(x.dtype.newbyteorder("<")).tobytes() for x in arrays)).hexdigest()
    found = re.search(rf"^\| {re.escape(name)} \|(?:.*\|)? `([0-9a-f]{{64}})` \|$", SPEC, re.MULTILINE)
    assert found, f"| {name} | ... | `{digest}` | is not in SPEC.md"
    assert found[1] == digest


@pytest.mark.parametrize("bits", c.QUADS_INDEX_BITS)
def test_points_of_quads_are_those_of_the_specification(bits: int) -> None:
    digest = hashlib.sha256(quads.points_of(bits).points.tobytes()).hexdigest()
    assert f"| {bits} | `{digest}` |" in SPEC
    grid, listed = c.QUADS_TABLES[bits]
    assert f"| {bits} | {grid:g} | {listed} |" in SPEC


def test_the_worked_example_of_quads_holds() -> None:
    lines = re.search(r"### 8.4 Example\n.*?\n\n(.*?)\n\n", SPEC, re.DOTALL)
    assert lines
    stream = bytes.fromhex("".join(re.match(r"    ((?:[0-9a-f]{2} )*[0-9a-f]{2})", line)[1] for line in lines[1].splitlines()))
    x = np.array([(-1) ** i * (i + 1) for i in range(12)], np.float32)
    assert pqcodec.encode(x, preset="quad2", backend="reference") == stream
    told = re.search(r"### 8.4 Example\n.*?- The numbers are ([^\n]*)\.\n", SPEC, re.DOTALL)
    assert told
    assert pqcodec.decode(stream).tolist() == [float(number) for number in told[1].split(", ")]
    ((v, a, b),) = second_decoder.quad_rows(stream[60:-4], 1, 16, 40)
    turned = second_decoder.turned_back(v, 0, True)
    assert f"- With the signs v = {', '.join(map(str, v))}.\n- Radius: code 255, base -233, so r = 21, e = 2, j = 5" in SPEC
    assert f"e = 2, j = 5: A = {float(a)!r}, B = {float(b):g}.\n- s = {', '.join(map(str, turned))}.\n" in SPEC
    assert (stream[64], int.from_bytes(stream[65:67], "little", signed=True)) == (255, -233)


def test_encoders_aim_as_far_out_as_the_specification_advises() -> None:
    *most, last = (f"{stretch:g} G" for stretch in c.QUADS_STRETCH.values())
    text = " ".join(SPEC.split())
    assert f"{', '.join(most)} and {last} for b = 4 .. 10 keep the norm of vectors" in text
    split = f"{c.SPLIT_STRETCH:g} 4^(-row_bits / N) + {c.SPLIT_CUT_OFF:g}, {c.SPLIT_MOST_STRETCH:g}".replace("0.", ".")
    assert f"to the norm times 1 + min({split})" in text


def example(section: str) -> list[str]:
    """The indented blocks of a section, in their order."""
    body = SPEC[SPEC.index(section) :].split("\n", 1)[1]
    body = re.split(r"^#", body, maxsplit=1, flags=re.MULTILINE)[0]
    return [block.strip("\n") for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", body, re.MULTILINE)]


def test_the_worked_example_of_split_coding_holds() -> None:
    lines, trace = example("### 6.7 Example")
    stream = vectors.split_stream()
    assert (lines, trace) == ("\n".join(vectors.hex_lines(stream, vectors.SPLIT_NOTES)), "\n".join(vectors.split_trace(stream)))
    assert vectors.bytes_of(lines) == stream
    integers, a, b = second_decoder.split_row(int.from_bytes(stream[-8:-4], "little"), 16, 32, 11, True)
    turned = ", ".join(map(str, second_decoder.turned_back(integers, 0, True)))
    numbers = ", ".join(str(x) for x in pqcodec.decode(stream)[0].tolist())
    assert f"Radius code 1119: e = 4, j = 5, A = {float(a)!r}, B = {float(b):g}." in SPEC
    assert f"- With flag 8, s = {turned}.\n- The numbers are {numbers}.\n" in SPEC


def test_the_worked_example_of_offsets_holds() -> None:
    lines, trace = example("### 9.4 Example")
    stream = vectors.rope_stream()
    assert (lines, trace) == ("\n".join(vectors.hex_lines(stream, vectors.ROPE_NOTES)), "\n".join(vectors.rope_trace(stream)))
    first, exact, last = pqcodec.decode(stream).tolist()
    assert exact == [math.inf, 1, 1, 1]
    assert f"and the numbers are {tuple(first)}, the exact vector, and {tuple(last)}.\n" in SPEC


def test_the_worked_example_of_offsets_that_turn_run_by_run_holds() -> None:
    lines, begins, rows = example("### 9.6 Example")
    stream = vectors.run_stream()
    assert lines == "\n".join(vectors.hex_lines(stream, vectors.RUN_NOTES))
    assert (begins, rows) == tuple("\n".join(vectors.run_trace(stream)).split("\n\n"))
    numbers = ", ".join(str(tuple(row)) for row in pqcodec.decode(stream, backend="reference").tolist())
    assert f"The numbers are {numbers}.\n" in SPEC


def test_the_worked_example_of_pair_polar_coding_holds() -> None:
    lines, trace = example("### 14.1 Example")
    stream = vectors.affine_stream("wu44")
    assert (lines, trace) == ("\n".join(vectors.hex_lines(stream, vectors.PAIR_NOTES)), "\n".join(vectors.pair_trace(stream)))
    assert second_decoder.decode(stream).view(np.float32).tolist() == pqcodec.decode(stream).tolist()


def test_the_worked_example_of_kept_tokens_holds() -> None:
    lines, trace = example("### 17.3 Example")
    stream = vectors.keep_stream()
    assert (lines, trace) == ("\n".join(vectors.hex_lines(stream, vectors.KEEP_NOTES)), "\n".join(vectors.keep_trace(stream)))
    rows, positions = pqcodec.decode_kept(stream)
    assert positions.tolist() == second_decoder.positions(stream)[0] == [0, 3, 4]
    assert second_decoder.decode(stream).view(np.float16).tolist() == rows.tolist()


def test_the_worked_examples_of_rows_that_are_not_vectors_hold() -> None:
    lines, others, shared = example("### 18.4 Examples")
    stream = vectors.linear_stream()
    assert others == "\n".join(vectors.hex_lines(stream, vectors.LINEAR_NOTES))
    assert "\n".join(vectors.linear_trace(stream)) in SPEC
    assert second_decoder.decode(stream).view(np.float16).tolist() == pqcodec.decode(stream).tolist()
    table = vectors.BASIS
    named = vectors.linear_stream(table)
    assert shared == "\n".join(vectors.hex_lines(named, vectors.SHARED_BASIS_NOTES))
    assert f"has {len(table.to_bytes())} bytes, `{table.to_bytes()[:20].hex(' ')}` and the matrix" in SPEC
    assert f"its name is\n{table.name}. With linear 4 the stream is {len(named)} bytes" in SPEC
    assert vectors.linear_trace(named) == vectors.linear_trace(stream)
    assert pqcodec.decode(named, tables=table).tolist() == pqcodec.decode(stream).tolist()
    stream = vectors.joined_stream()
    assert lines == "\n".join(vectors.hex_lines(stream, vectors.JOINED_NOTES))
    told = ", ".join(f"{x:.9g}" for x in second_decoder.coded_rows(stream)[0, 0])
    assert f"are {len(stream)} bytes:\n\n{lines}" in SPEC
    assert f"of both vectors, are {told}.\n" in SPEC
    assert second_decoder.decode(stream).view(np.float16).tolist() == pqcodec.decode(stream).tolist()


def test_the_worked_example_of_vectors_before_rope_holds() -> None:
    lines, trace = example("### 19.2 Example")
    stream = vectors.before_rope_stream()
    assert lines == "\n".join(vectors.hex_lines(stream, vectors.BEFORE_ROPE_NOTES))
    assert trace == "\n".join(vectors.before_rope_trace(stream))
    assert second_decoder.decode(stream).view(np.float16).tolist() == pqcodec.decode(stream).tolist()


def test_the_worked_example_of_a_sketch_holds() -> None:
    (lines,) = example("### 21.6 Example")
    stream = vectors.sketch_stream()
    assert lines == "\n".join(vectors.hex_lines(stream, vectors.SKETCH_NOTES))
    told = " ".join(SPEC.split())
    assert all(numbers in told for numbers in vectors.sketch_trace(stream))
    assert second_decoder.decode(stream).view(np.float32).tolist() == pqcodec.decode(stream, estimate="unbiased").tolist()


def test_the_worked_example_of_scalar_coding_holds() -> None:
    (lines,) = example("### 15.1 Example")
    stream = vectors.affine_stream("int4")
    assert lines == "\n".join(vectors.hex_lines(stream, vectors.SCALAR_NOTES))
    numbers = pqcodec.decode(stream)
    assert second_decoder.decode(stream).view(np.float32).tolist() == numbers.tolist()
    fields = struct.unpack_from("<6H", stream, 108)
    for token, row in enumerate(numbers.tolist()):
        scale, zero = map(second_decoder.half, fields[2 * token : 2 * token + 2])
        code = ", ".join(
            str(second_decoder.field(int.from_bytes(stream[84 + 8 * token :][:8], "little"), 4 * i, 4)) for i in range(6)
        )
        told = ", ".join(f"{x:.9g}" for x in row)
        assert f"- Token {token}: scale {scale:.9g}, zero {zero:.9g}, codes {code}: {told}.\n" in SPEC


def test_the_worked_example_of_fields_in_a_shared_table_holds() -> None:
    (lines,) = example("### 15.2 Example of a shared table")
    table = vectors.RANGES
    stream, raw = vectors.affine_stream("int4", ranges=table), table.to_bytes()
    assert lines == "\n".join(vectors.hex_lines(stream, vectors.RANGE_NOTES))
    assert f"has {len(raw)} bytes,\n`{raw.hex(' ')}`, and its name is\n{table.name}. With it int4 makes {len(stream)}" in SPEC
    numbers = pqcodec.decode(stream, tables=table).tolist()
    assert second_decoder.decode(stream, [raw]).view(np.float32).tolist() == numbers
    for token, row in enumerate(numbers):
        assert f"- Token {token}: {', '.join(f'{x:.9g}' for x in row)}.\n" in SPEC


def test_the_worked_examples_of_levels_and_outliers_hold() -> None:
    found = example("### 16.5 Examples")
    for lines, preset, notes in zip(found, ("nuq2", "kvquant2"), (vectors.LEVEL_NOTES, vectors.OUTLIER_NOTES), strict=True):
        stream = vectors.level_stream(preset)
        assert lines == "\n".join(vectors.hex_lines(stream, notes))
        assert second_decoder.decode(stream).view(np.float32).tolist() == pqcodec.decode(stream).tolist()
        assert "".join(f"{line}\n" for line in vectors.level_trace(stream)) in SPEC


def test_the_worked_example_of_residual_vq_holds() -> None:
    (lines,) = example("### 20.4 Example")
    stream = vectors.residual_stream()
    assert lines == "\n".join(vectors.hex_lines(stream, vectors.RESIDUAL_NOTES))
    assert f"its name is {vectors.BOOKS.name}" in " ".join(SPEC.split())
    assert "".join(f"{line}\n" for line in vectors.residual_trace(stream)) in SPEC
    decoded = second_decoder.decode(stream, [vectors.BOOKS.to_bytes()]).view(np.float32)
    assert decoded.tolist() == pqcodec.decode(stream, tables=vectors.BOOKS).tolist()


def test_the_file_of_the_specification_is_what_writers_write(tmp_path: Path) -> None:
    (lines,) = example("## II.7 Example")
    data = vectors.grown_file(tmp_path)
    assert lines == "\n".join(vectors.file_lines(data))
    assert vectors.bytes_of(lines) == data
    with PQKVFile(data) as file:
        assert second_reader.refusal(data) == ""
        assert (file.version, file.names, file.entry("k").parts, file.verify(backend="reference")) == (2, ("k", "n"), 2, [])


def test_golden_streams_have_the_hashes_beside_the_specification() -> None:
    text = (ROOT / "formats" / "golden.txt").read_text()
    assert text == "".join(f"{line}\n" for line in vectors.golden_lines(ROOT / "tests" / "data" / "golden"))


def test_checksums_of_the_specification() -> None:
    keys = f"k_0 = {second_decoder.key(0)}, k_1 = {second_decoder.key(1)}."
    empty, letter, digits = map(checksum, (b"", b"a", b"123456789"))
    assert f"{keys} The checksum of the empty string is {empty}, of `a` {letter}, of `123456789` {digits}." in SPEC


def test_zeros_of_tables_are_positive() -> None:
    for table in (*angles.circle_table(), *centre.phase_tables()):
        assert not np.signbit(table[table == 0]).any()
    cos, sin, _, fine = centre.phase_tables()
    assert [cos[64], cos[192], sin[0], sin[128], fine[0]] == [0] * 5


def test_means_are_those_of_the_incomplete_beta_function() -> None:
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        for m_a, m_b in ((2, 2), (8, 8), (32, 16)):
            bounds = angles.cell_bounds(m_a, m_b, 8)
            found = angles.cell_means(bounds, m_a, m_b)
            for k in range(8):
                x, y = (mpmath.mpf(int(e)) / int(bounds[-1]) for e in bounds[k : k + 2])
                whole = mpmath.betainc(m_b / 2, m_a / 2, x, y)
                assert found[0][k] == pytest.approx(float(mpmath.betainc(m_b / 2, (m_a + 1) / 2, x, y) / whole), rel=1e-13)
                assert found[1][k] == pytest.approx(float(mpmath.betainc((m_b + 1) / 2, m_a / 2, x, y) / whole), rel=1e-13)


def test_factors_of_quads_are_far_from_an_edge_of_their_rounding() -> None:
    with localcontext() as context:
        context.prec = 60
        for bits, order, step in product(c.QUADS_INDEX_BITS, c.ROTATION_ORDERS, range(c.QUADS_RADIUS_STEPS)):
            exact = Decimal(2) ** (Decimal(step) / c.QUADS_RADIUS_STEPS) / (Decimal(c.QUADS_TABLES[bits][0]) * order)
            scaled = exact * Decimal(2) ** (c.QUADS_FACTOR_BITS - math.frexp(float(exact))[1])
            assert abs(scaled % 1 - Decimal("0.5")) > Decimal("7e-4")


def test_factors_of_sketches_are_far_from_an_edge_of_their_rounding() -> None:
    with localcontext() as context:
        context.prec = 60
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
        for order, blocks in product(c.ROTATION_ORDERS, c.SKETCH_BLOCKS):
            means = pi * math.comb(order, order // 2) / 2 ** (order + 1), (pi / 2).sqrt() / 4
            for matrix, mean in zip(c.SKETCH_ERRORS, means, strict=True):
                exact = mean / (blocks * order)
                scaled = exact * Decimal(2) ** (24 - math.frexp(float(exact))[1])
                assert abs(scaled % 1 - Decimal("0.5")) > Decimal("6e-3")
                found = sketch.scales(Sketch(blocks, matrix), order, order, False)[0, 0]
                assert abs(Decimal(float(found)) / exact - 1) < Decimal(2) ** -24
    assert "nearer to an edge of its rounding than 6e-3 of a step" in SPEC


@pytest.mark.parametrize("salt", ["", "caf\u00e9"])
def test_names_and_marks_of_blocks_are_those_of_the_specification(salt: str) -> None:
    """IV.2, with H written out."""
    settings = {"model": {"config": "00"}, "extra": "\u00e9"}
    key = hashlib.blake2b(salt.encode(), person=b"pqcodec-prefix\0\0").digest() if salt else b""

    def hashed(data: bytes, size: int = 32) -> bytes:
        return hashlib.blake2b(data, digest_size=size, key=key, person=b"pqcodec-prefix\0\0").digest()

    chain, tokens = Chain(settings, salt), [7, 2**40, 0]
    raw = [token.to_bytes(8, "little") for token in tokens]
    assert chain.root == hashed(b'{"extra": "\\u00e9", "format": 1, "model": {"config": "00"}}')
    assert chain.child(chain.root, tokens) == hashed(chain.root + (3).to_bytes(8, "little") + b"".join(raw))
    marks = [hashed(chain.root + b"".join(raw[: i + 1]), 8) for i in range(3)] if salt else raw
    assert chain.marks(chain.root, tokens).astype("<i8").tobytes() == b"".join(marks)


def test_numbers_of_the_specification_stand_once_in_code() -> None:
    """A name of constants.py is assigned nowhere else, unless it is from there that it gets its value."""
    names = "|".join(name for name in vars(c) if name.isupper())
    for path in (*(ROOT / "pqcodec").rglob("*.py"), *(ROOT / "formats").glob("*.py"), *(ROOT / "tools").glob("*.py")):
        if path.name != "constants.py":
            assert not re.search(rf"^({names})\s*[:=](?!.*\bc\.\1\b)", path.read_text(), re.MULTILINE), path
