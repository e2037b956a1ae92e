"""Law: whether a model's tensors have changed: digests of all bytes, and cheap evidence that every call compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity.digests import new_hash
from pqcodec.words import Sums, sums_anywhere, words_at

SAMPLES = 16  # elements of a tensor whose words each call reads
COLUMNS = 1021  # sums of a tensor; a prime, so that exchanging rows changes the sums
_WORDS, _ROW = 1 << 18, 1024  # int64 words that are summed at once; words of a row, and so weights

Look = Callable[[], tuple[np.ndarray, dict[int, bytes]]]  # waits for ``Evidence.begin``: sampled words, sums by tensor


def marks(tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Storage address, version counter, shape and strides of each tensor."""
    return [(t.data_ptr(), None if t.is_inference() else t._version, t.shape, t.stride()) for t in tensors]


def storages(tensors: Sequence[Any]) -> list[Any]:
    """References that keep the tensors' memory alive while it is read, should another thread replace ``tensor.data``."""
    return [tensor.untyped_storage() for tensor in tensors]


class Evidence:
    """A part of the tensors' bytes, which each call compares with its state at construction.

    Sampled (``full`` False): for tensors in CPU memory, the words of 16 elements spread over each. An edit that bypasses the
    version counters (``w.data += d``) is detected if it changes one of them: almost always for a whole tensor, hardly ever for
    a few elements. On other devices, or with ``full``: all bytes, as sums modulo 2^64 with an odd factor for each word, so that
    an edit of a single element is always detected.
    """

    def __init__(self, tensors: Sequence[Any], full: bool) -> None:
        self.full = full
        self._summed = [full or t.device.type != "cpu" or not t.data_ptr() for t in tensors]
        addresses = [
            np.empty(0, np.int64) if summed else (t.data_ptr() + _offsets(t.shape, t.stride(), t.element_size())) & ~7
            for t, summed in zip(tensors, self._summed, strict=True)
        ]
        self._addresses = np.concatenate(addresses) if addresses else np.empty(0, np.int64)
        self._ends = np.cumsum([len(each) for each in addresses])
        by_device: dict[Any, list[int]] = {}  # of tensors that one kernel sums
        self._others: list[int] = []
        for index, (tensor, summed) in enumerate(zip(tensors, self._summed, strict=True)):
            if summed and tensor.nbytes and sums_anywhere(tensor):
                by_device.setdefault(tensor.device, []).append(index)
            elif summed:
                self._others.append(index)
        self._together = [(indices, Sums([tensors[index] for index in indices])) for indices in by_device.values()]
        self._words, self._sums = self.begin(tensors)()

    def begin(self, tensors: Sequence[Any]) -> Look:
        """Start to read the tensors; the result waits for GPUs and returns what was read.

        The tensors must have their old addresses and keep them until then (see ``storages``).
        """
        started = [(indices, sums.chunks, sums.begin()) for indices, sums in self._together]
        others = _sums({index: tensors[index] for index in self._others})
        words = np.empty(0, np.uint64)
        if len(self._addresses):
            words = words_at(self._addresses)

        def look() -> tuple[np.ndarray, dict[int, bytes]]:
            found = dict(others)
            for indices, chunks, sums in started:
                parts = np.split(sums(), np.cumsum(chunks)[:-1])
                found |= {index: part.tobytes() for index, part in zip(indices, parts, strict=True)}
            return words, found

        return look

    def holds(self, look: Look) -> bool:
        """Whether what ``begin`` read is unchanged."""
        words, sums = look()
        return bool(np.array_equal(words, self._words)) and sums == self._sums

    def of(self, index: int) -> bytes:
        """The evidence of one tensor."""
        end = self._ends[index]
        start = self._ends[index - 1] if index else 0
        return self._sums[index] if self._summed[index] else self._words[start:end].tobytes()


@lru_cache(maxsize=4096)
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> np.ndarray:
    """The offsets in bytes of a tensor's sampled elements."""
    count = int(np.prod(shape, dtype=np.int64))
    if count <= SAMPLES:
        at = np.arange(count)
    else:  # a random element of each of 16 equal parts, so that they are not all in one column
        parts = np.linspace(0, count, SAMPLES + 1).astype(np.int64)
        draws = np.random.default_rng(count).random(SAMPLES)
        at = parts[:-1] + (draws * np.diff(parts)).astype(np.int64)
    indices = np.unravel_index(at, shape) if shape else (at,)
    steps = strides if shape else (1,)
    return sum((index * step for index, step in zip(indices, steps, strict=True)), np.zeros(len(at), np.int64)) * size


def _sums(tensors: dict[int, Any]) -> dict[int, bytes]:
    """By index: the sum of a tensor's words modulo 2^64, each times the odd number of its column, and the bytes behind them."""
    import torch

    found: dict[int, bytes] = {}
    by_device: dict[Any, list[int]] = {}
    for index, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(index)
    for device, indices in by_device.items():
        sums = torch.zeros((len(indices), COLUMNS), dtype=torch.int64, device=device)
        rests = []  # of each tensor, the bytes behind its last whole row
        for row, index in zip(sums, indices, strict=True):
            raw = _bytes_of(tensors[index])
            whole = raw.numel() // (8 * COLUMNS) * COLUMNS * 8
            if whole:
                torch.sum(raw[:whole].view(torch.int64).view(-1, COLUMNS), 0, out=row)
            rests.append(raw[whole:])
        totals = (sums * _column_weights(device)).sum(1).tolist()
        left = torch.cat(rests).cpu().split([len(rest) for rest in rests])
        for index, total, rest in zip(indices, totals, left, strict=True):
            found[index] = int(total).to_bytes(8, "little", signed=True) + rest.numpy().tobytes()
    return found


@lru_cache(maxsize=16)
def _column_weights(device: Any) -> Any:
    return _odd(COLUMNS, 0, device)


def _bytes_of(tensor: Any) -> Any:
    """A tensor's bytes, uint8 [n], at an address that is a multiple of 8."""
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return raw.clone() if raw.data_ptr() % 8 or raw.storage_offset() % 8 else raw


def refuse_unloaded(named: Sequence[tuple[str, Any]]) -> None:
    """Raises InvalidArgument for a tensor on the meta device."""
    for name, tensor in named:
        if tensor.device.type == "meta":
            raise InvalidArgument(
                f"the weight {name!r} is not loaded (device meta), so the model cannot be told from others: load it, or pass "
                "an Identity of your own, Identity(config, config_digest=..., weights=...)"
            )


def tensor_digest(name: str, tensor: Any) -> bytes:
    """The digest of a tensor's name, dtype, shape and all bytes: 32 bytes.

    The bytes enter as a sum modulo 2^64 of little-endian int64 words in rows of 1,024, each times the odd numbers of its column
    and its row. This is fast on any device and distinguishes models, but is no defence against deliberate collisions.
    """
    import torch

    hashed = new_hash()
    hashed.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    raw = _bytes_of(tensor)
    words, rest = raw[: raw.numel() // 8 * 8], raw[raw.numel() // 8 * 8 :]
    hashed.update(bytes(rest.tolist()))
    if words.numel():
        total = _weighted_sum(words.view(torch.int64))
        hashed.update(int(total).to_bytes(8, "little", signed=True))
    return bytes(hashed.digest())


def _weighted_sum(words: Any) -> Any:
    import torch

    columns = _odd(_ROW, 0, words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _WORDS):
        piece = words[start : start + _WORDS]
        whole = piece[: piece.numel() // _ROW * _ROW].reshape(-1, _ROW)
        last = piece[whole.numel() :]
        rows = _odd(len(whole) + 1, start // _ROW, words.device)
        total += ((whole * columns).sum(1) * rows[:-1]).sum() + (last * columns[: last.numel()]).sum() * rows[-1]
    return total


def _odd(count: int, first: int, device: Any) -> Any:
    """int64 [count]: odd pseudo-random numbers (SplitMix64), numbers ``first`` on of the sequence."""
    import torch

    x = (torch.arange(first, first + count, dtype=torch.int64, device=device) + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1
