"""Law: many tensors of one device, coded on it: prepared once, then run without a wait or an allocation.

A batch reads shapes and headers and lays out its tables when it is made; ``run`` only launches kernels on the current
stream (one for each kind of tensor, and a few small ones where means or exact tokens are stored), so it can be captured
in a CUDA graph and replayed on new numbers in the same tensors; ``check`` waits, and raises for what the kernels found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from pqcodec import constants as c
from pqcodec.backends import device_backend
from pqcodec.codings.declared import Codebook
from pqcodec.codings.levels import levels_of
from pqcodec.codings.presets import DEFAULT_PRESET
from pqcodec.codings.registry import CODINGS
from pqcodec.errors import BackendUnavailable, InvalidArgument, NonFiniteInput
from pqcodec.kernels.spans import Group, Span
from pqcodec.options import EncodeOptions, each, unfitted
from pqcodec.placed import Placed, aligned, current, lying, one_device
from pqcodec.stages.centre import Halves, Rope, check_means, offset_entries
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.stream.index import checked_range, result_shape
from pqcodec.stream.report import Damage, damage_error
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import device_of
from pqcodec.tensors.rows import DeviceRows

_ADVICE = "mend the tensor, or pass it to encode() with nonfinite='exact' to keep such vectors as they are"


def _groups(spans: Iterable[Span], device: Any) -> list[Group]:
    """Spans by kind, in the order in which the kinds appear."""
    kinds: dict[Any, list[Span]] = {}
    for span in spans:
        kinds.setdefault(span.header.kind, []).append(span)
    return [Group(members, device) for members in kinds.values()]


class _Batch:
    """What both directions share."""

    groups: list[Group]  # what one launch codes each

    def make_brief(self) -> None:
        """Let kernels end soon, bit by bit, so that work of a higher priority gets its turn between (see ``Group``)."""
        for group in self.groups:
            group.brief = True


# -- encode --------------------------------------------------------------------------------------------------------
class EncodeBatch(_Batch):
    """Streams of many tensors [..., tokens, head_dim] of one GPU, encoded there.

    ``streams``: uint8 tensors on the device, one a tensor, complete after ``run``. ``preset`` and ``rope`` are one for all
    tensors or one each; the other options are those of ``encode``. Vectors with NaN or Inf are coded as zeros and make
    ``check`` raise. The paper's preset looks at the numbers once, when the batch is made, to bring its radii into float16's
    range, and so do presets of levels, which are fitted then. ``means``: what is subtracted from tensors that are centred,
    instead of their own means (``centre.stored_means``).
    """

    def __init__(
        self,
        tensors: Sequence[Any],
        *,
        preset: str | Sequence[str] = DEFAULT_PRESET,
        seed: int = 0,
        center: str | None = None,
        rope: Rope | Sequence[Rope | None] | None = None,
        exact_tokens: int = 0,
        chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
        effort: str = "fast",
        means: Halves | None = None,
        backend: str = "auto",
    ) -> None:
        rows = [arrays.device_rows(x) for x in tensors]
        presets = each("preset", preset, len(rows), str)
        ropes = each("rope", rope, len(rows), (Rope, type(None)))
        options = [
            EncodeOptions(name, seed, center, turn, exact_tokens, chunk_tokens, effort=effort)
            for name, turn in zip(presets, ropes, strict=True)
        ]
        headers = [one.header(r.shape, r.dtype) for one, r in zip(options, rows, strict=True)]
        self._prepare(rows, headers, backend, effort, means)

    @classmethod
    def of_rows(
        cls, rows: list[DeviceRows], headers: list[Header], backend: str, effort: str = "fast", means: Halves | None = None
    ) -> Self:
        """A batch of tensors whose headers are there."""
        batch = cls.__new__(cls)
        batch._prepare(rows, headers, backend, effort, means)
        return batch

    def _prepare(
        self, rows: list[DeviceRows], headers: list[Header], backend: str, effort: str = "fast", means: Halves | None = None
    ) -> None:
        import torch

        self._device = device = one_device([r.tensor for r in rows])
        self._kernel = device_backend(backend, device, *headers)
        if any(h.affine and h.affine.outliers for h in headers):
            raise BackendUnavailable(
                f"backend {self._kernel.name!r} decodes numbers that are kept apart (presets of kvquant), and does not find "
                "them: encode x.cpu() by backend 'cpu'"
            )
        self._rows = rows
        headers = [_with_levels(_with_exponent(h, r.tensor), r) for r, h in zip(rows, headers, strict=True)]
        if means is not None:
            for h in headers:
                check_means(means, h)
            headers = [replace(h, offset_exponent=means[1]) for h in headers]
        places = np.cumsum([0, *(aligned(h.stream_bytes) for h in headers)])
        arena = torch.empty(int(places[-1]), dtype=torch.uint8, device=device)
        self.streams = [arena[int(p) : int(p) + h.stream_bytes] for p, h in zip(places, headers, strict=False)]
        self.headers = headers
        for stream, header in zip(self.streams, headers, strict=True):
            stream[: header.header_bytes] = torch.frombuffer(bytearray(header.to_bytes()), dtype=torch.uint8).to(device)
        self._centred: list[tuple[Any, Any]] = []  # beginnings of streams, and what they are if means are given
        if means is not None:
            for stream, header in zip(self.streams, headers, strict=True):
                given = torch.frombuffer(bytearray(header.to_bytes() + offset_entries(means[0])), dtype=torch.uint8)
                self._centred.append((stream[: given.numel()], given.to(device)))
        self.groups = _groups(
            (
                Span(
                    h,
                    stream.data_ptr(),
                    stream.data_ptr() + h.payload_start,
                    (0, h.chunks),
                    (0, h.leading),
                    (0, h.tokens),
                    r.starts,
                    r.stride,
                )
                for h, stream, r in zip(headers, self.streams, rows, strict=True)
            ),
            device,
        )
        for group in self.groups:
            group.effort = effort
            self._kernel.prepare("encode", group)

    def run(self) -> list[Any]:
        """Encode what the tensors hold now; returns ``streams``. Waits for nothing."""
        with current(self._device):
            for group in self.groups:
                self._kernel.write_sides(group)
            for beginning, given in self._centred:
                beginning.copy_(given)
            for group in self.groups:
                self._kernel.encode(group)
        return self.streams

    def check(self) -> None:
        """Wait; raises NonFiniteInput, naming the place, if a tensor held NaN or Inf when it was encoded."""
        for group in self.groups:
            for span, bad in zip(group.spans, group.nonfinite(), strict=True):
                if bad:
                    index = next(i for i, h in enumerate(self.headers) if h is span.header)
                    raise NonFiniteInput(_name_place(self._rows[index].tensor, span.header, bad), _ADVICE)


def _with_exponent(h: Header, x: Any) -> Header:
    """A header with the radius_exponent that the numbers of ``x`` want, where its coding asks for one."""
    import torch

    wanted = CODINGS[h.coding].radius_exponent
    if wanted is None:
        return h
    coded = torch.atleast_2d(x)[..., h.first_tokens :, :]
    largest = float(torch.where(torch.isfinite(coded), coded, 0).abs().max()) if coded.numel() else 0.0
    return replace(h, radius_exponent=wanted(largest, h.order))


def _with_levels(h: Header, rows: DeviceRows) -> Header:
    """A header with levels that are fitted to some runs of tokens, which are copied from the device, where none are given.

    Raises BackendUnavailable where a mean is subtracted, which only the device will know.
    """
    if h.codebook is None or h.codebook != unfitted(1 << h.row_bits // h.order):
        return h
    if h.offsets:
        raise BackendUnavailable(
            "levels are not fitted on a GPU to numbers whose mean is subtracted: pass levels=, leave out center=, "
            "or encode x.cpu() by backend 'cpu'"
        )
    return replace(h, codebook=Codebook(levels_of(rows, h, None)))


def _name_place(x: Any, h: Header, count: int) -> str:
    import torch

    coded = x[..., h.first_tokens :, :] if x.ndim > 1 else x
    bad = torch.nonzero(~torch.isfinite(coded))
    if not len(bad):
        return f"{count} vectors held NaN or Inf when they were encoded; the tensor has changed since"
    place = bad[0].tolist()
    value = coded[tuple(place)].item()
    if x.ndim > 1:
        place[-2] += h.first_tokens
    return f"element {place} of the tensor is {value} ({count} vectors hold NaN or Inf)"


# -- decode --------------------------------------------------------------------------------------------------------
class DecodeBatch(_Batch):
    """Tensors out of many streams that lie on one GPU, decoded there.

    ``streams``: uint8 tensors, each a whole stream, as ``EncodeBatch`` makes them. ``outs``: tensors to fill, of any strides
    whose last dimension is contiguous, such as parts of a larger cache (None: new ones). ``tokens`` and ``leading`` are those
    of ``decode``, one for all. Headers and exact vectors are read when the batch is made; numbers are, when it runs.
    """

    def __init__(
        self,
        streams: Sequence[Any],
        *,
        outs: Sequence[Any] | None = None,
        tokens: tuple[int, int] | None = None,
        leading: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        device = one_device(streams)
        device_backend(backend, device)  # before streams are read
        damage: list[Damage] = []
        placed = [lying(stream, tokens, leading, damage) for stream in streams]
        if damage:
            raise damage_error(damage)
        self._prepare(placed, device, backend, outs, tokens, leading, True)

    @classmethod
    def of_placed(
        cls,
        placed: list[Placed],
        device: Any,
        backend: str,
        outs: Sequence[Any] | None = None,
        tokens: tuple[int, int] | None = None,
        leading: tuple[int, int] | None = None,
        write: bool = True,
    ) -> Self:
        """A batch of streams whose places are known; with ``write`` False it only checks them."""
        batch = cls.__new__(cls)
        batch._prepare(placed, device, backend, outs, tokens, leading, write)
        return batch

    def _prepare(
        self,
        placed: list[Placed],
        device: Any,
        backend: str,
        outs: Sequence[Any] | None,
        tokens: tuple[int, int] | None,
        leading: tuple[int, int] | None,
        write: bool,
    ) -> None:
        import torch

        self._kernel = kernel = device_backend(backend, device, *(p.header for p in placed))
        self._placed, self._device = placed, device
        shapes = [result_shape(p.header, tokens, leading) for p in placed]
        if outs is None and write:
            dtypes = [getattr(torch, DTYPE_NAMES[p.header.dtype]) for p in placed]
            outs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
        if outs is not None and len(outs) != len(placed):
            raise InvalidArgument(f"{len(outs)} outs are given for {len(placed)} streams")
        self.outs = list(outs or ())
        spans = []
        self._patches: list[tuple[Any, tuple[Any, ...], Any]] = []
        for i, p in enumerate(placed):
            wanted = checked_range("tokens", tokens, p.header.tokens) if write else (0, 0)
            leads = checked_range("leading", leading, p.header.leading)
            starts, stride = np.zeros(leads[1] - leads[0], np.int64), 0
            if write:
                out = self.outs[i]
                if device_of(out) != str(device):
                    raise InvalidArgument(f"out {i} lies on {device_of(out)!r}, its stream on {str(device)!r}")
                if not arrays.fits(out, shapes[i], p.header.dtype):
                    raise InvalidArgument(f"out {i} has strides {out.stride()}; its last dimension must be contiguous")
                rows = arrays.device_rows(out)
                starts, stride = rows.starts, rows.stride
                self._patch(out, p, wanted, leads)
            spans += [
                Span(
                    p.header,
                    p.stream,
                    run.payload,
                    run.chunks,
                    run.leads,
                    wanted,
                    starts[run.leads[0] - leads[0] : run.leads[1] - leads[0]],
                    stride,
                    sides=number == 0,
                )
                for number, run in enumerate(p.runs)
            ]
        self.groups = _groups(spans, device) if spans else []
        for group in self.groups:
            kernel.prepare("decode", group)

    def _patch(self, out: Any, p: Placed, tokens: tuple[int, int], leads: tuple[int, int]) -> None:
        """Note the exact vectors that ``run`` copies over what their rows decode to."""
        import torch

        if p.exceptions is None:
            return
        lead, token = np.divmod(p.exceptions[0], max(p.header.coded_tokens, 1))
        token = token + p.header.first_tokens
        kept = (token >= tokens[0]) & (token < tokens[1]) & (lead >= leads[0]) & (lead < leads[1])
        if not kept.any():
            return
        vectors = torch.from_numpy(p.exceptions[1][kept]).view(out.dtype).to(out.device)
        index = [token[kept] - tokens[0]] if out.ndim > 1 else []
        if out.ndim > 2:
            index = [*np.unravel_index(lead[kept] - leads[0], tuple(out.shape[:-2])), *index]
        places = tuple(torch.from_numpy(np.ascontiguousarray(i)).to(out.device) for i in index)
        self._patches.append((out, places or (...,), vectors if places else vectors[0]))

    def run(self) -> list[Any]:
        """Decode what the streams hold now; returns ``outs``. Waits for nothing."""
        with current(self._device):
            for group in self.groups:
                self._kernel.read_sides(group)
                self._kernel.decode(group)
            for out, places, vectors in self._patches:
                out[places] = vectors
        return self.outs

    def damage(self) -> list[Damage]:
        """Wait, and tell what parts of the streams are damaged; raises CorruptStream where an offset is not finite."""
        return [damage for group in self.groups for damage in group.damage()]

    def check(self) -> None:
        """Wait; raises CorruptStream if a checksum did not hold."""
        damage = self.damage()
        if damage:
            raise damage_error(damage)
