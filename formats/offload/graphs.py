"""Law: work that a device repeats on the same memory is prepared once, and becomes a CUDA graph after its first runs.

Launching a graph costs the host a tenth of launching its kernels one by one. Graphs are captured on a stream of their own, on
which nothing else is launched. The driver captures them, not torch: torch's capture marks its random generators, so that other
threads cannot sample meanwhile, and leaves them marked if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from typing import Any

from pqcodec.batch import DecodeBatch

try:
    from cuda.bindings import driver
except ImportError:  # as on GPUs of other makers: nothing is captured, launches stay plain
    driver = None  # type: ignore[assignment]

Pair = tuple[Any, Any]  # keys and values of one layer, tensors [sequences, heads, tokens, head_dim]
Parts = tuple[Pair, Pair, Pair]  # all tokens, of which others are decoded; the exact tokens before those; and behind them

_PLAIN_RUNS = 2  # before the capture, unless a caller says otherwise
_MOST_BATCHES = 64  # kept for one memory: each chunk and each order of beams makes another layout of streams
_PRIORITY = -3  # torch takes streams from one ring for each priority: callers' threads, at others, never get this stream
_capturing = Lock()


# -- what is launched ----------------------------------------------------------------------------------------------
class Launch:
    """A function that launches the same kernels on the same memory each time: called at first, then replayed as a graph.

    ``run``: the function. ``plain``: how often it is called before it is captured; only the first call may allocate. It is
    called each time where nothing can be captured (a CPU, no driver bindings, no memory for a graph). ``stream``: the stream of
    all launches (None: the current one).
    """

    def __init__(self, run: Callable[[], Any], device: Any, plain: int = _PLAIN_RUNS, stream: Any = None) -> None:
        self._run, self._device, self._stream = run, device, stream
        self._left = plain if device.type == "cuda" and driver is not None else -1
        self._graph: _Graph | None = None

    def __call__(self, current: Any = None) -> None:
        """Launch once. ``current``: the device's current stream, if the caller has it at hand; asking torch takes time."""
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
    """Copy ``source`` in pinned memory to ``target`` on a device, on the current stream.

    A copy that is captured must have been made once before without a capture, and is captured without torch. Torch notes each
    stream that reads pinned memory, and records an event on it when the memory is freed; on the stream that captures, the event
    could fall into a later capture.
    """
    import torch

    if driver is None or not target.is_cuda or not torch.cuda.is_current_stream_capturing():
        target.copy_(source, non_blocking=True)
        return
    copy_on(torch.cuda.current_stream(target.device), target, source)


def copy_on(stream: Any, target: Any, source: Any) -> None:
    """Queue a copy between host memory and a device, or on a device, on a stream of torch (None: the device is a CPU).

    The caller keeps both until the copy is over; they have the same size. It costs a quarter of what torch takes to enter a
    stream, copy and leave it. The current device is the stream's.
    """
    assert target.nbytes == source.nbytes, (target.nbytes, source.nbytes)  # the driver would write beyond the target
    if stream is None:
        target.copy_(source)
        return
    if driver is None:
        import torch

        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return
    places = target.data_ptr(), source.data_ptr(), source.nbytes, stream.cuda_stream
    if not target.is_cuda:
        _check(driver.cuMemcpyDtoHAsync(*places)[0], "a copy from a device")
    elif source.is_cuda:
        _check(driver.cuMemcpyDtoDAsync(*places)[0], "a copy on a device")
    else:
        _check(driver.cuMemcpyHtoDAsync(*places)[0], "a copy to a device")


class _Graph:
    """A CUDA graph that can be launched; it is destroyed with the last reference to it."""

    def __init__(self, executable: Any, device: Any) -> None:
        self._executable, self._device = executable, device

    def launch(self, stream: Any) -> None:
        """Launch the graph on a stream of torch (None: the current one)."""
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
    """A graph of all that ``run`` launches; None where the driver makes none. Raises what ``run`` raises."""
    import torch

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED  # other threads may call CUDA as they like
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


# -- what is prepared ----------------------------------------------------------------------------------------------
class PreparedLaunches:
    """The launches that decode streams out of one memory: the last one of each layer, and batches that layers share.

    They hold addresses, of the streams and of the tensors that they fill: ``clear`` them before such memory moves.
    """

    def __init__(self) -> None:
        self._launches: dict[int, tuple[Launch, Parts]] = {}
        self._batches: dict[Any, Sequence[DecodeBatch]] = {}

    def launch(self, layer: int, parts: Parts) -> Launch | None:
        """A layer's launch, if it was kept for these very pairs of tensors, compared by identity."""
        found = self._launches.get(layer)
        if found is None:
            return None
        launch, (whole, before, behind) = found
        return launch if whole is parts[0] and before is parts[1] and behind is parts[2] else None

    def keep_launch(self, layer: int, parts: Parts, launch: Launch) -> None:
        """Keep a layer's launch, in place of the one before."""
        self._launches[layer] = launch, parts

    def batches(self, layout: Any) -> Sequence[DecodeBatch] | None:
        """The batches for streams of a layout, if some layer of that layout has kept them."""
        return self._batches.get(layout)

    def keep_batches(self, layout: Any, batches: Sequence[DecodeBatch]) -> None:
        """Keep batches for all layers of a layout."""
        if len(self._batches) >= _MOST_BATCHES:
            self._batches.clear()
        self._batches[layout] = batches

    def forget(self, layer: int) -> None:
        """Let go of a layer's launch, because its streams have changed."""
        self._launches.pop(layer, None)

    def clear(self) -> None:
        """Let go of everything."""
        self._launches.clear()
        self._batches.clear()
