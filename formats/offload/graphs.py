"""Law: launches that are repeated become a CUDA graph, which costs the host a tenth; captured where no one else launches.

The driver captures, not torch: torch's capture marks its random generators, which fails other threads' sampling meanwhile, and
leaves them marked if it is broken off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

try:
    from cuda.bindings import driver
except ImportError:  # other GPUs: launches stay what they are
    driver = None  # type: ignore[assignment]

_PRIORITY = -3  # torch gives streams out of a ring for each priority: this one's are not those of a caller's other threads
_capturing = Lock()


class Replayed:
    """``run``, which launches the same kernels on the same memory each time: by itself at first, then as a graph.

    ``plain``: runs before the capture; the first one may allocate, a later one must not. Where nothing can be captured (a CPU,
    no driver bindings, no memory for a graph) all are plain. ``stream``: what all runs are on; None: the current one.
    """

    def __init__(self, run: Callable[[], Any], device: Any, plain: int, stream: Any = None) -> None:
        self._run, self._device, self._stream = run, device, stream
        self._left = plain if device.type == "cuda" and driver is not None else -1
        self._graph: _Graph | None = None

    def __call__(self, current: Any = None) -> None:
        """``current``: the current stream of the device, from a caller who has it at hand."""
        if self._left == 0:
            self._graph = _captured(self._run, self._device)
        self._left -= 1
        if self._graph is not None:
            self._graph.launch(self._stream or current)
        elif self._stream is None:
            self._run()
        else:
            import torch

            with torch.cuda.stream(self._stream):
                self._run()


def copy_pinned(target: Any, source: Any) -> None:
    """Copy pinned memory to a device on the current stream; in a capture only what was copied before without one.

    What is captured passes torch by. Torch notes the streams that read pinned memory, and records an event on each when the
    memory goes: on the stream that captures, this could fall into another capture.
    """
    import torch

    if driver is None or not target.is_cuda or not torch.cuda.is_current_stream_capturing():
        target.copy_(source, non_blocking=True)
        return
    stream = torch.cuda.current_stream(target.device).cuda_stream
    _check(driver.cuMemcpyHtoDAsync(target.data_ptr(), source.data_ptr(), source.nbytes, stream)[0], "a copy to a device")


class _Graph:
    """A graph that can be launched; given back with the last reference."""

    def __init__(self, executable: Any, device: Any) -> None:
        self._executable, self._device = executable, device

    def launch(self, stream: Any) -> None:
        """On a stream of torch; None: the current one."""
        if stream is None:
            import torch

            stream = torch.cuda.current_stream(self._device)
        _check(driver.cuGraphLaunch(self._executable, stream.cuda_stream)[0], "the launch of a graph")

    def __del__(self) -> None:
        driver.cuGraphExecDestroy(self._executable)


def _check(error: Any, what: str) -> None:
    if error:
        raise RuntimeError(f"CUDA: {error.name} at {what}")


def _captured(run: Callable[[], Any], device: Any) -> _Graph | None:
    """What ``run`` launches, as a graph; None where the driver makes none. Raises what ``run`` raises."""
    import torch

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED  # what other threads do is their own affair
    with _capturing, torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        stream = _stream(device).cuda_stream
        if int(driver.cuStreamBeginCapture(stream, relaxed)[0]):
            return None
        try:
            run()
        finally:
            error, graph = driver.cuStreamEndCapture(stream)
        if int(error):
            return None
        error, executable = driver.cuGraphInstantiate(graph, 0)
        driver.cuGraphDestroy(graph)
    return None if int(error) else _Graph(executable, device)


@cache
def _stream(device: Any) -> Any:
    import torch

    return torch.cuda.Stream(device, priority=_PRIORITY)
