"""Law: the CUDA backend on a CPU: its kernels are compiled to PTX, which ``ptx_machine`` runs, launched as on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import skewed
from ptx_machine import Machine

from pqcodec.kernels.on_cuda import backend
from pqcodec.kernels.on_cuda.token_sums import SumsKernel, SumsKind
from pqcodec.kernels.spans import Group

CAPABILITIES = {
    (8, 0): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}  # shared memory of a block, bytes


class CudaOnCpu(backend.Cuda):
    """``processors``: of the GPU that this stands for. ``few``: whether blocks count as few. ``memory``: tensors that launches
    may read and write. ``seed``: of the order in which threads take turns. ``capability``: one of ``CAPABILITIES``.
    """

    def __init__(self, folder: Path, processors: int = 2, few: bool = False) -> None:
        super().__init__()
        self.folder, self.processors, self.few, self.seed = folder, processors, few, 0
        self.capability = (9, 0)
        self.memory: list[torch.Tensor] = []
        self.launches = self.summed = 0  # launches of blocks' kernels, and of means' tokens'
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
                code = backend.machine_code(verb, kind, found, "compute_{}{}".format(*self.capability), effort)
                self._made[asked] = backend.Kernel(Machine(code, self.folder), found, skewed(found.blob, 0))
        return self._made[asked]

    def _launch(self, kernel: Any, group: Group) -> None:
        found = kernel.layout
        grid = backend.thread_blocks(found, group, self.processors)
        given = backend.arguments(kernel, group)
        self._run(kernel, grid, found.threads, found.shared_bytes, given, given[8:])
        self.launches += 1

    def _sums_kernel(self, kind: SumsKind, group: Group) -> SumsKernel:
        if kind not in self._made:
            code = kind.machine_code("compute_{}{}".format(*self.capability))
            self._made[kind] = SumsKernel(Machine(code, self.folder), kind, skewed(kind.blob()[0], 0))
        return self._made[kind]

    def _launch_sums(self, kernel: Any, group: Group) -> None:
        self._run(kernel, kernel.grid(group), kernel.kind.threads, 0, kernel.arguments(group))
        self.summed += 1

    def _run(
        self, kernel: Any, grid: int, threads: int, shared_bytes: int, arguments: Sequence[Any], others: Sequence[Any] = ()
    ) -> None:
        """Launch a kernel, which may write its fourth argument, ``others`` and ``memory``."""
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else int(x) for x in arguments]
        written = (arguments[3], *others, *self.memory)
        ranges = [
            (x.data_ptr(), x.data_ptr() + _extent(x), any(x is each for each in written)) for x in (*tensors, *self.memory)
        ]
        told = kernel.function.launch(grid, threads, shared_bytes, values, ranges, self.seed)
        assert told == "", told


def _extent(x: torch.Tensor) -> int:
    """Bytes from a tensor's first number to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int((last + 1) * x.element_size())
