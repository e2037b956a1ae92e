"""Law: the CUDA backend: ``blocks.cu`` compiled at run time (NVRTC) where it pays, Triton's kernels for everything else.

NVIDIA GPUs of compute capability 8.0 and more; head_dim 64, 128 or 256; rows whose addresses are multiples of 16 bytes. Two
rounds of the rotation are one product with a matrix that lies in shared memory, where there is room for it.
``covers`` and ``layout`` are the whole rule. A kernel is compiled once a process for each kind of stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings import look_ups as t
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.on_triton.backend import Triton
from pqcodec.kernels.spans import SPAN, Group
from pqcodec.stages import centre
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header

ORDERS = (64, 128, 256)
# Threads of a block, one block a multiprocessor (the tables fill most of its shared memory), by direction and order: as many
# as registers suffice for. Decoders that look up whole quads need fewer registers, kernels that turn offsets more.
THREADS = {
    ("encode", 64): 768,
    ("encode", 128): 640,
    ("encode", 256): 384,
    ("decode", 64): 768,
    ("decode", 128): 640,
    ("decode", 256): 384,
}
TABLE_THREADS = {("decode", 128): 768}
ROUNDS_THREADS = {("encode", 64): 640, ("encode", 128): 512, ("encode", 256): 512, ("decode", 256): 512}  # of two rounds
ROPE_THREADS = {("encode", 256): 256, ("decode", 64): 640, ("decode", 128): 384, ("decode", 256): 256}
# Quads of so many bits are looked up, by bits a coordinate: so many that nearly every quad is.
TABLE_BITS = ((2.2, 11), (2.7, 13), (3.2, 14))
FEW = 8  # blocks a multiprocessor, up to which large tables do not pay
SPREAD = 8  # blocks that one multiprocessor takes before the next is used
MOST_KEYS = 4096  # checksum keys that lie in shared memory; blocks of more words read them from the device's
_ALIGNED = 16
ROWS = 8  # of a tile
# Ordinary rows have no smaller numbers but 0: nothing of them is rounded to 0.
SMALLEST = {c.DTYPE_FLOAT16: 2.0**-24, c.DTYPE_BFLOAT16: 0.0, c.DTYPE_FLOAT32: 0.0}
LOOK_UP_BYTES = t.STEPS + 4


def covers(group: Group) -> bool:
    """Whether ``blocks.cu`` codes a group; otherwise Triton's kernels do."""
    h = group.header
    rope = h.rope is None or h.rope.pairing == c.ROPE_INTERLEAVED or len(h.rope.frequencies) % 8 == 0
    item = c.ITEM_BYTES[h.dtype]
    return (
        h.head_dim in ORDERS
        and (h.rounds == 1 or _halves_fit(h.order, h.seed))
        and group.blocks < 1 << 31
        and all(tokens * h.row_bytes % 4 == 0 for s in group.spans for tokens in (h.chunk_tokens, s.header.coded_tokens))
        and rope
        and all(abs(s.stride) * item * h.chunk_tokens < 1 << 31 for s in group.spans)
        and all(s.payload % 4 == 0 and s.stride * item % _ALIGNED == 0 and not (s.starts % _ALIGNED).any() for s in group.spans)
    )


@lru_cache(maxsize=64)
def _halves_fit(order: int, seed: int) -> bool:
    """Whether half of two rounds' matrix is of signed bytes, as it is for every seed anyone has seen."""
    return bool(np.abs(t.rotation_matrix(order, seed, 2)).max() < 2 * 128)


# -- tables: one blob that a kernel copies into shared memory ----------------------------------------------------------
def _blob(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Arrays one behind the other, each at a multiple of 16 bytes, and where each begins."""
    parts, places, at = [], {}, 0
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        places[f"{name}_AT"] = at
        parts.append(np.pad(raw, (0, -raw.size % 16)))
        at += parts[-1].size
    return np.concatenate(parts), places


def _shared(verb: str, h: Header, plan: Plan, keys: bool) -> dict[str, np.ndarray]:
    if plan.rounds == 2:
        arrays = {"MATRIX": _matrix(verb, h)}
    else:
        signs = np.where(plan.signs < 0, 1 << 31, 0).astype(np.uint32)
        one = (0x3C00 if h.dtype == c.DTYPE_FLOAT16 else 0x3F80) * 0x10001
        arrays = {"SIGNS": (signs[0::2] >> 16 | signs[1::2]) ^ one, "SIGNS_32": signs}
    if h.rope:
        arrays["FREQUENCIES"] = np.array(h.rope.frequencies, np.uint32)
        arrays["PHASES"] = centre.phase_pairs()
    words = -(-h.chunk_tokens // ROWS) * ROWS * plan.row_bytes // 4
    if keys and words <= MOST_KEYS:
        arrays["KEYS"] = checksum_keys(words + 1).astype(np.uint32)
    return arrays


def _in_bytes(verb: str, h: Header) -> bool:
    """Whether two rounds' matrix is of bytes: all decoders', and encoders' that else read the largest for 16-bit numbers."""
    plain = h.dtype != c.DTYPE_FLOAT32 and not h.offsets
    return h.rounds == 2 and (verb == "decode" or (h.order == max(ORDERS) and plain))


def _matrix(verb: str, h: Header) -> np.ndarray:
    """Both rounds' matrix as the kernel multiplies with it: uint8 [order / 8, blocks, 8 columns, 16 bytes of inputs].

    The decoder's columns are channels, the encoder's are coordinates; of int8 R / 2 or of 16-bit R. Four lanes hold a row:
    eight neighbours each of every 32 channels, and a quarter each of the coordinates.
    """
    matrix = t.rotation_matrix(h.order, h.seed, 2)  # [coordinate, channel]
    place = np.arange(h.order)  # of 16 bytes of inputs a lane has four, of eight columns two
    channels = place // 32 * 32 + place % 8 // 2 * 8 + place // 8 % 4 * 2 + place % 2
    if verb == "decode":
        coordinates = place % 16 // 4 * (h.order // 4) + place // 16 * 4 + place % 4
        columns = (matrix[coordinates][:, channels].T / 2).astype(np.int8)
    else:
        coordinates = place % 8 // 2 * (h.order // 4) + place // 8 * 2 + place % 2
        columns = matrix[coordinates]
        if _in_bytes(verb, h):
            columns = (columns[:, place // 32 * 32 + place % 16 // 4 * 8 + place // 16 % 2 * 4 + place % 4] / 2).astype(np.int8)
        elif h.dtype == c.DTYPE_BFLOAT16 and not h.offsets:
            even = columns[:, channels].astype(np.float32)
            columns = (even.view(np.uint32) >> 16).astype(np.uint16)  # exact: 256 at the most
        else:
            columns = columns[:, channels]
    columns = np.ascontiguousarray(columns).view(np.uint8)
    return columns.reshape(h.order // 8, 8, -1, 16).swapaxes(1, 2)


def _halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two float32 that float16 holds exactly, packed: uint32."""
    first, second = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (a, b))
    return first | second << 16


def _decoder_tables(h: Header, plan: Plan, table_bits: int) -> dict[str, np.ndarray]:
    if h.coding == c.CODING_PAPER:
        _, cos, sin = t.paper_cells()
        directions = (2 * np.arange(16) + 1) * (c.CIRCLE // 32)
        return {
            "ANGLES": np.stack([cos, sin], 2).astype(np.float32),
            "DIRECTIONS": np.stack([plan.circle_cos[directions], plan.circle_sin[directions]], 1),
            "MANTISSAS": plan.mantissas[:1],
        }
    nodes, quads = t.node_arrays(plan.order), plan.quads
    codes, last = quads.per_cell, quads.cells.astype(np.int64) - 1
    shift = np.array([int(n).bit_length() - 1 for n in codes])
    magic = [-(-(1 << (31 + int(s))) // int(n)) for s, n in zip(shift, codes, strict=True)]
    n_b = quads.n_b.astype(np.int64)
    # A circle of one sector has the factor 0: its step may be any. Bits from 27 on do not reach a direction: -n_b lies there.
    step_a, step_b = (np.where(n > 1, angles.circle_step(n), 0).astype(np.int64) for n in (quads.n_a, quads.n_b))
    records = [-(-(1 << 31) // n_b), step_a | (-n_b & 31) << 27, step_b | (-n_b >> 5 & 31) << 27, _halves(quads.cos, quads.sin)]
    arrays = {
        "NODES": np.stack([_halves(nodes.cos, nodes.sin), nodes.shift.view(np.uint32)], 2),
        "CIRCLE": _halves(plan.circle_cos, plan.circle_sin),
        "BUDGETS": np.stack([magic, shift | last << 16, -codes, quads.first], 1).astype(np.uint32),
        "RECORDS": np.stack(records, 1).astype(np.uint32),
        "MANTISSAS": plan.mantissas,
    }
    if table_bits:
        arrays["CODES"], arrays["POINTS"] = _code_table(plan, table_bits)
    return arrays


def _code_table(plan: Plan, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (bytes, 16 bits each) of the two pairs' points of every code, entry 2^budget + code: uint32; and those points."""
    quads = plan.quads
    records = quads.first[most] + quads.cells[most]
    points, first = [], np.zeros((2, records), np.int64)
    at = 0
    for record in range(records):
        for pair, (n, factor) in enumerate(((quads.n_a, quads.cos), (quads.n_b, quads.sin))):
            sectors = np.arange(n[record], dtype=np.int64)
            step = int(angles.circle_step(n[record]))
            direction = ((2 * sectors + 1) * step + (1 << (c.PHASE_SHIFT - 1)) >> c.PHASE_SHIFT) % c.CIRCLE
            points.append(factor[record] * np.stack([plan.circle_cos[direction], plan.circle_sin[direction]], 1))
            first[pair, record] = at
            at += len(sectors)
    table = np.zeros(2 << most, np.uint32)
    for budget in range(most + 1):
        code = np.arange(1 << budget)
        cell = np.minimum(code // quads.per_cell[budget], quads.cells[budget] - 1)
        record = quads.first[budget] + cell
        a, b = np.divmod(code - cell * quads.per_cell[budget], quads.n_b[record])
        table[1 << budget : 2 << budget] = 8 * (first[0, record] + a) | 8 * (first[1, record] + b) << 16
    found = np.concatenate(points).astype(np.float32)
    assert found.nbytes <= 1 << 16
    return table, found


def _encoder_tables(h: Header, plan: Plan) -> dict[str, np.ndarray]:
    if h.coding == c.CODING_PAPER:
        return {}
    nodes, quads, kept = t.node_arrays(plan.order), plan.quads, _kept(h)
    bounds = np.minimum(np.pad(nodes.bounds, ((0, 0), (0, 0), (0, 1)), constant_values=1 << 30), (1 << 16) - 1)
    return {
        "LOOK_UPS": _past_the_end(nodes.look_up)[kept],
        "BOUNDS": bounds.astype(np.uint16)[kept],
        "SHIFTS": nodes.shift.astype(np.int8),
        "CELLS": _past_the_end(t.quad_look_up()),
        "BUDGETS": np.stack([quads.per_cell, quads.first], 1).astype(np.uint32),
        "SECTORS": (quads.n_a | quads.n_b << 16).astype(np.uint32),
        "SHIFTS_16": _past_the_end(_shift_look_up(nodes, plan.order))[kept[-2:]],
    }


@lru_cache(maxsize=64)
def _kept(h: Header) -> np.ndarray:
    """Which rows of the encoder's look-ups a kernel has: bool [kinds, widths].

    With one round all; beside the matrix of two there is room only for widths that a kind's angles have. Split coding.
    """
    plan = plan_for(h)
    kept = np.full((len(plan.tree.tables), t.WIDTHS), plan.rounds == 1)
    budgets = {plan.root_budget}
    for kind, table in enumerate(plan.tree.tables):  # these orders halve down to 8: one kind a level
        widths = table.bits[sorted(budgets)]
        kept[kind, widths.min() : widths.max() + 1] = True
        below: set[int] = set()
        for budget in budgets:
            width = int(table.bits[budget])
            shift = table.shift[1 << width : 2 << width].astype(np.int64)
            rest = np.full_like(shift, budget - width)
            left = angles.split_budget(rest, shift, table.m_a, table.m_b)
            below |= {*left.tolist(), *(rest - left).tolist()}
        budgets = below
    return kept


def _look_up_rows(h: Header) -> list[int]:
    """Where a kind's look-ups begin, in rows: less the widths that lie between there and those that are kept."""
    kept = _kept(h)
    return [int(kept[:kind].sum() - kept[kind].argmax()) for kind in range(len(kept))]


def _shift_look_up(nodes: t.NodeArrays, order: int) -> np.ndarray:
    """Shift of the share by place, for nodes of 16 and 8 coordinates: int8 [2, widths, 1024]."""
    kinds = np.array([order.bit_length() - 5, order.bit_length() - 4])  # these orders halve down to 8: one kind a level
    widths = 1 << np.arange(t.WIDTHS)[None, :, None]
    return nodes.shift[kinds[:, None, None], widths + nodes.look_up[kinds]].astype(np.int8)


def _past_the_end(look_up: np.ndarray) -> np.ndarray:
    """Rows of 1,024 places, continued to LOOK_UP_BYTES: a share of all the energy is place 1,024."""
    return np.pad(look_up, [(0, 0)] * (look_up.ndim - 1) + [(0, LOOK_UP_BYTES - t.STEPS)], mode="edge")


# -- compiling ---------------------------------------------------------------------------------------------------------
def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or the compiler gives, or its error."""
    error, *values = result
    if int(error):
        raise BackendUnavailable(f"CUDA: {error.name}: is the driver as new as the toolkit?")
    return values[0] if len(values) == 1 else values


def definitions(verb: str, h: Header, layout: Layout) -> dict[str, Any]:
    """The macros that ``blocks.cu`` is compiled with."""
    plan, paper = plan_for(h), h.coding == c.CODING_PAPER
    return {
        "DECODER" if verb == "decode" else "ENCODER": 1,
        "ORDER": plan.order,
        "LOG2_ORDER": plan.order.bit_length() - 1,
        "DTYPE": h.dtype,
        "ITEM": c.ITEM_BYTES[h.dtype],
        "LARGEST": f"{c.LARGEST_FINITE[h.dtype]!r}f",
        "SMALLEST": f"{SMALLEST[h.dtype]!r}f",
        "LARGEST_32": f"{c.LARGEST_FINITE[c.DTYPE_FLOAT32]!r}f",
        "ROOT_BUDGET": 0 if paper else plan.root_budget,
        "RADIUS_BITS": plan.radius_bits,
        "RADIUS_STEPS": 1 if paper else plan.radius_steps,
        "RADIUS_BIAS": c.RADIUS_BIAS,
        "RADIUS_SPLIT": f"({c.RADIUS_SPLIT})",
        "RADIUS_SHIFT": c.RADIUS_SHIFT,
        "SECOND_FACTOR": f"{2.0**-c.RADIUS_SHIFT!r}f",
        "GRID": f"{float(c.GRID)!r}f",
        "PAPER": int(paper),
        "ROUNDS": h.rounds,
        "BYTES": int(_in_bytes(verb, h)),
        "WARPGROUPS": int(layout.warpgroups),
        "PAPER_BOUNDS": _braces(t.paper_cells()[0] ** 2),
        "ROWS": ROWS,
        "ROW_BYTES": plan.row_bytes,
        "STRIDE_WORDS": _stride_words(h),
        "STAGE_BYTES": _stage_bytes(h),
        "WARP_BYTES": _warp_bytes(h, layout.bulk),
        "BULK": int(layout.bulk),
        "CHUNK": h.chunk_tokens,
        "OFFSETS": int(h.offsets),
        "PAIRS": len(h.rope.frequencies) if h.rope else 0,
        "INTERLEAVED": int(h.rope is not None and h.rope.pairing == c.ROPE_INTERLEAVED),
        "TABLE_BITS": layout.table_bits,
        "LOOK_UP_BYTES": LOOK_UP_BYTES,
        **({} if paper or verb == "decode" else _row_definitions(h)),
        "SIGNS_BYTES": _signs_bytes(verb, h),
        "KEY_0": f"{checksum_keys(1)[0]}u",
        "PRIME": f"{c.CHECKSUM_PRIME}ull",
        "PRIME_GAP": (1 << 32) - c.CHECKSUM_PRIME,
        "THREADS": layout.threads,
        "BLOB_BYTES": layout.blob.size,
        **{name.upper(): place for name, place in SPAN._asdict().items()},
        "FIELDS": len(SPAN),
        "OFFSET_EXPONENT_AT": c.OFFSET_EXPONENT_AT,
        "RADIUS_EXPONENT_AT": c.RADIUS_EXPONENT_AT,
        **layout.places,
    }


def _row_definitions(h: Header) -> dict[str, Any]:
    rows = _look_up_rows(h)
    return {"LOOK_UP_ROWS": f"{{{','.join(map(str, rows))}}}", "LOOK_UP_ROW_16": int(_kept(h)[:-2].sum())}


def _signs_bytes(verb: str, h: Header) -> int:
    """The operands of one round of the rotation: 16 bytes a lane, of float16 and, when encoding, of bfloat16."""
    return 0 if h.rounds == 2 else 512 if verb == "decode" else 1024


def _braces(array: np.ndarray) -> str:
    """An array of float32 as C++ writes it."""
    return "{" + ",".join("{" + ",".join(f"{x!r}f" for x in map(float, row.astype(np.float32))) + "}" for row in array) + "}"


def _stride_words(h: Header) -> int:
    """Words from row to row while they are coded: four more than a multiple of eight, so that rows begin in different banks."""
    return (plan_for(h).row_bytes // 4 + 3) // 8 * 8 + 4


def _stage_bytes(h: Header) -> int:
    """A tile's rows, and what a last run may touch behind them."""
    paper = h.coding == c.CODING_PAPER
    return -(-ROWS * (plan_for(h).row_bytes if paper else 4 * _stride_words(h)) // 16) * 16 + 16


def _warp_bytes(h: Header, bulk: bool) -> int:
    """Shared memory of one warp: a tile's rows, the next block, and decoded rows for the bulk copy engine."""
    return _stage_bytes(h) + 64 + (ROWS * (h.vector_bytes + 64) if bulk else 0)


@dataclass(frozen=True)
class Layout:
    """What a kernel keeps in shared memory, and how many threads share it."""

    threads: int
    table_bits: int  # quads of so many bits are looked up
    bulk: bool  # decoded rows leave by the bulk copy engine
    warpgroups: bool  # four warps multiply together (compute capability 9.0 alone knows how)
    blob: np.ndarray
    places: dict[str, int]
    shared_bytes: int


def layout(verb: str, h: Header, few: bool = False, major: int = 9, limit: int = 232448) -> Layout | None:
    """The layout for a device of a compute capability and bytes of shared memory; None if there is none.

    ``few``: there are few blocks, for which large tables do not pay.
    """
    decode = verb == "decode"
    for keys, bits in product((True, False), sorted({0} if few or not decode else {0, table_bits(h)}, reverse=True)):
        blob, places = tables_for(verb, h, bits, keys)
        special = ROPE_THREADS if h.rope else TABLE_THREADS if bits and not h.offsets else {}
        special = special | (ROUNDS_THREADS if h.rounds > 1 and not h.offsets else {})
        threads = special.get((verb, h.order), THREADS[verb, h.order])
        for bulk in (True, False) if decode and major >= 9 else (False,):
            size = blob.size + _signs_bytes(verb, h) + threads // 32 * _warp_bytes(h, bulk)
            if size <= limit:
                return Layout(threads, bits, bulk, h.rounds == 2 and major == 9, blob, places, size)
    return None


def table_bits(h: Header) -> int:
    return next((bits for most, bits in TABLE_BITS if h.coding == c.CODING_SPLIT and h.row_bits <= most * h.order), 0)


def tables_for(verb: str, h: Header, bits: int, keys: bool) -> tuple[np.ndarray, dict[str, int]]:
    """``keys``: the checksum's as well, if there are few; otherwise the kernel reads them from the device's memory."""
    plan = plan_for(h)
    own = _decoder_tables(h, plan, bits) if verb == "decode" else _encoder_tables(h, plan)
    return _blob({**own, **_shared(verb, h, plan, keys)})


def compiled(verb: str, h: Header, layout: Layout, architecture: str) -> bytes:
    """The machine code (cubin) of one direction for one kind of stream."""
    source = files("pqcodec.kernels.on_cuda").joinpath("blocks.cu").read_bytes()
    options = [f"-D{name}={value}" for name, value in definitions(verb, h, layout).items()]
    options += [f"--gpu-architecture={architecture}{'a' * layout.warpgroups}", "--fmad=false", "--std=c++17"]
    try:
        program = _checked(nvrtc.nvrtcCreateProgram(source, b"blocks.cu", 0, [], []))
    except RuntimeError as missing:  # cuda-bindings look for the library when it is called first
        raise BackendUnavailable(f"backend 'cuda' needs NVRTC: pip install 'pqcodec[cuda]' ({missing})") from missing
    error = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    if int(error):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendUnavailable(f"CUDA: {error.name} for {architecture}:\n{log.decode(errors='replace')}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


@dataclass(frozen=True)
class Kernel:
    function: Any
    layout: Layout
    blob: Any  # the layout's, a torch tensor on the device


@lru_cache(maxsize=64)
def _device(device: str) -> tuple[int, str, int, int]:
    """Major compute capability, architecture, multiprocessors, and bytes of shared memory that a block may have."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # a context for the driver
        which = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        limit = _checked(driver.cuDeviceGetAttribute(which, _checked(driver.cuCtxGetDevice())))
    return properties.major, f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, limit


@lru_cache(maxsize=64)
def _kernel(verb: str, kind: Header, few: bool, device: str) -> Kernel | None:
    """The kernel of one direction for a kind of streams; None where the device has too little shared memory."""
    import torch

    major, architecture, _, limit = _device(device)
    found = layout(verb, kind, few, major, limit)
    if found is None:
        return None
    code = compiled(verb, kind, found, architecture)
    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(code))
        function = _checked(driver.cuModuleGetFunction(module, f"{verb}_blocks".encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, found.shared_bytes))
        tensor = torch.from_numpy(found.blob).to(device)
    return Kernel(function, found, tensor)


def _kind(h: Header) -> Header:
    """A header that stands for all of its kind."""
    rope = h.rope and type(h.rope)(0, h.rope.pairing, h.rope.frequencies)
    return Header(
        h.coding,
        h.dtype,
        (1, h.head_dim),
        h.row_bits,
        h.radius_bits,
        h.seed,
        h.chunk_tokens,
        offsets=h.offsets,
        rope=rope,
        rounds=h.rounds,
    )


class Cuda(Triton):
    """NVIDIA GPUs."""

    name = "cuda"

    def check_device(self, device: Any) -> None:
        import torch

        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 8:
            raise BackendUnavailable(
                f"backend 'cuda' codes tensors of NVIDIA GPUs of compute capability 8.0 and more, this one is on "
                f"{str(device)!r}; move it (bytes: pass device='cuda'), or choose backend 'triton' (other GPUs) or 'cpu'"
            )

    def prepare(self, verb: str, group: Group) -> None:
        super().prepare(verb, group)
        self._kernel(verb, group)  # compiled and loaded here, which a stream that is being captured would not allow

    def encode(self, group: Group) -> None:
        kernel = self._kernel("encode", group)
        if kernel is None:
            return super().encode(group)
        group.span_flags.zero_()
        self._launch(kernel, group, group.span_flags)

    def decode(self, group: Group) -> None:
        kernel = self._kernel("decode", group)
        if kernel is None:
            return super().decode(group)
        self._launch(kernel, group, group.block_flags)

    @staticmethod
    def _kernel(verb: str, group: Group) -> Kernel | None:
        """The kernel that codes a group; None where Triton's do."""
        if not covers(group):
            return None
        device = str(group.device)
        few = group.blocks <= FEW * _device(device)[2]
        return _kernel(verb, _kind(group.header), few, device)

    @staticmethod
    def _launch(kernel: Kernel, group: Group, flags: Any) -> None:
        import torch

        if not group.blocks:
            return
        tensors = (group.rows, group.block_firsts, group.starts, flags, group.keys, kernel.blob)
        values = [np.array(x.data_ptr(), np.uint64) for x in tensors]
        values += [np.array(group.blocks, np.int64), np.array(group.search, np.int32)]
        pointers = np.array([value.ctypes.data for value in values], np.uint64)
        threads = kernel.layout.threads
        warps = threads // 32
        grid = min(_device(str(group.device))[2], -(-group.blocks // min(warps, SPREAD)))
        if group.brief:  # a warp codes one block
            grid = max(grid, -(-group.blocks // warps))
        stream = torch.cuda.current_stream(group.device).cuda_stream
        with torch.cuda.device(group.device):
            _checked(
                driver.cuLaunchKernel(
                    kernel.function, grid, 1, 1, threads, 1, 1, kernel.layout.shared_bytes, stream, pointers.ctypes.data, 0
                )
            )
