"""Compiles the GPU kernels for sm_90 as the backends launch them, without a GPU, and tells what each keeps in local memory.

Run as a program in a process of its own (Triton's interpreter must be off): shapes as JSON on its input, one line of JSON
for each kernel on its output. A shape is (backend, preset, dtype, head_dim, centre): centre is null, "mean", "half" or
"interleaved"; backend "triton" or "cuda". By hand: ``python -m tests.launch_shapes`` compiles ``EVERY`` shape.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

ARCHITECTURE = 90
DTYPES = ("float16", "bfloat16", "float32")
CENTRES = (None, "mean", "half", "interleaved")
COLUMNS = (16, 32, 64, 128, 256, 512, 1024)  # the kernels' tiles are this wide
OTHER_ORDERS = (48, 80, 160, 288, 576)  # orders that are no power of two
CUDA_PRESETS = ("pq2", "pq2.5", "pq3", "pq3.5", "pq4", "pq5", "pq6", "paper")
Shape = tuple[str, str, str, int, str | None]
EVERY: list[Shape] = [
    *product(("triton",), ("pq3", "paper"), DTYPES, COLUMNS, (None, "mean", "half")),
    *product(("triton",), ("pq3",), ("float16",), OTHER_ORDERS, (None, "half")),
    *product(("triton",), ("pq2", "pq6"), ("bfloat16",), (64, 128, 256), (None, "interleaved")),
    *product(("cuda",), CUDA_PRESETS, DTYPES, (64, 128, 256), CENTRES),
    *product(("cuda",), ("quad2", "quad3", "quad3.5"), ("bfloat16",), (96, 128, 160, 192), (None,)),
    *product(("cuda",), ("quad3",), DTYPES, (64, 128, 256), ("mean", "half")),
]
LEADS = 20  # streams of a batch: as many steps to find a block's stream as a cache of that many layers needs


def local_bytes(cubin: bytes) -> dict[str, dict[str, int]]:
    """Registers, and bytes of stack (spilled registers are there) and of local memory, by a kernel's name."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", told)
    return {name: {"registers": int(r), "stack": int(s), "shared": int(m), "local": int(v)} for name, r, s, m, v in found}


class NoGPU:
    """What Triton asks its driver in order to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


def batches(shape: Shape) -> tuple[Any, Any]:
    """An EncodeBatch and a DecodeBatch of a shape that lie on the CPU; nobody runs their kernels."""
    import torch

    import pqcodec

    backend, preset, dtype, head_dim, centre = shape
    rope = pqcodec.Rope(theta=1e4, dim=head_dim, style=centre) if centre in ("half", "interleaved") else None
    center = "rope" if rope else centre
    x = torch.ones((69, head_dim), dtype=getattr(torch, dtype))
    options: dict[str, Any] = {"preset": preset, "center": center, "rope": rope, "exact_tokens": 1}
    stream = torch.frombuffer(bytearray(pqcodec.encode(x, backend="cpu", **options)), dtype=torch.uint8)
    made = pqcodec.EncodeBatch([x] * LEADS, backend=backend, **options)
    return made, pqcodec.DecodeBatch([stream] * LEADS, backend=backend)


def triton_kernels(shape: Shape) -> Iterator[tuple[str, dict[str, int]]]:
    """Every kernel that the Triton backend launches for a shape."""
    from triton.runtime.jit import JITFunction

    from pqcodec.kernels.on_triton.backend import Triton

    launched = {}

    def compile_only(self: Any, grid: Any) -> Callable[..., None]:
        def compiled(*args: Any, **options: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            launched[kernel.hash] = kernel

        return compiled

    Triton.check_device, JITFunction.__getitem__ = _anywhere, compile_only
    made, read = batches(shape)
    for batch in (made, read, *attention_batches(shape, made.streams[0])):
        batch.run()
    for kernel in launched.values():
        yield from local_bytes(kernel.asm["cubin"]).items()


def attention_batches(shape: Shape, stream: Any) -> Iterator[Any]:
    """An AttendBatch of four heads of queries to a stream as keys and as values, where kernels read it."""
    import torch

    import pqcodec

    backend, _, dtype, head_dim, _ = shape
    query = torch.ones((1, 4, 1, head_dim), dtype=getattr(torch, dtype))
    if head_dim <= 256:
        yield pqcodec.AttendBatch(query, [stream], [stream], check=False, backend=backend)


def cuda_kernels(shape: Shape) -> Iterator[tuple[str, dict[str, int]]]:
    """Every kernel that the CUDA backend launches for a shape."""
    from pqcodec.kernels.on_cuda import backend
    from pqcodec.kernels.on_cuda.token_sums import sums_kind

    asked: list[tuple[str, Any]] = []
    backend.Cuda.check_device = _anywhere
    backend.Cuda._kernel = staticmethod(lambda verb, group: asked.append((verb, group)))
    batches(shape)
    for verb, group in asked:
        kind = backend.header_of_kind(group.header)
        layouts = (
            [backend.kernel_layout(verb, kind, few, effort=group.effort) for few in (False, True)]
            if backend.takes(verb, group)
            else []
        )
        for layout in {found.table_bits: found for found in layouts if found}.values():
            code = backend.machine_code(verb, kind, layout, f"sm_{ARCHITECTURE}", group.effort)
            for name, needs in local_bytes(code).items():
                yield f"{name}, look-ups of {layout.table_bits} bits", needs
        sums = sums_kind(group) if verb == "encode" and layouts else None
        if sums:
            yield from local_bytes(sums.machine_code(f"sm_{ARCHITECTURE}")).items()


def _anywhere(self: Any, device: Any) -> None:
    """Tensors may lie on the CPU: nothing is run."""


def kernels(shapes: list[Shape]) -> Iterator[tuple[Shape, str, dict[str, int]]]:
    """(shape, kernel, what it needs) of every kernel."""
    if "TRITON_INTERPRET" in os.environ:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled")
    import triton

    triton.runtime.driver.set_active(NoGPU())
    for shape in shapes:
        for name, needs in (cuda_kernels if shape[0] == "cuda" else triton_kernels)(shape):
            yield shape, name, needs


if __name__ == "__main__":
    given = [tuple(shape) for shape in json.load(sys.stdin)] if not sys.stdin.isatty() else EVERY
    for line in kernels(given):
        print(json.dumps(line), flush=True)
