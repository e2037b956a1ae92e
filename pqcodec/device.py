"""Law: encode, decode, decode_together and verify where the tensor is on a device; ``host`` has the same on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.backends import device_backend
from pqcodec.batch import DecodeBatch, EncodeBatch
from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.options import EncodeOptions, Progress
from pqcodec.placed import Placed, aligned, device_named, lying, moved, one_device
from pqcodec.stages import exact
from pqcodec.stages.centre import Halves
from pqcodec.stream import sections
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.index import result_shape
from pqcodec.stream.report import Damage, damage_error
from pqcodec.stream.source import Source, source_of
from pqcodec.tensors import arrays
from pqcodec.tensors.arrays import device_rows
from pqcodec.tensors.numbers import device_of, is_torch


def encode(
    x: Any, options: EncodeOptions, backend: str, progress: Progress | None, means: Halves | None = None
) -> tuple[Header, bytes]:
    """``codec.encode_by`` of a tensor of a device; the stream comes to the host."""
    import torch

    numpy = not is_torch(x)
    x = torch.as_tensor(x).resolve_neg()
    x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
    rows = device_rows(x)
    header = options.header(rows.shape, rows.dtype, numpy)
    device_backend(backend, x.device, header)
    if options.farthest:
        raise InvalidArgument(
            f"exact_vectors={options.farthest}: the farthest vectors are found on the CPU only; pass x.cpu(), or pairs"
        )
    kept = exact.coded_rows(header, options.exact_pairs)
    coded = x.reshape(header.leading, header.tokens, header.head_dim)[:, header.first_tokens :]
    if options.nonfinite == "exact" and x.numel():
        kept = np.union1d(kept, torch.nonzero(~torch.isfinite(coded).all(-1).ravel()).ravel().cpu().numpy())
    batch = EncodeBatch.of_rows([rows], [replace(header, exceptions=len(kept))], backend, options.effort, means)
    data = bytearray(batch.run()[0].cpu().numpy().tobytes())
    header = batch.headers[0]
    if header.exceptions:
        vectors = coded.reshape(-1, header.head_dim)[torch.from_numpy(kept).to(x.device)].cpu()
        stored = (vectors if vectors.dtype == torch.float32 else vectors.view(torch.int16)).numpy()
        place = header.places[sections.EXACT_VECTORS]
        data[place.start : place.end] = sections.with_checksum(exact.vectors_body(kept, stored))
    if options.nonfinite == "error":
        try:
            batch.check()
        except NonFiniteInput as error:
            raise NonFiniteInput(error.found) from None
    _all_done(header, progress)
    stream = bytes(data)
    return read_header(source_of(stream)), stream  # the exponent of the means is known to the device only, which wrote it there


def _all_done(h: Header, progress: Progress | None) -> None:
    if progress:
        progress(h.chunks * h.leading, h.chunks * h.leading)


def decode(
    data: Any,
    where: Any,
    backend: str,
    out: Any,
    tokens: tuple[int, int] | None,
    leading: tuple[int, int] | None,
    progress: Progress | None,
) -> Any:
    """``codec.decode`` of a stream that lies on the device ``where`` (None: the stream's own) or is moved there."""
    device = device_named(where if where is not None else device_of(data))
    device_backend(backend, device)  # whether it can code there is asked before anything is moved
    damage: list[Damage] = []
    if is_torch(data):
        placed = lying(data if data.device == device else data.to(device), tokens, leading, damage)
    else:
        placed = moved(source_of(data), device, tokens, leading, damage)
    header = placed.header
    device_backend(backend, device, header)
    in_place = out is not None and arrays.fits(out, result_shape(header, tokens, leading), header.dtype) and is_torch(out)
    batch = DecodeBatch.of_placed([placed], device, backend, [out] if in_place else None, tokens, leading)
    result = batch.run()[0]
    damage += batch.damage()
    if damage:
        raise damage_error(damage)
    _all_done(header, progress)
    if out is not None and not in_place:
        return arrays.copied(out, result)
    return result.numpy() if header.numpy and where is None and header.dtype != c.DTYPE_BFLOAT16 else result


def decode_together(sources: Sequence[Source], outs: Sequence[Any], starts: Sequence[int], backend: str) -> None:
    """``codec.decode_together`` for tensors of one device: the streams' bytes move there in one copy. Waits."""
    import torch

    device = one_device(outs)
    device_backend(backend, device)
    places = np.cumsum([0, *(aligned(source.size) for source in sources)])
    host = torch.empty(int(places[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    rows = host.numpy()
    for source, at in zip(sources, places, strict=False):
        rows[at : at + source.size] = source.read(0, source.size)
    arena = host.to(device, non_blocking=True)
    damage: list[Damage] = []
    placed = []
    for source, at in zip(sources, places, strict=False):
        h = read_header(source)
        placed.append(Placed.whole(h, arena.data_ptr() + int(at), arena, exact.read_vectors(source, h, damage)))
    parts = [
        out[..., start : start + p.header.tokens, :] if out.ndim > 1 else out
        for out, start, p in zip(outs, starts, placed, strict=True)
    ]
    batch = DecodeBatch.of_placed(placed, device, backend, parts)
    batch.run()
    damage += batch.damage()
    if damage:
        raise damage_error(damage)


def verify(data: Any, backend: str, progress: Progress | None) -> list[Damage]:
    """``codec.verify`` on a device."""
    device = device_named(device_of(data))
    device_backend(backend, device)
    damage: list[Damage] = []
    placed = lying(data, None, None, damage) if is_torch(data) else moved(source_of(data), device, None, None, damage)
    batch = DecodeBatch.of_placed([placed], device, backend, write=False)
    batch.run()
    _all_done(placed.header, progress)
    return batch.damage() + damage
