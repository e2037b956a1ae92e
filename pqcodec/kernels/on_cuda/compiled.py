"""Law: how a kernel is compiled for a kind of stream; of ``blocks.cu``, which threads share how much memory, and its macros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
from cuda.bindings import nvrtc

from pqcodec import constants as c
from pqcodec.codings import look_ups as t
from pqcodec.codings.declared import quads_index_bits
from pqcodec.codings.plan import plan_for
from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.on_cuda.factors import ROW, in_factors
from pqcodec.kernels.on_cuda.quads_encoder import COPY_MACROS, ONE_COPY, Copies, encoder_definitions, own_copies
from pqcodec.kernels.on_cuda.tables import (
    BOUNDS_ROW,
    LOOK_UP_BYTES,
    ROWS,
    down_shift,
    in_brains,
    in_bytes,
    in_halves,
    in_pieces,
    kept_rows,
    row_starts,
    run_pieces,
    table_bits,
    tables_for,
)
from pqcodec.kernels.spans import SPAN
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header

# Threads of a block, by direction and order: as many as registers suffice for. A multiprocessor runs one block, whose tables
# fill most of its shared memory. Decoders that look up whole quads need fewer registers, kernels that turn offsets need more.
THREADS = {
    ("encode", 32): 768,
    ("encode", 64): 768,
    ("encode", 96): 512,
    ("encode", 128): 640,
    ("encode", 160): 384,
    ("encode", 192): 384,
    ("encode", 224): 384,
    ("encode", 256): 384,
    ("decode", 64): 768,
    ("decode", 128): 640,
    ("decode", 256): 384,
}
FACTORS_THREADS = (384, 256, 128)  # of orders that are rotated in factors, as many as there is shared memory for
FACTORS_OFFSETS_THREADS = (256, 128)
TEAM = 4  # warps that share a block there, so that all have rows as long as there are any
TABLE_THREADS = {("decode", 128): 768}
ROUNDS_THREADS = {("encode", 64): 640, ("encode", 128): 512, ("encode", 256): 512, ("decode", 256): 512}  # two rounds
WIDE_THREADS = {("encode", 64): 640, ("encode", 128): 512, ("encode", 160): 512, ("encode", 256): 384}  # tiles of sixteen rows
WIDE_ROPE_THREADS = {("encode", 128): 384}  # where means are turned for each row
PRODUCTS_THREADS = {("encode", 64): 768}  # or run by run
ROPE_THREADS = {("encode", 256): 256, ("decode", 64): 640, ("decode", 128): 384, ("decode", 256): 256}
OUT_PADDING = 64  # bytes behind each row that leaves shared memory: neighbouring rows lie in different banks
FETCHED_ORDER = 64  # of which tiles of sixteen rows come by way of shared memory; of others into the L2 cache first
EARLY_BITS = {32: 10, 96: 10, 128: 8, 160: 10}  # or into registers, of tables of so many bits at the most
AHEAD = 4  # blocks that a kernel of quads finds at once, one a lane; others find one with all lanes
RUN_PIECE = 304  # bytes of the turned means of a piece, and of that with the same turns if any, as operands of products
BEHIND_RUN = 16  # bytes behind a run's means: their unit, and what teams need besides
MANY_COPIES, FEWER = 8, 4  # copies of tables that are enough with turns of runs; how many times less pay for these
UPCOMING_BYTES = 64  # of shared memory for a warp's next block
# Least factor of a decoded row (a number is a whole number times it) with which none of its numbers but 0 rounds to 0.
SMALLEST = {c.DTYPE_FLOAT16: 2.0**-24, c.DTYPE_BFLOAT16: 0.0, c.DTYPE_FLOAT32: 0.0}


@dataclass(frozen=True)
class Layout:
    """The contents of a kernel's shared memory, and how many threads share it."""

    threads: int
    table_bits: int  # bits of the largest quads that are looked up whole
    whole_rows: bool  # decoded rows leave by the bulk copy engine; rows to encode are fetched while others are coded
    warpgroups: bool  # four warps multiply together (compute capability 9.0 alone knows how)
    blob: np.ndarray
    places: dict[str, int]
    shared_bytes: int
    parts: int = 1  # thread blocks among which each row is divided
    sharing: int = 1  # warps that share a block of a stream: a team
    couriers: int = 0  # warps beside the teams

    @property
    def teams(self) -> int:
        """Teams of a thread block; a team is one warp where none share."""
        return (self.threads // 32 - self.couriers) // self.sharing


def layout(verb: str, h: Header, few: bool = False, major: int = 9, limit: int = 232448, effort: str = "fast") -> Layout | None:
    """The first layout that fits, from the quickest on; None where none does.

    ``major``: of the compute capability. ``limit``: bytes of shared memory. ``few``: there are few blocks, so that
    large tables do not pay. ``effort``: of an encoder's search.
    """
    decode, rows = verb == "decode", tile_rows(verb, h, effort)
    ahead = AHEAD if h.coding == c.CODING_QUADS and not few else 1
    wide, factors = rows > ROWS, in_factors(verb, h)
    early = wide and h.dtype != c.DTYPE_FLOAT32 and _fetched_early(h, few)
    tables = sorted({0} if few or not decode else {0, table_bits(h)}, reverse=True)
    own = own_copies(few) if verb == "encode" and h.coding == c.CODING_QUADS else (ONE_COPY,)
    turns = _turns_in_blocks(h, few, rows if wide or factors else 0, wide)

    def fitting(most: int, keys: bool, bits: int, way: tuple[int, int, bool], copies: Copies) -> Layout | None:
        phases, tile_turns, products = way
        blob, places = tables_for(verb, h, bits, keys, phases, copies, effort, tile_turns, products)
        special = ROPE_THREADS if h.rope else TABLE_THREADS if bits and not h.offsets else {}
        special = special | (ROUNDS_THREADS if h.rounds > 1 and not h.offsets else {}) | (WIDE_THREADS if wide else {})
        special = special | (WIDE_ROPE_THREADS if wide and h.rope and not (tile_turns or products) else {})
        special = special | (PRODUCTS_THREADS if wide and products else {})
        threads = special.get((verb, h.order), THREADS.get((verb, h.order), most))
        alone = major < 9 if decode else early or (wide and h.order != FETCHED_ORDER)
        alone = alone or (factors and (major < 9 or h.dtype == c.DTYPE_FLOAT32))
        for whole in (False,) if alone else (True, False):
            row_bytes = (h.vector_bytes + OUT_PADDING if decode else h.vector_bytes) * whole
            rows_bytes = ROW * h.order if factors else rows * row_bytes  # of the exchange, and rows to encode
            places_ahead = ahead + (wide or factors)
            memory = warp_memory(verb, h, _stage_bytes(h, rows), rows_bytes, places_ahead, tile_turns > 0, products)
            memory |= {"ROWS": rows, "AHEAD": ahead, "EARLY": int(early)}
            size = blob.size + _rotation_bytes(verb, h) + threads // 32 * memory["WARP_BYTES"]
            if size <= limit:
                places = places | memory | {"BLOB_BYTES": blob.size}
                together = h.rounds == 2 and major == 9
                return Layout(threads, bits, whole, together, blob, places, size, sharing=TEAM if factors else 1)
        return None

    return quickest(h, fitting, product(most_threads(verb, h), (True, False), tables), turns, own)


def quickest(
    h: Header,
    fitting: Callable[..., Layout | None],
    choices: Iterable[Sequence[Any]],
    ways: Sequence[Any],
    copies: Sequence[Any],
) -> Layout | None:
    """Of the first of ``choices`` with which a layout fits, and of the first way to turn means, that with most copies; None
    where none fits. ``fitting``: the layout of a choice, a way and copies, or None.

    It is of the second way that fits, if the first has turns of all pieces, and in their place there was room for FEWER times
    as many copies of what lanes look up.
    """
    for choice in choices:
        tried = ((fitting(*choice, way, each) for each in copies) for way in ways)
        fit = filter(None, (next(filter(None, each), None) for each in tried))
        first = next(fit, None)
        if first is None:
            continue
        if in_pieces(h) or "RUN_TURNS_AT" not in first.places or first.places["COPIES"] >= MANY_COPIES:
            return first
        second = next(fit, first)
        return second if second.places["COPIES"] >= FEWER * first.places["COPIES"] else first
    return None


def _turns_in_blocks(h: Header, few: bool, rows: int, wide: bool) -> list[tuple[int, int, bool]]:
    """What is tried, from the quickest on: how many copies of each turn of RoPE, rows of a tile in which means are turned on
    from the first one, and whether tensor cores turn them run by run. ``rows``: of a tile where an encoder may do so, else 0.
    """
    ways = [(phases, 0, False) for phases in phase_copies(h, few)]
    if not rows or not h.rope or few or h.dtype == c.DTYPE_FLOAT32:  # numbers of 16 bits are coarser than a phase of 16 bits
        return ways
    products = wide and h.runs and (2 * len(h.rope.frequencies) == h.order or not in_pieces(h))
    return [(1, 0, True)] * products + [(1, rows, False), *ways]


def most_threads(verb: str, h: Header) -> tuple[int, ...]:
    """How many threads are tried where the order does not tell, from the quickest on."""
    if not in_factors(verb, h):
        return (0,)
    return FACTORS_OFFSETS_THREADS if h.offsets else FACTORS_THREADS


def _rotation_bytes(verb: str, h: Header) -> int:
    """Bytes of the operands of one round of rotation: 16 a lane of float16 and, when encoding, 16 more of bfloat16."""
    if h.rounds == 2:
        return 0
    return 512 if verb == "decode" else 1024


def _stride_words(h: Header) -> int:
    """Words from one row of a tile to the next: a multiple of eight plus four, so that rows begin in different banks."""
    return (plan_for(h).row_bytes // 4 + 3) // 8 * 8 + 4


def tile_rows(verb: str, h: Header, effort: str) -> int:
    """Rows of a tile: sixteen where an encoder of quads multiplies them as 16-bit numbers, whole, and tries one radius."""
    wide = verb == "encode" and h.coding == c.CODING_QUADS and effort == "fast" and not in_bytes(verb, h)
    wide = wide and not in_factors(verb, h)
    return 16 if wide else ROWS


def _fetched_early(h: Header, few: bool) -> bool:
    """Whether there are registers for a tile's rows while those before them are coded; a few blocks' rows come sooner so."""
    return h.order <= max(EARLY_BITS) if few else quads_index_bits(h.order, h.row_bits) <= EARLY_BITS.get(h.order, 0)


def _stage_bytes(h: Header, rows: int) -> int:
    """Bytes of a tile's rows, and those after them that its last run of words may touch."""
    if h.coding == c.CODING_QUADS:
        return -(-rows * (h.row_bytes - 1) // 16) * 16 + 16  # radii lie elsewhere
    paper = h.coding == c.CODING_PAPER
    return -(-rows * (plan_for(h).row_bytes if paper else 4 * _stride_words(h)) // 16) * 16 + 16


def phase_copies(h: Header, few: bool) -> tuple[int, ...]:
    """How many copies of each turn of RoPE are tried, from the quickest on: with 16, half a warp's lanes meet in no bank."""
    return (1,) if few or not h.rope else (16, 8, 4, 2, 1)


def warp_memory(
    verb: str,
    h: Header,
    stage_bytes: int,
    rows_bytes: int = 0,
    ahead: int = 1,
    turned: bool = False,
    products: bool = False,
) -> dict[str, int]:
    """Where things lie in the shared memory of one warp, as macros, in bytes from its stage for coded rows on.

    Behind the stage and the places of so many blocks ``ahead``: a block's means, if there are offsets, and the same ``turned``
    to a tile, or with ``products``, as their operands, and in decoders the same turned to a run alone; its radii as encoders of
    quads keep them, and sums of a team's warps; and a tile's rows as the tensor has them, of ``rows_bytes``.
    """
    means_at = stage_bytes + ahead * UPCOMING_BYTES
    in_runs = products or (h.runs and verb == "decode")
    radii_at = means_at + (run_bytes(h, products) if in_runs else 4 * h.order * (h.offsets + turned))
    rows = -(-h.chunk_tokens // (TEAM * ROWS)) * TEAM * ROWS  # of a block, in whole tiles: of sixteen rows, or of a team
    sums_at = radii_at + 2 * rows * (verb == "encode" and h.coding == c.CODING_QUADS)
    rows_at = sums_at + (16 * TEAM + 16) * in_factors(verb, h)
    return {
        "STAGE_BYTES": stage_bytes,
        "MEANS_AT": means_at,
        "RUN_BYTES": run_bytes(h, products),
        "RADII_AT": radii_at,
        "SUMS_AT": sums_at,
        "ROWS_AT": rows_at,
        "WARP_BYTES": rows_at + rows_bytes,
    }


def run_bytes(h: Header, products: bool) -> int:
    """Bytes for means as they are turned to a run, and what is behind them: float32 or, with ``products``, their operands."""
    pieces = run_pieces(h) if products else 0
    others = h.order - 32 * pieces * (1 + in_pieces(h))
    return h.runs * (pieces * RUN_PIECE + 4 * others + BEHIND_RUN)


# -- compiling ----------------------------------------------------------------------------------------------------------
def compiled(name: str, macros: dict[str, Any], architecture: str) -> bytes:
    """A source file of this folder, with macros: its machine code (cubin) for "sm_90", its PTX for "compute_90", and so on."""
    source, headers = _sources(name)
    options = [f"-D{macro}={value}" for macro, value in macros.items()]
    options += [f"--gpu-architecture={architecture}", "--fmad=false", "--std=c++17"]
    try:
        program = returned(
            nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), list(headers.values()), [*map(str.encode, headers)])
        )
    except RuntimeError as missing:  # cuda-bindings look for the library when it is called first
        raise BackendUnavailable(f"backend 'cuda' needs NVRTC: pip install 'pqcodec[cuda]' ({missing})") from missing
    error = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    if int(error):
        log = b" " * returned(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendUnavailable(f"CUDA: {error.name} for {architecture}:\n{log.decode(errors='replace')}")
    virtual = architecture.startswith("compute")
    code = b" " * returned((nvrtc.nvrtcGetPTXSize if virtual else nvrtc.nvrtcGetCUBINSize)(program))
    returned((nvrtc.nvrtcGetPTX if virtual else nvrtc.nvrtcGetCUBIN)(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _sources(name: str) -> tuple[bytes, dict[str, bytes]]:
    """A source, and the headers that it and they include, by their names."""
    folder = files("pqcodec.kernels.on_cuda")
    headers = {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(".cuh")}
    return folder.joinpath(name).read_bytes(), headers


def returned(result: tuple[Any, ...]) -> Any:
    """The values of a call of the driver or the compiler; raises BackendUnavailable, naming its error."""
    error, *values = result
    if int(error):
        raise BackendUnavailable(f"CUDA: {error.name}: is the driver as new as the toolkit?")
    return values[0] if len(values) == 1 else values


def common_definitions(verb: str, h: Header, threads: int, blob_bytes: int) -> dict[str, Any]:
    """The macros of every kernel."""
    plan = plan_for(h)
    return {
        "DECODER" if verb == "decode" else "ENCODER": 1,
        "THREADS": threads,
        "BLOB_BYTES": blob_bytes,
        "BESIDE": h.blocks.beside,
        "ALIGN": h.blocks.align,
        "ORDER": plan.order,
        "LOG2_ORDER": plan.order.bit_length() - 1,
        **dtype_definitions(h.dtype),
        "LARGEST": f"{c.LARGEST_FINITE[h.dtype]!r}f",
        "LARGEST_32": f"{c.LARGEST_FINITE[c.DTYPE_FLOAT32]!r}f",
        "LARGEST_HALF": f"{c.LARGEST_FINITE[c.DTYPE_FLOAT16]!r}f",
        "RADIUS_BIAS": c.RADIUS_BIAS,
        "RADIUS_SPLIT": f"({c.RADIUS_SPLIT})",
        "RADIUS_SHIFT": c.RADIUS_SHIFT,
        "SECOND_FACTOR": f"{2.0**-c.RADIUS_SHIFT!r}f",
        "ROUNDS": h.rounds,
        "ROW_BYTES": plan.row_bytes,
        "UPCOMING_BYTES": UPCOMING_BYTES,
        "CHUNK": h.chunk_tokens,
        "CHECKSUM_BYTES": c.CHECKSUM_BYTES,
        "OFFSETS": int(h.offsets),
        "IN_RUNS": int(h.runs),
        "RUN_ROWS": c.RUN_ROWS,
        "RUN_MAGIC": f"{1.5 * 2.0 ** (23 - c.RUN_TURN_BITS)!r}f",
        "RUN_PIECE": RUN_PIECE,
        "BEHIND_RUN": BEHIND_RUN,
        "PAIRS": len(h.rope.frequencies) if h.rope else 0,
        "INTERLEAVED": int(h.rope is not None and h.rope.pairing == c.ROPE_INTERLEAVED),
        "KEY_0": f"{checksum_keys(1)[0]}u",
        "PRIME": f"{c.CHECKSUM_PRIME}ull",
        "PRIME_GAP": (1 << 32) - c.CHECKSUM_PRIME,
        **span_definitions(),
        "OFFSET_EXPONENT_AT": c.OFFSET_EXPONENT_AT,
        "RADIUS_EXPONENT_AT": c.RADIUS_EXPONENT_AT,
    }


def dtype_definitions(dtype: int) -> dict[str, Any]:
    """The macros that tell how numbers are stored."""
    names = {"FLOAT16": c.DTYPE_FLOAT16, "BFLOAT16": c.DTYPE_BFLOAT16, "FLOAT32": c.DTYPE_FLOAT32}
    return {"DTYPE": dtype, **names, "ITEM": c.ITEM_BYTES[dtype]}


def span_definitions() -> dict[str, Any]:
    """The macros that tell where each number of a span stands."""
    return {**{name.upper(): place for name, place in SPAN._asdict().items()}, "FIELDS": len(SPAN)}


def definitions(verb: str, h: Header, layout: Layout, effort: str) -> dict[str, Any]:
    """The macros that ``blocks.cu`` is compiled with; ``effort``: of an encoder's search."""
    plan, paper, of_quads = plan_for(h), h.coding == c.CODING_PAPER, h.coding == c.CODING_QUADS
    halves = in_halves(verb, h, "RUN_TURNS_AT" in layout.places)
    return {
        **common_definitions(verb, h, layout.threads, layout.blob.size),
        "SMALLEST": f"{SMALLEST[h.dtype]!r}f",
        "ROOT_BUDGET": plan.root_budget if h.coding == c.CODING_SPLIT else 0,
        "RADIUS_BITS": plan.radius_bits,
        "RADIUS_STEPS": plan.radius_steps if h.coding == c.CODING_SPLIT else 1,
        "ENERGY_ORDERS": h.rounds,
        "SQUARED_STRETCH": f"{plan.stretch**2!r}f",
        "GRID": f"{float(c.GRID)!r}f",
        "CAP": c.MAX_BUDGET_PER_COORDINATE,
        "MOST_WIDTH": c.MAX_ANGLE_BITS,
        "WIDTH_SHIFT": t.WIDTH_SHIFT,
        "CODES_ROW": t.CODES,
        "BOUNDS_ROW": BOUNDS_ROW,
        "COARSE_GRID": 1 << c.COARSE_GRID_BITS,
        "FINE_GRID": 1 << c.FINE_GRID_BITS,
        "CIRCLE": c.CIRCLE,
        "PHASE_SHIFT": c.PHASE_SHIFT,
        "PAPER": int(paper),
        "PLANES": int(of_quads),
        "GROUP_BITS": c.PAPER_BLOCK_BITS,
        "BYTES": int(in_bytes(verb, h)),
        "BRAIN": int(in_brains(h) and not halves),
        "HALF_SUMS": int(halves),
        "WARPGROUPS": int(layout.warpgroups),
        "FACTORS": int(in_factors(verb, h)),
        "SHARING": layout.sharing,
        "DOWN_SHIFT": down_shift(verb, h),
        "PAPER_BOUNDS": _braces(t.paper_levels()[0] ** 2),
        "WIDE": int(layout.places["ROWS"] > ROWS),
        "AS_WORDS": int(layout.places["ROWS"] > ROWS or in_factors(verb, h)),
        "STRIDE_WORDS": _stride_words(h),
        "BULK": int(layout.whole_rows and verb == "decode"),
        "OUT_BYTES": h.vector_bytes + OUT_PADDING,
        "FETCHED": int((layout.whole_rows or layout.places["EARLY"]) and verb == "encode"),
        "TABLE_BITS": layout.table_bits,
        "LOOK_UP_BYTES": LOOK_UP_BYTES,
        **(_row_definitions(h) if verb == "encode" and h.coding == c.CODING_SPLIT else {}),
        "ROTATION_BYTES": _rotation_bytes(verb, h),
        **layout.places,
        **(encoder_definitions(h, effort, Copies(*(layout.places[name] for name in COPY_MACROS))) if of_quads else {}),
    }


def _row_definitions(h: Header) -> dict[str, Any]:
    """Where the encoder's look-ups of each kind begin, in rows."""
    rows = row_starts(h)
    return {"LOOK_UP_ROWS": f"{{{','.join(map(str, rows))}}}", "LOOK_UP_ROW_16": int(kept_rows(h)[:-2].sum())}


def _braces(array: np.ndarray) -> str:
    """A float32 array [rows, columns] as C++ writes it."""
    return "{" + ",".join("{" + ",".join(f"{x!r}f" for x in map(float, row.astype(np.float32))) + "}" for row in array) + "}"
