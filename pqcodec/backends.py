"""Law: the one list of backends, and what backend="auto" means. A backend is imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from pqcodec.errors import BackendUnavailable, InvalidArgument


def _reference() -> Any:
    from pqcodec.kernels.reference import Reference

    return Reference()


def _cpu() -> Any:
    from pqcodec.kernels.cpu.backend import Cpu

    return Cpu()


def _triton() -> Any:
    from pqcodec.kernels.on_triton.backend import Triton

    return Triton()


def _cuda() -> Any:
    from pqcodec.kernels.on_cuda.backend import Cuda

    return Cuda()


BACKENDS: dict[str, Callable[[], Any]] = {"reference": _reference, "cpu": _cpu, "triton": _triton, "cuda": _cuda}
ON_DEVICE = frozenset({"triton", "cuda"})  # they take groups of spans (``kernels.spans``), the others jobs (``kernels.job``)
AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}  # by the tensor's device; the first that is there


def on_device(backend: Any) -> bool:
    """Whether a backend, given itself or by name, codes tensors where they lie on a device."""
    return (backend if isinstance(backend, str) else backend.name) in ON_DEVICE


def auto(device: str) -> str:
    """What backend="auto" means for a device type: a rule of what is installed, told here; what fails later is an error.

    torch's "cuda" is an NVIDIA GPU or, under ROCm, one of AMD: there "cuda" is not chosen.
    """
    return next((name for name in AUTO.get(device, (device,)) if name != "cuda" or _cuda_is_there()), device)


def _cuda_is_there() -> bool:
    import torch

    return torch.version.hip is None and _installed("cuda.bindings")


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


def device_backend(name: str, device: Any) -> Any:
    """The backend that codes tensors where they lie on a torch device; raises InvalidArgument or BackendUnavailable."""
    found = backend(name, device.type)
    if not on_device(found):
        raise InvalidArgument(f"backend {found.name!r} does not code batches; choose from {sorted(ON_DEVICE)} or 'auto'")
    found.check_device(device)
    return found
