"""SPEC II.5: the order in which a reader checks a .pqkv file, and the error that each check makes."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import second_reader
import spec_vectors
from fuzz import TARGETS
from fuzz.base import ERRORS
from test_pqkv import ITEM, REFUSED, REFUSED_TENSORS, assemble, exact_frame, frame, sealed

import pqcodec
from pqcodec.errors import CorruptStream, PQError, TruncatedStream, UnsupportedStream
from pqcodec.formats import PQKVFile, PQKVWriter

REFERENCE = {"backend": "reference"}
Kind = type[PQError]


@cache
def grown() -> bytes:
    """The file of II.7: two commits, a coded tensor of two parts and an exact one."""
    with TemporaryDirectory() as folder:
        return spec_vectors.grown_file(Path(folder))


@cache
def written() -> bytes:
    """A file of version 1: metadata, an exact and a coded tensor."""
    coded = {"name": "k", "layer": 3, "role": "key", "shape": [1, 16], "dtype": "float32", "layout": "..., tokens, head_dim"}
    stream = pqcodec.encode(np.ones((1, 16), np.float32), preset="quad2", **REFERENCE)
    return assemble(frame(3, b'{"m":1}'), exact_frame(), frame(1, json.dumps(coded).encode(), stream))


@cache
def tabled() -> bytes:
    """A file of a shared table and a tensor that names it."""
    table, file = pqcodec.LevelTable((-1, -0.25, 0.25, 1)), io.BytesIO()
    with PQKVWriter(file) as writer:
        writer.add("k", np.ones((1, 16), np.float32), preset="nuq2", levels=table, **REFERENCE)
    return file.getvalue()


def error_of(data: bytes) -> str:
    """The error of reading all of a file, in the specification's word."""
    try:
        with PQKVFile(data) as file:
            assert file.metadata is not None
            for name in file.names:
                file.entry(name)
                file.decode(name, backend="cpu")
    except PQError as error:
        return ERRORS[type(error)]
    return ""


def head(version: int = 1, reserved: int = 0, at: int = 12) -> bytes:
    """A head; ``at``: the byte that is changed behind its checksum."""
    data = bytearray(sealed(b"\x89PQF" + bytes([version, reserved]) + bytes(6)))
    data[at] ^= 0 if at == 12 else 1
    return bytes(data)


def forged(frame_: bytes, at: int, value: int, *, good: bool = True) -> bytes:
    """A frame with a byte of its header changed; ``good``: under a checksum that holds."""
    meta = struct.unpack_from("<I", frame_, 8)[0]
    data = bytearray(frame_)
    data[at] = value
    told = bytes(data[:20] + data[24 : 24 + meta])
    data[20:24] = sealed(told)[-4:] if good else bytes(4)
    return bytes(data)


def footer(index: int, size: int) -> bytes:
    return sealed(b"PQFE" + struct.pack("<QQ", index, size))


def listed(frame_: bytes, **told: object) -> dict:
    """The object of an index for the first frame of a file."""
    meta, body = struct.unpack_from("<IQ", frame_, 8)
    return ITEM | {"meta_bytes": meta, "body_bytes": body} | told


def in_parts(*streams: bytes) -> bytes:
    """A file of one tensor ``k`` [tokens, 16] in the parts that streams are."""
    parts, tokens = [], 0
    for stream in streams:
        meta = {"name": "k", "layer": 0, "role": "key", "shape": [stream[48], 16], "dtype": "float32", "layout": "..."}
        parts.append(frame(1, json.dumps(meta | ({"first_token": tokens} if parts else {})).encode(), stream))
        tokens += stream[48]
    return assemble(*parts, version=2)


def coded(tokens: int) -> bytes:
    """A stream [tokens, 16] that has a mean, whether it has tokens or not."""
    return pqcodec.encode(np.ones((tokens, 16), np.float32), preset="pq2", center="mean", **REFERENCE)


ONE, NONE = coded(1), coded(0)
NO_MEAN = NONE[:-1] + bytes([NONE[-1] ^ 1])
BARE, X, OTHER = assemble(), exact_frame(), exact_frame(dtype="int4")
INDEX = BARE[16:-24]  # its frame
TORN = assemble(X, version=2)
FIRST_WRONG: list[tuple[str, bytes, Kind]] = [  # by step: what is wrong there, and after it
    ("opening 1", b"\x89PQG" + bytes(3), CorruptStream),
    ("opening 2", head(version=9)[:15], TruncatedStream),
    ("opening 3", head(version=9, at=15), UnsupportedStream),
    ("opening 4", head(reserved=1, at=15), CorruptStream),
    ("opening 4, reserved", head(reserved=1), UnsupportedStream),
    ("opening 5", BARE[:-1], TruncatedStream),
    ("opening 6, before the file", head() + INDEX + footer(15, 16 + len(INDEX) + 24), CorruptStream),
    ("opening 6, behind the footer", head() + INDEX + footer(1 << 62, 16 + len(INDEX) + 24), CorruptStream),
    ("opening 6, another kind", head() + X + footer(16, 40 + len(X)), CorruptStream),
    ("opening 6, of a kind to come", head() + forged(INDEX, 4, 9) + footer(16, 40 + len(INDEX)), UnsupportedStream),
    ("opening 6, a gap", head() + INDEX + b"\0" + footer(16, 41 + len(INDEX)), CorruptStream),
    ("opening 7, checksum", head() + INDEX[:-1] + b"\1" + footer(16, 40 + len(INDEX)), CorruptStream),
    ("opening 7, an object in version 1", assemble(index=b'{"previous":16,"frames":[]}'), CorruptStream),
    ("opening 7, previous", assemble(index=b'{"previous":16,"frames":[{}]}', version=2), CorruptStream),
    ("opening 8, kind", assemble(X, listed=[listed(X, kind=5, offset=-1)]), UnsupportedStream),
    ("opening 8, the first one", assemble(X, listed=[listed(X, offset=-1), listed(X, kind=5)]), CorruptStream),
    ("opening 8, before the gap", assemble(X, listed=[listed(X, offset=17), listed(X, kind=5)]), UnsupportedStream),
    ("opening 9", assemble(X, X, listed=[listed(X)]), CorruptStream),
    ("opening 10", assemble(X, index=b'{"previous":17,"frames":[]}', version=2), CorruptStream),
    ("opening 11", assemble(X, X, version=2), CorruptStream),
    ("frame 2, before its kind", assemble(forged(X, 4, 9, good=False), listed=[listed(X)]), CorruptStream),
    ("frame 3", assemble(forged(X, 5, 1)), UnsupportedStream),
    ("frame 3, before its body", assemble(forged(frame(3, b"{}", b"a"), 6, 1)), UnsupportedStream),
    ("frame 4", assemble(frame(3, b"{}", b"a")), CorruptStream),
    ("frame 5, before its dtype", assemble(OTHER, listed=[listed(OTHER, layer=1)]), CorruptStream),
    ("tensor 1, before its dtype", assemble(exact_frame(dtype="int4", shape=[-1])), CorruptStream),
    ("tensor 1, layout before its dtype", assemble(exact_frame(dtype="int4", layout=1)), CorruptStream),
    ("tensor 1, dtype", assemble(exact_frame(dtype="int4", numpy=1, rel_mse=-1, first_token=1)), UnsupportedStream),
    ("tensor 1, seal", assemble(exact_frame(seal="0000000G")), CorruptStream),
    ("tensor 3", assemble(exact_frame(bytes(7) + b"\1")), CorruptStream),
    ("tensor 3, of a part without tokens", in_parts(ONE, NO_MEAN, ONE), CorruptStream),
    ("tensor 3, of parts without tokens", in_parts(NO_MEAN, NONE), CorruptStream),
    ("tensor 3, the first stream", in_parts(ONE, NONE[:-1], NONE[:4] + b"\2" + NONE[5:]), TruncatedStream),
    ("tensor 4", assemble(exact_frame(seal="00000000")), CorruptStream),
    ("walk, a frame", assemble(forged(X, 4, 9))[:-1], UnsupportedStream),
    ("walk, a frame that holds no longer", assemble(forged(X, 4, 9, good=False), listed=[])[:-1], CorruptStream),
    ("walk 1", BARE[:-24] + bytes(23), CorruptStream),
    ("walk 1, before 2", head(version=2) + b"QPFR", CorruptStream),
    ("walk 2", head(version=2) + X, TruncatedStream),
    ("walk 3, version 1", BARE + b"P", CorruptStream),
    ("walk 3, a footer behind", TORN + X[:9] + b"\xff" * 3 + X[12:] + TORN[16:], CorruptStream),
]  # fmt: skip


FIRST_WRONG += [(name, data, error) for name, (data, error, _) in REFUSED.items()]
FIRST_WRONG += [(name, assemble(data), error) for name, (data, error, _) in REFUSED_TENSORS.items()]


@pytest.mark.parametrize(("data", "error"), [case[1:] for case in FIRST_WRONG], ids=[case[0] for case in FIRST_WRONG])
def test_the_first_thing_that_is_wrong_makes_the_error(data: bytes, error: Kind) -> None:
    assert error_of(data) == ERRORS[error]
    assert second_reader.refusal(data) == ERRORS[error]


@pytest.mark.parametrize("streams", [(ONE, NONE, ONE), (NONE, ONE), (NONE, NONE)])
def test_parts_may_have_no_tokens(streams: tuple[bytes, ...]) -> None:
    data = in_parts(*streams)
    assert (error_of(data), second_reader.refusal(data)) == ("", "")
    assert PQKVFile(data).decode("k").shape == (streams.count(ONE), 16)


@pytest.mark.parametrize("sound", [grown, written, tabled])
def test_a_reader_written_from_the_specification_agrees_of_every_changed_byte(sound: Callable[[], bytes]) -> None:
    """As it is, and under checksums that hold again."""
    data, seal = sound(), TARGETS["pqkv"].seal
    assert (error_of(data), second_reader.refusal(data)) == ("", "")
    ends = set()
    for at in range(len(data)):
        for value in {data[at] ^ 1, 0, 2, 255} - {data[at]}:
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            for one in (changed, seal(changed)):
                ends.add(error := error_of(one))
                assert second_reader.refusal(one) == error, (at, value)
    assert ends == {"", "corrupt", "truncated", "unsupported"}


def test_a_reader_written_from_the_specification_agrees_of_every_end() -> None:
    """What is cut off, and what follows: beginnings of frames and footers, whole frames, anything else."""
    data, rng = grown(), random.Random(0)
    for cut in range(len(data)):
        assert second_reader.refusal(data[:cut]) == error_of(data[:cut]), cut
    tails = [data[at : at + rng.randrange(1, 200)] for at in (16, 234, 355, 379, 613, 756, 999) for _ in range(20)]
    tails += [frame(kind, b"{}", sealed(b"[]")) for kind in range(6)] + [rng.randbytes(n) for n in range(1, 40)]
    tails += [tail[:at] + b"\1" + tail[at + 1 :] for tail in tails[:40] for at in (0, 4, 6, 9, 13, 21)]
    for tail in tails:
        for one in (data + tail, written() + tail, data[:379] + tail + data[379:], data[:-1] + tail):
            assert second_reader.refusal(one) == error_of(one), tail
