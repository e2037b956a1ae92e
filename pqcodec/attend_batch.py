"""Law: attention to encoded keys and values on a GPU: prepared once, then run without a wait or an allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pqcodec.backends import names
from pqcodec.batch import DecodeBatch
from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.placed import lying, one_device
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.stream.report import Damage, damage_error

_ELSEWHERE = (
    "decode the streams and attend to that, or move everything to the CPU, where pqcodec.attention attends to any stream"
)


class AttendBatch:
    """Attention of queries [sequences, q_heads, queries, head_dim] to encoded keys and values, on an NVIDIA GPU.

    ``keys``, ``values``: one stream a sequence, uint8 tensors on the GPU, of tensors [..., kv_heads, tokens, head_dim] in
    quads, alike but for numbers and tokens; head_dim 64, 128 or 256; q_heads is a multiple of kv_heads, and neighbouring heads
    of queries share one of keys: at most 16, times the queries. Exact first tokens and means that streams hold count as
    ``decode`` has them. ``recent``: exact keys and values [sequences, kv_heads, n, head_dim] behind the streams, of their
    dtype, which are read where they lie at every run.

    The queries stand at the end of all tokens, and each sees the tokens up to its own; ``window``: of these the last so many
    (one query, and at least the recent tokens). ``scale``: of scores, head_dim^-0.5 if None; ``softcap``: their bound.
    ``check``: whether the blocks' checksums are compared, once, when the batch is made.

    ``run`` fills ``out``, and launches one kernel on the current stream: it can be captured in a CUDA graph. The result differs
    from attention to decoded numbers by a thousandth of its largest number at the most, unless keys are many times smaller than
    their mean. Raises InvalidArgument, BackendUnavailable and CorruptStream.
    """

    def __init__(
        self,
        query: Any,
        keys: Sequence[Any],
        values: Sequence[Any],
        *,
        recent: tuple[Any, Any] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        check: bool = True,
        backend: str = "auto",
    ) -> None:
        import torch

        device = one_device([query, *keys, *values, *(recent or ())])
        if names(backend, device.type)[0] != "cuda":
            raise BackendUnavailable(f"attention to codes on {str(device)!r} needs backend 'cuda'; {_ELSEWHERE}")
        from pqcodec.kernels.on_cuda.attention import CudaAttention, why_not

        if not keys or len(keys) != len(values) or query.ndim != 4 or len(query) != len(keys):
            raise InvalidArgument(
                f"queries {tuple(query.shape)}, {len(keys)} streams of keys and {len(values)} of values; "
                f"[sequences, q_heads, queries, head_dim] and one stream of each a sequence are expected"
            )
        damage: list[Damage] = []
        placed = [[lying(stream, None, None, damage) for stream in streams] for streams in (keys, values)]
        if damage:
            raise damage_error(damage)
        if check:
            checked = DecodeBatch.of_placed([*placed[0], *placed[1]], device, backend, write=False)
            checked.run()
            checked.check()
        headers = [[each.header for each in side] for side in placed]
        for name, side in zip(("keys", "values"), headers, strict=True):
            if len({(h.kind, h.leading) for h in side}) > 1:
                raise InvalidArgument(f"streams of {name} differ in heads or options; make a batch for each kind")
        k = headers[0][0]
        rows = _rows_of(query, k)
        for reason in filter(None, (why_not(*pair, rows) for pair in zip(headers[0], headers[1], strict=True))):
            raise BackendUnavailable(f"attention to codes on a GPU: {reason}; {_ELSEWHERE}")
        dtype = next((code for code, name in DTYPE_NAMES.items() if query.dtype == getattr(torch, name)), None)
        if dtype is None:
            raise InvalidArgument(f"queries are {query.dtype}; float16, bfloat16 or float32 is expected")
        _check_recent(recent, query, k)
        least = [_least(window, h, recent, query.shape[2]) for h in headers[0]]
        scale = k.head_dim**-0.5 if scale is None else float(scale)
        cap = 0.0 if softcap is None else float(softcap)
        if not math.isfinite(scale) or not math.isfinite(cap) or (softcap is not None and cap <= 0):
            raise InvalidArgument(
                f"scale {scale}, softcap {softcap}: a finite number, and a positive one or None, are expected"
            )
        self._query = query
        self.out = torch.empty(query.shape, dtype=query.dtype, device=device)
        with torch.cuda.device(device):
            self._launch = CudaAttention(tuple(query.shape), dtype, placed[0], placed[1], recent, scale, cap, least)

    def run(self, query: Any = None) -> Any:
        """Attend with the queries of the tensor that the batch was made of, or of another one like it; returns ``out``."""
        query = self._query if query is None else query
        if query.shape != self.out.shape or query.dtype != self.out.dtype or query.device != self.out.device:
            raise InvalidArgument(
                f"queries {tuple(query.shape)}, {query.dtype} on {query.device}; "
                f"the batch was made of {tuple(self.out.shape)}, {self.out.dtype} on {self.out.device}"
            )
        return self._launch.run(query.contiguous(), self.out)


def _rows_of(query: Any, k: Header) -> int:
    """Query heads of a head of keys, times queries."""
    heads, queries, head_dim = query.shape[1:]
    if not k.leading or heads % k.leading or head_dim != k.head_dim or not queries or not k.tokens or not heads:
        raise InvalidArgument(
            f"queries {tuple(query.shape)} do not go with keys {k.shape}: "
            f"a multiple of {k.leading} heads of {k.head_dim} numbers is expected"
        )
    return int(heads // k.leading * queries)


def _check_recent(recent: tuple[Any, Any] | None, query: Any, k: Header) -> None:
    if recent is None:
        return
    expected = (len(query), k.leading, recent[0].shape[-2] if recent[0].ndim == 4 else 0, k.head_dim)
    for name, x in zip(("keys", "values"), recent, strict=True):
        if tuple(x.shape) != expected or str(x.dtype) != f"torch.{DTYPE_NAMES[k.dtype]}":
            raise InvalidArgument(f"recent {name} {tuple(x.shape)}, {x.dtype}: {expected}, {DTYPE_NAMES[k.dtype]} is expected")
        if x.stride(-1) != 1 or any(stride * x.element_size() % 4 for stride in x.stride()[:-1]) or x.data_ptr() % 4:
            raise InvalidArgument(f"recent {name} have strides {x.stride()}; a contiguous last dimension is expected")


def _least(window: int | None, k: Header, recent: tuple[Any, Any] | None, queries: int) -> int:
    """The first token of the streams that counts; raises InvalidArgument, and BackendUnavailable for windows it cannot do."""
    new = recent[0].shape[-2] if recent else 0
    if queries > 1 and new < queries:
        raise BackendUnavailable(
            f"{queries} queries and {new} recent tokens: the queries' own have to be among these; {_ELSEWHERE}"
        )
    if window is None or window >= k.tokens + new:
        return 0
    least = k.tokens + new - window
    if window < 1:
        raise InvalidArgument(f"window {window}: a positive number of tokens is expected")
    if queries > 1 or window < new or least < k.first_tokens:
        raise BackendUnavailable(
            f"a window of {window} tokens, {queries} queries, {new} recent and {k.first_tokens} exact tokens: a window "
            f"is for one query, and begins behind the exact tokens and before the recent ones; {_ELSEWHERE}"
        )
    return int(least)
