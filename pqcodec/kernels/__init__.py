"""Law: the one table of backends. A backend is imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.job import Backend


def _reference() -> Backend:
    from pqcodec.kernels.reference import Reference

    return Reference()


def _cpu() -> Backend:
    from pqcodec.kernels.cpu.backend import Cpu

    return Cpu()


def _triton() -> Any:
    from pqcodec.kernels.on_triton.backend import Triton

    return Triton()


def _cuda() -> Any:
    from pqcodec.kernels.on_cuda.backend import Cuda

    return Cuda()


BACKENDS: dict[str, Callable[[], Any]] = {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}
ON_DEVICE = {"triton", "cuda"}  # backends that take groups of spans (``device.py``) instead of jobs
BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "cuda", "xpu": "triton"}  # what backend="auto" means for a tensor's device


def auto(device: str) -> str:
    """What backend="auto" means for a device type: a rule of what is installed, told here; what fails later is an error.

    torch's "cuda" is an NVIDIA GPU or, under ROCm, one of AMD. "cuda" is chosen for NVIDIA's where cuda-bindings is
    installed, "triton" otherwise.
    """
    if device == "cuda" and (_rocm() or not _installed("cuda.bindings")):
        return "triton"
    return BACKEND_OF_DEVICE.get(device, device)


def _rocm() -> bool:
    import torch

    return torch.version.hip is not None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent is there
        return False


def backend(name: str, device: str = "cpu") -> Any:
    """The backend ``name``, or for "auto" the one of the device type. Raises BackendUnavailable."""
    chosen = auto(device) if name == "auto" else name
    if chosen not in BACKENDS:
        raise BackendUnavailable(f"backend {chosen!r} is unknown; choose from {sorted(BACKENDS)} or 'auto'")
    try:
        return BACKENDS[chosen]()
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {chosen!r} needs {error.name or error}: install it, or choose another backend"
        ) from error
