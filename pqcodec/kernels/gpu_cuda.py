"""Law: the CUDA backend: ``cuda_tiles.cu`` compiled at run time (NVRTC) where it pays, Triton's kernels for everything else.

NVIDIA GPUs of compute capability 8.0 and more; budget-splitting presets; head_dim 64, 128 or 256 (decoding), 128 (encoding),
rows whose addresses are multiples of 16 bytes. ``covers`` is the whole rule. A kernel is compiled once a process for each kind of stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc

from pqcodec import angles, centre
from pqcodec import constants as c
from pqcodec.errors import BackendUnavailable
from pqcodec.header import Header
from pqcodec.kernels import device as d
from pqcodec.kernels import tables as t
from pqcodec.kernels.device import Group
from pqcodec.kernels.gpu import Triton
from pqcodec.plan import Plan, plan_for

ORDERS = {"encode": (128,), "decode": (64, 128, 256)}
# Threads of a block by direction and order, one block a multiprocessor (the tables fill half of its shared memory).
THREADS = {("encode", 128): 384, ("decode", 64): 512, ("decode", 128): 512, ("decode", 256): 256}
TABLE_BITS = 13  # quads of so many bits are looked up, where most of them are that small
TABLE_BUDGET = 3.2  # bits a coordinate, up to which they are
_ALIGNED = 16
_FAR_POWER = 40


def covers(verb: str, group: Group) -> bool:
    """Whether ``cuda_tiles.cu`` codes a group; otherwise Triton's kernels do."""
    h = group.header
    rope = h.rope is None or h.rope.pairing == c.ROPE_INTERLEAVED or len(h.rope.frequencies) % 8 == 0
    item = c.ITEM_BYTES[h.dtype]
    return (
        h.coding == c.CODING_SPLIT
        and h.head_dim in ORDERS[verb]
        and h.row_bits % 32 == 0
        and rope
        and all(s.payload % 4 == 0 and s.stride * item % _ALIGNED == 0 and not (s.starts % _ALIGNED).any() for s in group.spans)
    )


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


def _shared(h: Header, plan: Plan) -> dict[str, np.ndarray]:
    signs = np.where(plan.signs < 0, 1 << 31, 0).astype(np.uint32)
    arrays = {"SIGNS": signs[0::2] >> 16 | signs[1::2], "SIGNS_32": signs}
    if h.rope:
        arrays["FREQUENCIES"] = np.array(h.rope.frequencies, np.uint32)
        cos_h, sin_h, cos_l, sin_l = centre.phase_tables()
        arrays["PHASES"] = np.stack([np.stack([cos_h, sin_h], 1), np.stack([cos_l, sin_l], 1)])
    return arrays


def _decoder_tables(h: Header, plan: Plan, table_bits: int) -> dict[str, np.ndarray]:
    nodes, quads = t.node_arrays(plan.order), plan.quads
    packed = nodes.cos.view(np.uint32) | (nodes.shift & 0x1FFF).astype(np.uint32)  # factors have 11 bits: 13 are free
    codes, last = quads.per_cell, quads.cells.astype(np.int64) - 1
    shift = np.array([int(n).bit_length() - 1 for n in codes])
    magic = [-(-(1 << (31 + int(s))) // int(n)) for s, n in zip(shift, codes, strict=True)]
    steps = [angles.circle_step(n) for n in (quads.n_a, quads.n_b)]
    magic_b = -(-(1 << 31) // quads.n_b.astype(np.int64))
    arrays = {
        "NODES": np.stack([packed, nodes.sin.view(np.uint32)], 2),
        "CIRCLE": np.stack([plan.circle_cos, plan.circle_sin], 1),
        "MEANS": np.stack([quads.cos, quads.sin], 1),
        "BUDGETS": np.stack([magic, shift, codes, quads.first | last << 16], 1).astype(np.uint32),
        "RECORDS": np.stack([quads.n_b, magic_b, *steps], 1).astype(np.uint32),
        "MANTISSAS": plan.mantissas,
    }
    if table_bits:
        arrays["QUADS"] = _quad_table(quads, table_bits)
    return arrays


def _quad_table(quads: angles.QuadTable, most: int) -> np.ndarray:
    """Record (10 bits) and directions of b and a (11 each) of every code, entry 2^budget + code: uint32."""
    table = np.zeros(2 << most, np.uint32)
    for budget in range(most + 1):
        code = np.arange(1 << budget)
        cell = np.minimum(code // quads.per_cell[budget], quads.cells[budget] - 1)
        record = quads.first[budget] + cell
        sectors = np.divmod(code - cell * quads.per_cell[budget], quads.n_b[record])
        phases = [
            ((2 * sector + 1) * angles.circle_step(n[record]) + (1 << (c.PHASE_SHIFT - 1)) >> c.PHASE_SHIFT) % c.CIRCLE
            for sector, n in zip(sectors, (quads.n_a, quads.n_b), strict=True)
        ]
        table[1 << budget : 2 << budget] = phases[0] << 21 | phases[1] << 10 | record
    return table


def _encoder_tables(h: Header, plan: Plan) -> dict[str, np.ndarray]:
    nodes, quads = t.node_arrays(plan.order), plan.quads
    bounds = np.minimum(np.pad(nodes.bounds, ((0, 0), (0, 0), (0, 1)), constant_values=1 << 30), (1 << 16) - 1)
    return {
        "LOOK_UPS": nodes.look_up,
        "BOUNDS": bounds.astype(np.uint16),
        "SHIFTS": nodes.shift.astype(np.int8),
        "CELLS": t.quad_look_up(),
        "BUDGETS": np.stack([quads.per_cell, quads.first], 1).astype(np.uint32),
        "SECTORS": np.stack([quads.n_a, quads.n_b], 1).astype(np.float32),
    }


# -- compiling ---------------------------------------------------------------------------------------------------------
def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or the compiler gives, or its error."""
    error, *values = result
    if int(error):
        raise BackendUnavailable(f"CUDA: {error.name}: is the driver as new as the toolkit?")
    return values[0] if len(values) == 1 else values


def definitions(verb: str, h: Header, places: dict[str, int], blob_bytes: int) -> dict[str, Any]:
    """The macros that ``cuda_tiles.cu`` is compiled with."""
    plan = plan_for(h)
    fields = ("STREAM", "PAYLOAD", "LEADING", "CODED", "EXACT", "FIRST_CHUNK", "FIRST_LEAD", "LEADS", "FIRST_TOKEN", "LAST_TOKEN")
    fields += ("STRIDE", "STARTS", "FLAGS", "POSITION", "OFFSETS_AT", "FIELDS", "OFFSET_EXPONENT_AT")
    return {
        "DECODER" if verb == "decode" else "ENCODER": 1,
        "ORDER": plan.order,
        "LOG2_ORDER": plan.order.bit_length() - 1,
        "DTYPE": h.dtype,
        "ITEM": c.ITEM_BYTES[h.dtype],
        "LARGEST": f"{c.LARGEST_FINITE[h.dtype]!r}f",
        "LARGEST_32": f"{c.LARGEST_FINITE[c.DTYPE_FLOAT32]!r}f",
        "ROOT_BUDGET": plan.root_budget,
        "RADIUS_BITS": plan.radius_bits,
        "RADIUS_STEPS": plan.radius_steps,
        "RADIUS_BIAS": c.RADIUS_BIAS,
        "RADIUS_SPLIT": f"({c.RADIUS_SPLIT})",
        "RADIUS_SHIFT": c.RADIUS_SHIFT,
        "SECOND_FACTOR": f"{2.0**-c.RADIUS_SHIFT!r}f",
        "GRID": f"{float(c.GRID)!r}f",
        "ROW_WORDS": plan.row_bytes // 4,
        "CHUNK": h.chunk_tokens,
        "OFFSETS": int(h.offsets),
        "PAIRS": len(h.rope.frequencies) if h.rope else 0,
        "INTERLEAVED": int(h.rope is not None and h.rope.pairing == c.ROPE_INTERLEAVED),
        "TABLE_BITS": table_bits(h),
        "PRIME": f"{c.CHECKSUM_PRIME}ull",
        "PRIME_GAP": (1 << 32) - c.CHECKSUM_PRIME,
        "FAR_POWER": _FAR_POWER,
        "THREADS": THREADS[verb, plan.order],
        "CTAS": 1,
        "BLOB_BYTES": blob_bytes,
        **{name: getattr(d, name) for name in fields},
        **places,
    }


def table_bits(h: Header) -> int:
    return TABLE_BITS if h.row_bits <= TABLE_BUDGET * h.order else 0


def tables_for(verb: str, h: Header) -> tuple[np.ndarray, dict[str, int]]:
    plan = plan_for(h)
    own = _decoder_tables(h, plan, table_bits(h)) if verb == "decode" else _encoder_tables(h, plan)
    return _blob({**own, **_shared(h, plan)})


def compiled(verb: str, h: Header, places: dict[str, int], blob_bytes: int, architecture: str) -> bytes:
    """The machine code (cubin) of one direction for one kind of stream."""
    source = files("pqcodec.kernels").joinpath("cuda_tiles.cu").read_bytes()
    options = [f"-D{name}={value}" for name, value in definitions(verb, h, places, blob_bytes).items()]
    options += [f"--gpu-architecture={architecture}", "--fmad=false", "--std=c++17"]
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"cuda_tiles.cu", 0, [], []))
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
    blob: Any  # the tables, a torch tensor on the device
    shared_bytes: int
    processors: int
    threads: int


@lru_cache(maxsize=64)
def _kernel(verb: str, kind: Header, device: str) -> Kernel:
    import torch

    blob, places = tables_for(verb, kind)
    properties = torch.cuda.get_device_properties(device)
    code = compiled(verb, kind, places, blob.size, f"sm_{properties.major}{properties.minor}")
    threads = THREADS[verb, kind.order]
    stage = (threads // 32) * (16 * plan_for(kind).row_bytes + 16)
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # a context for the driver
        module = _checked(driver.cuModuleLoadData(code))
        function = _checked(driver.cuModuleGetFunction(module, f"{verb}_blocks".encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, blob.size + stage))
        tensor = torch.from_numpy(blob).to(device)
    return Kernel(function, tensor, blob.size + stage, properties.multi_processor_count, threads)


def _kind(h: Header) -> Header:
    """A header that stands for all of its kind."""
    rope = h.rope and type(h.rope)(0, h.rope.pairing, h.rope.frequencies)
    return Header(
        h.coding, h.dtype, (1, h.head_dim), h.row_bits, h.radius_bits, h.seed, h.chunk_tokens, offsets=h.offsets, rope=rope
    )


class Cuda(Triton):
    """NVIDIA GPUs."""

    name = "cuda"

    def check_device(self, device: Any) -> None:
        import torch

        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 8:
            raise BackendUnavailable(
                f"backend 'cuda' codes tensors of NVIDIA GPUs of compute capability 8.0 and more, this one is on {str(device)!r}; "
                "choose backend 'triton' or 'cpu'"
            )

    def encode(self, group: Group) -> None:
        if not covers("encode", group):
            return super().encode(group)
        group.span_flags.zero_()
        self._launch("encode", group, group.span_flags)

    def decode(self, group: Group) -> None:
        if not covers("decode", group):
            return super().decode(group)
        self._launch("decode", group, group.block_flags)

    @staticmethod
    def _launch(verb: str, group: Group, flags: Any) -> None:
        import torch

        if not group.blocks:
            return
        kernel = _kernel(verb, _kind(group.header), str(group.device))
        tensors = (group.rows, group.block_firsts, group.starts, flags, group.keys, kernel.blob)
        values = [np.array(x.data_ptr(), np.uint64) for x in tensors]
        values += [np.array(group.blocks, np.int64), np.array(group.search, np.int32)]
        pointers = np.array([value.ctypes.data for value in values], np.uint64)
        grid = min(kernel.processors, -(-group.blocks // (kernel.threads // 32)))
        stream = torch.cuda.current_stream(group.device).cuda_stream
        with torch.cuda.device(group.device):
            _checked(
                driver.cuLaunchKernel(
                    kernel.function, grid, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream, pointers.ctypes.data, 0
                )
            )
