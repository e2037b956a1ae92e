"""Law: a kernel's machine code becomes a function on a device, which is launched on the device's current stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver

from pqcodec.kernels.on_cuda.compiled import returned

SHARED_BYTES = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CARVEOUT_PERCENT = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT


def loaded(code: bytes, name: str, device: str, attributes: dict[Any, int] | None = None) -> Any:
    """The function ``name`` of machine code, on a device, with these attributes."""
    import torch

    with torch.cuda.device(device):
        function = returned(driver.cuModuleGetFunction(returned(driver.cuModuleLoadData(code)), name.encode()))
        for attribute, value in (attributes or {}).items():
            returned(driver.cuFuncSetAttribute(function, attribute, value))
    return function


def launch(function: Any, grid: int, threads: int, shared_bytes: int, device: Any, arguments: Sequence[Any]) -> None:
    """Launch ``grid`` thread blocks. ``arguments``: tensors, whose addresses the kernel gets, and numpy's numbers or arrays."""
    import torch

    values = [np.array(x.data_ptr(), np.uint64) if hasattr(x, "data_ptr") else np.asarray(x) for x in arguments]
    pointers = np.array([value.ctypes.data for value in values], np.uint64)
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        returned(driver.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, pointers.ctypes.data, 0))
