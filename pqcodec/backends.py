"""Law: the one list of backends, and what backend="auto" means. A backend is imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from pqcodec.codings.declared import DECLARED
from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.stream.header import Header


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
EXTRAS = {"triton": "gpu", "cuda": "cuda"}  # that bring what a backend needs
ON_DEVICE = frozenset({"triton", "cuda"})  # they take groups of spans (``kernels.spans``), the others jobs (``kernels.job``)
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton"), "xpu": ("triton",)}  # by device, in the order they are tried


def names(backend: str, device: str = "cpu") -> list[str]:
    """The backends that may code tensors of a device type: ``backend`` alone or, for "auto", those of ``AUTO``.

    torch's "cuda" is an NVIDIA GPU or, under ROCm, one of AMD: there "cuda" is not tried. Nor is it where cuda-bindings are not
    installed; what fails later is an error. Raises BackendUnavailable where there is none of that name.
    """
    if backend == "auto" and device in AUTO:
        return [name for name in AUTO[device] if name != "cuda" or _cuda_is_there()]
    if backend == "auto":
        raise BackendUnavailable(f"device {device!r}: no backend codes tensors there; choose a device of {', '.join(AUTO)}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise BackendUnavailable(f"backend {backend!r} is unknown; choose from {sorted(BACKENDS)} or 'auto'")
    return [backend]


def on_device(backend: str, device: str = "cpu") -> bool:
    """Whether a backend codes tensors where they lie on a device, and not in host memory."""
    return names(backend, device)[0] in ON_DEVICE


def _cuda_is_there() -> bool:
    import torch

    return torch.version.hip is None and installed("cuda.bindings")


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent is there
        return False


def backend(name: str, device: str = "cpu", *headers: Header) -> Any:
    """The backend ``name`` or, for "auto", the first that covers the streams of these headers on a device type.

    Raises BackendUnavailable.
    """
    tried = names(name, device)
    for each in tried:
        found = _loaded(each)
        if all(map(found.covers, headers)):
            return found
    kinds = ", ".join(sorted({_kind(header) for header in headers}))
    advice = f"choose from {sorted(BACKENDS)}"
    if tried[0] in ON_DEVICE:
        advice = (
            f"backends {' and '.join(map(repr, AUTO['cpu']))} do: encode x.cpu(), decode without device= and from host memory"
        )
    raise BackendUnavailable(f"backend {' or '.join(map(repr, tried))} does not code such streams (coding {kinds}); {advice}")


def _kind(h: Header) -> str:
    """What a backend may not cover of a stream: its coding, and the stages that not all backends have."""
    stages: dict[str, Any] = {"a keep list": h.keep, "exact last tokens": h.last_tokens}
    stages |= {"heads joined": h.joined, "vectors before RoPE": h.before_rope, "a linear stage": h.linear}
    stages |= {"ranges of a shared table": h.shared_ranges}
    there = " and ".join(name for name, there in stages.items() if there)
    return DECLARED[h.coding].name + (f" with {there}" if there else "")


def kernel_folder() -> str | None:
    """The folder in which the CPU backend's compiled kernels are kept; None where they are compiled in every process."""
    from pqcodec.kernels.cpu.disk_cache import folder

    found = folder()
    return str(found.path) if found else None


def _loaded(name: str) -> Any:
    try:
        return BACKENDS[name]()
    except ImportError as error:
        needed = f"pqcodec's extra {EXTRAS[name]!r}" if name in EXTRAS else "it"
        raise BackendUnavailable(
            f"backend {name!r} needs {error.name or error}: install {needed}, or choose another backend"
        ) from error


def device_backend(name: str, device: Any, *headers: Header) -> Any:
    """The backend that codes streams of these headers on a torch device; raises InvalidArgument or BackendUnavailable."""
    if not on_device(name, device.type):
        named = names(name, device.type)[0]
        raise InvalidArgument(f"backend {named!r} does not code batches; choose from {sorted(ON_DEVICE)} or 'auto'")
    found = backend(name, device.type, *headers)
    found.check_device(device)
    return found
