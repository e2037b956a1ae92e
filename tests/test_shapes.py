"""No launch shape of the GPU kernels spills registers, but for those that are counted here: compiled for sm_90, no GPU needed.

The ordinary run compiles ``SOME`` shapes; with PQCODEC_ALL_SHAPES=1 it compiles every one, which takes most of an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import HAS_CUDA, HAS_TRITON
from launch_shapes import COLUMNS, EVERY, Shape

NEEDS_BINDINGS = pytest.mark.skipif(not HAS_CUDA, reason="cuda-bindings is not installed")
ALL = os.environ.get("PQCODEC_ALL_SHAPES") == "1"
SOME: list[Shape] = [
    ("triton", "pq3", "float32", 16, "mean"),
    ("triton", "paper", "float16", 64, None),
    ("triton", "pq3", "bfloat16", 64, "half"),
    ("cuda", "pq3", "bfloat16", 128, "half"),
    ("cuda", "pq3", "float16", 64, "mean"),
    ("cuda", "pq4", "float16", 64, None),
    ("cuda", "paper", "float32", 256, None),
    ("cuda", "quad3", "bfloat16", 576, None),
    *(("cuda", "quad3", dtype, 128, centre) for dtype, centre in (("bfloat16", "half"), ("float32", "interleaved"))),
]
# Bytes of stack that kernels still take, by columns of the tile, at the most. Triton: wide rows do not fit in 255 registers.
# CUDA: a few registers of many kinds, which is cheaper than fewer warps; the encoder's most are of rows with extreme numbers.
SPILLS = {
    ("triton", "encode_stream_blocks"): {128: 48, 256: 24, 512: 800, 1024: 3000},
    ("triton", "decode_stream_blocks"): {512: 320, 1024: 2600},
    ("triton", "attend_to_codes"): {16: 120, 32: 120, 64: 40, 128: 64, 256: 736},  # most where values are centred under RoPE
    ("cuda", "encode_stream_blocks"): {64: 8, 128: 120, 256: 168, 1024: 128},
    ("cuda", "decode_stream_blocks"): {64: 8, 128: 40, 1024: 16},
}


def spill_allowed(shape: Shape, kernel: str) -> int:
    columns = next(n for n in COLUMNS if n >= shape[3])
    return SPILLS.get((shape[0], kernel.split(",")[0]), {}).get(columns, 0)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, whose assembler is asked")
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=NEEDS_BINDINGS)])
def test_no_launch_shape_spills_but_those_that_are_counted(backend: str) -> None:
    shapes = [shape for shape in (EVERY if ALL else SOME) if shape[0] == backend]
    if backend == "cuda":
        pytest.importorskip("cuda.bindings.nvrtc")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("launch_shapes.py")],
        input=json.dumps(shapes),
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [(tuple(shape), kernel, needs) for shape, kernel, needs in map(json.loads, run.stdout.splitlines())]
    assert {shape for shape, _, _ in found} == set(shapes)
    spilled = [
        (*shape, kernel, needs["stack"]) for shape, kernel, needs in found if needs["stack"] > spill_allowed(shape, kernel)
    ]
    assert spilled == []


@NEEDS_BINDINGS
@pytest.mark.parametrize("limit", [101376, 166912, 232448], ids=["8.9", "8.0", "9.0"])  # by compute capability
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_finds_room_in_the_shared_memory_of_every_device(head_dim: int, limit: int) -> None:
    from pqcodec import Rope
    from pqcodec.kernels.on_cuda.attention import RESIDENT, AttentionKind, attention_layout
    from pqcodec.options import EncodeOptions

    shape, rope = (8, 1024, head_dim), Rope(theta=10000.0)
    for chunk, rows, names in product(
        (24, 32, 64, 100), (1, 4, 8, 16), (("quad2", "quad2"), ("quad3", "quad2.5"), ("quad3.5",) * 2)
    ):
        keys = EncodeOptions(names[0], center="rope", rope=rope, chunk_tokens=chunk).header(shape, 2)
        values = EncodeOptions(names[1], chunk_tokens=chunk).header(shape, 2)
        found = attention_layout(AttentionKind(keys, values, rows, 1, 2), limit)
        if (limit, head_dim, rows) != (101376, 256, 16):  # where it does not fit, the kernel refuses by name
            assert found.shared_bytes <= limit, (chunk, rows, names)
        if names[0] == "quad3" and limit > 101376 and rows <= 4:
            assert RESIDENT[head_dim] * (found.shared_bytes + 1024) <= limit + 1024


@NEEDS_BINDINGS
@pytest.mark.parametrize("preset", ["quad2", "quad2.5", "quad3", "quad3.5"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 192, 256])
def test_rows_that_the_bulk_copy_engine_stores_begin_at_whole_lines(head_dim: int, preset: str) -> None:
    """Elsewhere it stores them in more pieces, which takes a fifth longer."""
    from pqcodec import Rope
    from pqcodec.kernels.on_cuda.backend import kernel_layout
    from pqcodec.kernels.on_cuda.quads import LINE
    from pqcodec.options import EncodeOptions

    shape = (8, 8192, head_dim)
    found = kernel_layout("decode", EncodeOptions(preset).header(shape, 2), few=False)
    assert found is not None
    if found.sharing > 1:
        assert [found.places[name] % LINE for name in ("BLOB_BYTES", "TEAM_BYTES", "ROWS_AT")] == [0, 0, 0]
        assert found.teams * found.sharing == found.threads // 32 - 1  # the courier's warp
    assert (found.sharing > 1) == (head_dim in (96, 128) or (head_dim in (160, 192) and preset != "quad3.5"))
    keys = EncodeOptions(preset, center="rope", rope=Rope()).header(shape, 2)
    turned = kernel_layout("decode", keys, few=False)
    assert turned is not None
    if turned.sharing > 1:
        assert [turned.places[name] % LINE for name in ("BLOB_BYTES", "TEAM_BYTES", "ROWS_AT")] == [0, 0, 0]
        assert 2 * (turned.threads // 32 - turned.teams * turned.sharing - 1) == turned.teams  # a turner for each two teams
    assert (turned.sharing > 1) == (head_dim in (64, 96, 128))
    for alone in (replace(keys, runs=False), EncodeOptions(preset, chunk_tokens=16).header(shape, 2)):
        other = kernel_layout("decode", alone, few=False)
        assert other is not None
        assert other.sharing == 1


@NEEDS_BINDINGS
@pytest.mark.parametrize("preset", ["quad2", "quad2.5", "quad3", "quad3.5"])
@pytest.mark.parametrize("head_dim", [288, 320, 384, 448, 512, 576])
def test_teams_decode_large_vectors_with_registers_that_a_multiprocessor_has(head_dim: int, preset: str) -> None:
    """A kernel that asks for more than its thread block began with waits for them for ever."""
    from pqcodec.kernels.on_cuda.backend import kernel_layout
    from pqcodec.kernels.on_cuda.quads import REGISTERS, TEAM
    from pqcodec.options import EncodeOptions

    found = kernel_layout("decode", EncodeOptions(preset).header((8, 8192, head_dim), 2), few=False)
    assert found is not None
    assert found.sharing == 4
    begun = REGISTERS // found.threads // 8 * 8 * found.threads
    after = found.teams * TEAM * found.places["TEAM_REGISTERS"] + 32 * found.couriers * found.places["COURIER_REGISTERS"]
    assert after <= begun <= REGISTERS
    assert head_dim // 32 % (found.parts * found.places["JOINT"]) == 0
