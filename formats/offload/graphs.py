"""Law: launches that are repeated become a CUDA graph, which costs the host a tenth; captured where no one else launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

_PRIORITY = -3  # torch gives streams out of a ring for each priority: this one's are not those of a caller's other threads
_capturing = Lock()


class Replayed:
    """``run``, which launches the same kernels on the same memory each time: by itself at first, then as a graph.

    ``plain``: runs before the capture; the first one may allocate, which a graph must not. On a CPU all are plain.
    """

    def __init__(self, run: Callable[[], Any], device: Any, plain: int) -> None:
        self._run, self._device = run, device
        self._left = plain if device.type == "cuda" else -1
        self._graph: Any = None

    def __call__(self) -> None:
        if self._graph is None and self._left == 0:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.replay()
            return
        self._left -= 1
        self._run()

    def _captured(self) -> Any:
        import torch

        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.stream(_stream(self._device)):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._run()
            finally:
                graph.capture_end()
        return graph


@cache
def _stream(device: Any) -> Any:
    import torch

    return torch.cuda.Stream(device, priority=_PRIORITY)
