"""Law: the one table of backends. A backend is imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable

from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.job import Backend


def _reference() -> Backend:
    from pqcodec.kernels.reference import Reference

    return Reference()


def _cpu() -> Backend:
    from pqcodec.kernels.cpu import Cpu

    return Cpu()


BACKENDS: dict[str, Callable[[], Backend]] = {"reference": _reference, "cpu": _cpu}
BACKEND_OF_DEVICE = {"cpu": "cpu"}  # what backend="auto" means for a tensor's device


def backend(name: str, device: str = "cpu") -> Backend:
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
