"""Law: the one table of backends. A backend is imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.job import Backend


def _reference() -> Backend:
    from pqcodec.kernels.reference import Reference

    return Reference()


def _cpu() -> Backend:
    from pqcodec.kernels.cpu import Cpu

    return Cpu()


def _triton() -> Any:
    from pqcodec.kernels.gpu import Triton

    return Triton()


def _cuda() -> Any:
    from pqcodec.kernels.gpu_cuda import Cuda

    return Cuda()


BACKENDS: dict[str, Callable[[], Any]] = {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}
ON_DEVICE = {"triton", "cuda"}  # backends that take groups of spans (``device.py``) instead of jobs
BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "cuda", "xpu": "triton"}  # what backend="auto" means for a tensor's device


def backend(name: str, device: str = "cpu") -> Any:
    """The backend ``name``, or for "auto" the one of the device type. Raises BackendUnavailable."""
    chosen = BACKEND_OF_DEVICE.get(device, device) if name == "auto" else name
    if chosen not in BACKENDS:
        raise BackendUnavailable(f"backend {chosen!r} is unknown; choose from {sorted(BACKENDS)} or 'auto'")
    try:
        return BACKENDS[chosen]()
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {chosen!r} needs {error.name or error}: install it, or choose another backend"
        ) from error
