"""Law: events that mark how far a device has come, in a form that code for CPU tensors can use too."""

from __future__ import annotations

from typing import Any


class NoEvent:
    """Stands for a CUDA event where the device is a CPU: work is done when its call returns, so nothing is ever waited for."""

    def record(self, stream: Any = None) -> None:
        """Do nothing, where a CUDA event would mark the work on ``stream`` until now."""

    def wait(self, stream: Any = None) -> None:
        """Do nothing, where a CUDA event would make ``stream`` wait for the mark."""

    def synchronize(self) -> None:
        """Do nothing, where a CUDA event would make the caller wait for the mark."""

    def query(self) -> bool:
        """True: the device has come to the mark."""
        return True


def event(device: Any) -> Any:
    """A CUDA event that nothing has recorded yet; a ``NoEvent`` for any other device."""
    import torch

    return torch.cuda.Event() if device.type == "cuda" else NoEvent()
