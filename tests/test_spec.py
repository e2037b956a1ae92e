"""SPEC.md's own claims: derived numbers lie far from the edges of their rounding, and the tables are those it names."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from decimal import Decimal, localcontext
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import pqcodec
from pqcodec import constants as c
from pqcodec.codings import angles, quads
from pqcodec.stages import rotation

SPEC = (Path(__file__).parents[1] / "formats" / "SPEC.md").read_text()
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
    for pair in ((4, 4), (8, 8), (16, 16), (32, 16), (32, 32), (64, 64)):
        node = angles.node_table(*pair)
        yield f"node {pair[0]}, {pair[1]}", [node.cos[1:], node.sin[1:], node.shift[1:]]
    leaves = angles.quad_table()
    yield "quads", [leaves.n_a, leaves.n_b, leaves.cos, leaves.sin]
    yield "circle", list(angles.circle_table())
    yield "permutations", [rotation.permutation(order) for order in c.ROTATION_ORDERS]


@pytest.mark.parametrize(("name", "arrays"), list(tables()), ids=lambda value: value if isinstance(value, str) else "")
def test_tables_have_the_hashes_of_the_specification(name: str, arrays: list[np.ndarray]) -> None:
    digest = hashlib.sha256(b"".join(x.astype(x.dtype.newbyteorder("<")).tobytes() for x in arrays)).hexdigest()
    found = re.search(rf"^\| {re.escape(name)} \|.*\| `([0-9a-f]{{64}})` \|$", SPEC, re.MULTILINE)
    assert found, f"| {name} | ... | `{digest}` | is not in SPEC.md"
    assert found[1] == digest


@pytest.mark.parametrize("bits", c.QUADS_INDEX_BITS)
def test_points_of_quads_are_those_of_the_specification(bits: int) -> None:
    digest = hashlib.sha256(quads.points_of(bits).points.tobytes()).hexdigest()
    assert f"| {bits} | `{digest}` |" in SPEC
    grid, listed = c.QUADS_TABLES[bits]
    assert f"| {bits} | {grid:g} | {listed} |" in SPEC


def test_the_worked_example_of_quads_holds() -> None:
    lines = re.search(r"### 12.5 Example\n.*?\n\n(.*?)\n\n", SPEC, re.DOTALL)
    assert lines
    stream = bytes.fromhex("".join(re.match(r"    ((?:[0-9a-f]{2} )*[0-9a-f]{2})", line)[1] for line in lines[1].splitlines()))
    x = np.array([(-1) ** i * (i + 1) for i in range(12)], np.float32)
    assert pqcodec.encode(x, preset="quad2", backend="reference") == stream
    told = re.search(r"The numbers are (.*)\.\n", SPEC)
    assert told
    assert pqcodec.decode(stream).tolist() == [float(number) for number in told[1].split(", ")]


def test_factors_of_quads_are_far_from_an_edge_of_their_rounding() -> None:
    with localcontext() as context:
        context.prec = 60
        for bits, order, step in product(c.QUADS_INDEX_BITS, c.ROTATION_ORDERS, range(c.QUADS_RADIUS_STEPS)):
            exact = Decimal(2) ** (Decimal(step) / c.QUADS_RADIUS_STEPS) / (Decimal(c.QUADS_TABLES[bits][0]) * order)
            scaled = exact * Decimal(2) ** (c.QUADS_FACTOR_BITS - math.frexp(float(exact))[1])
            assert abs(scaled % 1 - Decimal("0.5")) > Decimal("7e-4")


def test_numbers_of_the_specification_stand_once_in_code() -> None:
    """A name of constants.py is assigned nowhere else, unless it is from there that it gets its value."""
    root = Path(__file__).parents[1]
    names = "|".join(name for name in vars(c) if name.isupper())
    for path in (*(root / "pqcodec").rglob("*.py"), *(root / "formats").glob("*.py"), *(root / "tools").glob("*.py")):
        if path.name != "constants.py":
            assert not re.search(rf"^({names})\s*[:=](?!.*\bc\.\1\b)", path.read_text(), re.MULTILINE), path
