"""Law: the CUDA backend on a CPU: its kernels are compiled to PTX, which ``ptx_machine`` runs, launched as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ptx_machine import Machine

from pqcodec import constants as c
from pqcodec.kernels.on_cuda import backend, compiled
from pqcodec.kernels.on_cuda.quads import quads_definitions
from pqcodec.kernels.spans import Group

CAPABILITIES = {
    (8, 0): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}  # shared memory of a block, bytes


def assembly(name: str, macros: dict[str, Any], architecture: str) -> str:
    """The PTX of a source file with macros; as ``compiled.compiled``."""
    from cuda.bindings import nvrtc

    source, headers = compiled._sources(name)
    options = [f"-D{macro}={value}" for macro, value in macros.items()]
    options += [f"--gpu-architecture=compute_{architecture}", "--fmad=false", "--std=c++17"]
    contents, names = list(headers.values()), [each.encode() for each in headers]
    program = compiled.returned(nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), contents, names))
    compiled.returned(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
    code = b" " * compiled.returned(nvrtc.nvrtcGetPTXSize(program))
    compiled.returned(nvrtc.nvrtcGetPTX(program, code))
    return code.decode().rstrip("\0")


def assembly_of(verb: str, kind: Any, found: Any, effort: str, architecture: str) -> str:
    """The PTX of the kernel of one direction for a kind of streams; as ``backend.machine_code``."""
    of_quads = kind.coding == c.CODING_QUADS and verb == "decode"
    name = "quads_teams.cu" if found.sharing > 1 else "quads.cu" if of_quads else "blocks.cu"
    macros = quads_definitions(verb, kind, found) if of_quads else compiled.definitions(verb, kind, found, effort)
    return assembly(name, macros, architecture + "a" * found.warpgroups)


class CudaOnCpu(backend.Cuda):
    """``processors``: of the GPU that this stands for. ``few``: whether blocks count as few. ``memory``: tensors that launches
    may read and write. ``seed``: of the order in which threads take turns. ``capability``: one of ``CAPABILITIES``.
    """

    def __init__(self, folder: Path, processors: int = 2, few: bool = False) -> None:
        super().__init__()
        self.folder, self.processors, self.few, self.seed = folder, processors, few, 0
        self.capability = (9, 0)
        self.memory: list[torch.Tensor] = []
        self.launches = 0
        self._made: dict[Any, Any] = {}

    def check_device(self, device: Any) -> None:
        """Nothing: tensors are the CPU's."""

    def _kernel(self, verb: str, group: Group) -> Any:
        if not backend.takes(verb, group):
            return None
        kind, effort = backend.header_of_kind(group.header), group.effort
        asked = verb, kind, self.few, effort, self.capability
        if asked not in self._made:
            found = backend.kernel_layout(verb, kind, self.few, self.capability[0], CAPABILITIES[self.capability], effort)
            self._made[asked] = None
            if found is not None:
                code = assembly_of(verb, kind, found, effort, "{}{}".format(*self.capability))
                self._made[asked] = backend.Kernel(Machine(code, self.folder), found, torch.from_numpy(found.blob))
        return self._made[asked]

    def _launch(self, kernel: Any, group: Group) -> None:
        found = kernel.layout
        grid = min(self.processors, group.blocks) * found.parts
        given = (group.rows, group.block_firsts, group.starts, group.block_flags, group.keys, kernel.blob)
        blob = torch.empty(kernel.blob.numel() + 16, dtype=torch.uint8)  # its words are read 16 bytes at a time
        blob = blob[-blob.data_ptr() % 16 :][: kernel.blob.numel()].copy_(kernel.blob)
        values = [x.data_ptr() for x in (*given[:-1], blob)] + [group.blocks, group.search]
        written = {group.block_flags.data_ptr(), *(x.data_ptr() for x in self.memory)}
        tensors = [x for x in (*given[:-1], blob, *self.memory) if x.numel()]
        ranges = [(x.data_ptr(), x.data_ptr() + _extent(x), x.data_ptr() in written) for x in tensors]
        told = kernel.function.launch(grid, found.threads, found.shared_bytes, values, ranges, self.seed)
        assert told == "", told
        self.launches += 1


def _extent(x: torch.Tensor) -> int:
    """Bytes from a tensor's first number to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int((last + 1) * x.element_size())


def skewed(data: Any, skew: int) -> torch.Tensor:
    """A copy of bytes that begins ``skew`` bytes behind a multiple of 16."""
    flat = np.frombuffer(bytes(data), np.uint8)
    room = torch.zeros(len(flat) + 32, dtype=torch.uint8)
    at = -room.data_ptr() % 16 + skew
    return room[at : at + len(flat)].copy_(torch.from_numpy(flat.copy()))
