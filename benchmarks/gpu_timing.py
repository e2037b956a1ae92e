"""Law: how long work on a CUDA GPU takes: in turns with a copy that moves as many bytes, or one of many runs in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

DEVICE = "cuda"
DROPPED = 2  # first rounds, or runs, that do not count
SLEEP_CYCLES = 100_000_000  # of the device, some 50 ms: as long as Python takes to queue all rounds
REPLAYS = 200


def timed(works: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each work in each round. The device sleeps while all rounds are queued, so that it never waits for Python.

    Each work runs once before: what it compiles is compiled then.
    """
    for work in works:
        work()
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)] for _ in range(DROPPED + rounds)]
    torch.cuda._sleep(SLEEP_CYCLES)
    for row in marks:
        row[0].record()
        for work, mark in zip(works, row[1:], strict=True):
            work()
            mark.record()
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) / 1e3 for start, end in pairwise(row)] for row in marks[DROPPED:]]


def turns(x_bytes: int, stream_bytes: int, encode: Callable[[], Any], decode: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """GB/s of input, and the median ratio to a copy (the quicker of a turn's two) that moves as many bytes: read + written.

    Beside them the ratios of kernels that only move the same bytes, read as read and written as written.
    """
    from benchmarks.moved_bytes import moving  # which needs Triton

    moved = x_bytes + stream_bytes
    source, target = (torch.zeros(moved // 2, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    copy = partial(target.copy_, source)
    only_moves = [moving(*sizes, DEVICE) for sizes in ((x_bytes, stream_bytes), (stream_bytes, x_bytes))]
    found = [(min(c, d), e, f, *rest) for c, e, d, f, *rest in timed((copy, encode, copy, decode, *only_moves), rounds)]
    copied, encoded, decoded, *_ = (median(column) for column in zip(*found, strict=True))
    return {
        "input_bytes": x_bytes,
        "stream_bytes": stream_bytes,
        "moved_bytes": moved,
        "copy_tb_s": moved / copied / 1e12,
        "encode_gb_s": x_bytes / encoded / 1e9,
        "decode_gb_s": x_bytes / decoded / 1e9,
        "encode_ratio": median(c / e for c, e, *_ in found),
        "decode_ratio": median(c / d for c, _, d, *_ in found),
        "moving_as_encode_ratio": median(c / e for c, *_, e, _ in found),
        "moving_as_decode_ratio": median(c / d for c, *_, d in found),
    }


def microseconds(work: Callable[[], Any]) -> float:
    """Microseconds of one of many runs in a row."""
    for _ in range(DROPPED):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(REPLAYS):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / REPLAYS
