"""The CUDA kernel of scores from pair polar without a GPU: it compiles and finds room; on a CPU it scores right."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GPU, HAS_CUDA, gaussian, needs_triton, sampled, skewed
from launch_shapes import local_bytes
from ptx_machine import Machine, is_there

import pqcodec
from pqcodec import attend_device
from pqcodec.attention import scores
from pqcodec.stream.header import Header, dtype_code

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not HAS_CUDA, reason="cuda-bindings is not installed"),
]
needs_interpreter = pytest.mark.skipif(GPU, reason="the kernels of a GPU are not mixed with a CPU's")


# -- compiled ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3)], ids=str)
def test_it_hardly_spills_and_all_resident_warps_find_room(bits: tuple[int, int], rows: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from pqcodec.kernels.on_cuda.compiled import compiled
    from pqcodec.kernels.on_cuda.pair_scores import RESIDENT, SHARED_PERCENT, ScoredKind, pair_definitions

    macros = pair_definitions(ScoredKind(*bits, 256, rows % 2 == 1, rows))
    needs = local_bytes(compiled("pair_scores.cu", macros, "sm_90"))["score_pairs"]
    warps = RESIDENT[-(-rows // 4)]
    assert needs["stack"] <= 16  # four registers at most, with any of the compilers, outside of the loop over tiles
    assert warps * needs["registers"] * 32 <= 65536
    assert warps * needs["shared"] <= SHARED_PERCENT * (228 << 10) // 100


# -- run on a CPU ------------------------------------------------------------------------------------------------------
class Machines(dict[Any, Machine]):
    """The kernel by what it is compiled for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, kind: Any) -> Machine:
        from pqcodec.kernels.on_cuda.compiled import compiled
        from pqcodec.kernels.on_cuda.pair_scores import pair_definitions

        self[kind] = found = Machine(compiled("pair_scores.cu", pair_definitions(kind), "compute_90"), self.folder)
        return found


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Machines:
    if not is_there():
        pytest.skip("no compiler (g++) of C++20 with numbers of 16 bits is here")
    return Machines(tmp_path_factory.mktemp("machines"))


class Launches:
    """Launches of the kernel on the CPU: how many thread blocks each had."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.streams: list[torch.Tensor] = []  # that it may read

    def launch(self, machine: Machine, shares: Any, blocks: int, query: Any, out: Any, leads: int, scale: float) -> None:
        read = [(x.data_ptr(), x.data_ptr() + x.nbytes, x is out) for x in (shares, query, out, *self.streams)]
        factor = int(np.float32(scale).view(np.uint32))
        values = [shares.data_ptr(), query.data_ptr(), out.data_ptr(), leads, dtype_code(query.dtype), factor]
        assert machine.launch(blocks, 32, 0, values, read) == ""
        self.blocks.append(blocks)

    def placed(self, data: bytes, skew: int = 0) -> torch.Tensor:
        """A stream that begins ``skew`` bytes behind a multiple of 16."""
        self.streams.append(skewed(data, skew))
        return self.streams[-1]


@pytest.fixture
def launches(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What stands for the GPU, where the CUDA backend is asked for."""
    from pqcodec.kernels.on_cuda import pair_scores

    found = Launches()
    monkeypatch.setattr(pair_scores, "_pair_kernel", lambda kind, device: machines[kind])
    monkeypatch.setattr(pair_scores, "launch_scores", found.launch)
    monkeypatch.setattr(attend_device, "device_backend", lambda *asked: SimpleNamespace(name="cuda"))
    return found


def keys_of(
    heads: int, tokens: int, dtype: torch.dtype = torch.float16, seed: int = 0, size: float = 1, **options: Any
) -> bytes:
    """A stream of keys that lie around a mean."""
    x = gaussian(heads, tokens, 128, seed=tokens + seed) + 2 * gaussian(heads, 1, 128, seed=1)
    return pqcodec.encode((size * x).to(dtype), backend="reference", **options)


def agrees(found: torch.Tensor, streams: list[bytes], q: torch.Tensor, **options: Any) -> None:
    """No score is farther from the reference's than float16's digits, and none is missing."""
    wanted = scores(streams, q.cpu().float(), backend="reference", **options)
    assert found.shape == wanted.shape
    assert (found.cpu() - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@needs_interpreter
@pytest.mark.parametrize(
    ("preset", "heads", "tokens", "rows", "dtype", "skew", "options"),
    sampled(
        [
            ("wu44", 2, 256, 4, torch.float16, 0, {}),
            ("wu33", 2, 256, 4, torch.float16, 0, {}),
            ("wu44", 3, 300, 4, torch.float16, 4, {"exact_tokens": 3}),
            ("wu33", 3, 300, 4, torch.float16, 12, {"exact_tokens": 3}),
            ("wu44", 1, 31, 7, torch.bfloat16, 8, {"pairing": "interleaved"}),
            ("wu33", 1, 31, 7, torch.bfloat16, 8, {"pairing": "interleaved"}),
            ("wu44", 2, 700, 8, torch.float16, 12, {"chunk_tokens": 256, "effort": "best"}),
            ("wu33", 2, 700, 1, torch.float16, 4, {"chunk_tokens": 256, "effort": "best"}),
            ("wu44", 1, 130, 2, torch.float16, 0, {"size": 1e3}),
            ("wu33", 1, 130, 2, torch.bfloat16, 0, {"size": 1e-6}),
        ],
        of=3,
    ),
    ids=str,
)
def test_its_source_scores_as_the_reference(
    preset: str, heads: int, tokens: int, rows: int, dtype: torch.dtype, skew: int, options: dict[str, Any], launches: Launches
) -> None:
    keys = keys_of(heads, tokens, dtype, preset=preset, **options)
    q = gaussian(heads * rows, 1, 128, seed=7).to(dtype)
    agrees(scores(launches.placed(keys, skew), q, backend="triton"), [keys], q)
    assert launches.blocks


@needs_interpreter
def test_parts_of_several_streams_and_exact_tokens_stand_in_their_places(launches: Launches) -> None:
    """Queries several a head; a range that begins and ends within groups; streams of both kinds, and one with exact vectors."""
    streams = [keys_of(1, 200, preset="wu44"), keys_of(1, 150, preset="wu33", exact_tokens=2)]
    streams.append(keys_of(1, 40, preset="wu44", exact_vectors=[[0, 5]]))
    q, recent = gaussian(2, 2, 128, seed=7).half(), gaussian(1, 3, 128, seed=8).half()
    placed = [launches.placed(data) for data in streams]
    asked: dict[str, Any] = {"tokens": (77, 380), "scale": 0.5}
    agrees(scores(placed, q, recent=recent, backend="triton", **asked), streams, q, recent=recent.float(), **asked)
    assert len(launches.blocks) == 1  # of wu33: one of the streams of the other kind has exact vectors


@pytest.mark.parametrize(
    ("preset", "dtype", "query", "rows", "cap", "options", "reason"),
    [
        ("wu44", torch.float16, torch.bfloat16, 8, 0.0, {"exact_tokens": 1}, None),
        ("wu33", torch.bfloat16, torch.float16, 1, 0.0, {"pairing": "interleaved", "chunk_tokens": 512}, None),
        ("wu35", torch.float16, torch.float16, 1, 0.0, {}, "no pairs of 4 and 4 or 3 and 3 bits"),
        ("int4", torch.float16, torch.float16, 1, 0.0, {}, "no pairs of"),
        ("wu44", torch.float32, torch.float16, 1, 0.0, {}, "none of float16, bfloat16"),
        ("wu44", torch.float16, torch.float32, 1, 0.0, {}, "none of float16, bfloat16"),
        ("wu44", torch.float16, torch.float16, 1, 0.0, {"center": "mean"}, "keys are centred"),
        ("wu44", torch.float16, torch.float16, 9, 0.0, {}, "9 query heads .* more than 8"),
        ("wu44", torch.float16, torch.float16, 1, 2.0, {}, "scores are capped"),
    ],
    ids=str,
)
def test_it_says_what_it_leaves(
    preset: str, dtype: torch.dtype, query: torch.dtype, rows: int, cap: float, options: dict[str, Any], reason: str | None
) -> None:
    from pqcodec.kernels.on_cuda.pair_scores import why_not_pairs

    found = why_not_pairs(Header.from_bytes(keys_of(1, 3, dtype, preset=preset, **options)), dtype_code(query), rows, cap)
    assert found is None if reason is None else re.search(reason, str(found))
