"""Files that grow: new tokens and tensors, what a killed writer leaves, and damage."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec.codings.presets import Preset
from pqcodec.errors import CorruptStream, InvalidArgument, PQError, TruncatedStream
from pqcodec.formats import PQKVAppender, PQKVFile, PQKVWriter, append_cache, load_cache, save_cache
from pqcodec.stream.header import read_header

REFERENCE = {"backend": "reference"}
KILLS = int(os.environ.get("PQCODEC_KILLS", "200"))


def tensor(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def grown(path: Path) -> tuple[list[int], np.ndarray]:
    """A file of three commits; where they end, and the tokens of "k"."""
    x = tensor(2, 11, 16)
    ends = []
    with PQKVWriter(path, {"m": 1}) as writer:
        writer.add("k", x[:, :4], role="key", layer=0, preset="pq2", **REFERENCE)
    ends.append(path.stat().st_size)
    for first, last in ((4, 5), (5, 11)):
        with PQKVAppender(path) as writer:
            writer.extend("k", x[:, first:last], preset="pq2", **REFERENCE)
            writer.add_exact(f"n{last}", np.arange(last))
        ends.append(path.stat().st_size)
    return ends, x


def test_a_grown_tensor_is_its_parts_one_behind_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    ends, x = grown(path)
    parts = [
        pqcodec.decode(pqcodec.encode(x[:, a:b], preset="pq2", **REFERENCE), **REFERENCE) for a, b in ((0, 4), (4, 5), (5, 11))
    ]
    whole = np.concatenate(parts, 1)
    with PQKVFile(path) as file:
        assert (file.names, file.metadata, file.torn_bytes) == (("k", "n5", "n11"), {"m": 1}, 0)
        assert file.entry("k").shape == file.inspect("k").shape == (2, 11, 16)
        assert file.entry("k").parts == 3
        np.testing.assert_array_equal(file.decode("k", **REFERENCE), whole)
        for first in range(12):
            for last in range(first, 12):
                np.testing.assert_array_equal(file.decode("k", tokens=(first, last), **REFERENCE), whole[:, first:last])
        np.testing.assert_array_equal(file.decode("k", leading=(1, 2), tokens=(3, 9), **REFERENCE), whole[1:, 3:9])
        assert file.verify(**REFERENCE) == []
        with pytest.raises(InvalidArgument, match="tokens"):
            file.decode("k", tokens=(3, 12), **REFERENCE)
    assert ends == sorted(ends)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_tensor_whose_first_tokens_are_turned_once_grows(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file from before there were two rounds of rotation: its new parts have two."""
    path, x = tmp_path / "a.pqkv", tensor(2, 11, 48)
    with monkeypatch.context() as patch, PQKVWriter(path) as writer:
        patch.setattr(Preset, "rounds", 1)
        writer.add("k", x[:, :4], preset="pq6", backend=backend)
    with PQKVAppender(path) as writer:
        assert writer.extend("k", x[:, 4:], preset="pq6", backend=backend).rounds == 2
    with PQKVFile(path) as file:
        assert file.inspect("k").rounds == 1
        parts = [pqcodec.decode(file.stream("k", part), backend=backend) for part in (0, 1)]
        found = file.decode("k", backend=backend)
        np.testing.assert_array_equal(found, np.concatenate(parts, 1))
        assert np.square(found.astype(np.float64) - x).sum() < 0.0011 * np.square(x.astype(np.float64)).sum()


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "pq6", "center": "mean", "seed": 7, "chunk_tokens": 5},
        {"preset": "quad2.5", "center": "rope", "rope": pqcodec.Rope(theta=100.0)},
        {"preset": "wu44", "pairing": "interleaved", "join_heads": True},
        {"preset": "pq4", "before_rope": True, "center": "mean", "rope": pqcodec.Rope(theta=100.0)},
    ],
    ids=lambda options: options["preset"],
)
def test_new_tokens_are_coded_as_the_first_ones_if_nothing_else_is_said(options: dict[str, Any], tmp_path: Path) -> None:
    path, x = tmp_path / "a.pqkv", tensor(2, 40, 32)
    with PQKVWriter(path) as writer:
        writer.add("k", x[:, :20], **options, **REFERENCE)
    with PQKVAppender(path) as writer:
        writer.add("new", x[:, :20], **options, **REFERENCE)
        for name in ("k", "new"):
            writer.extend(name, x[:, 20:], **REFERENCE)
    with PQKVFile(path) as file:
        for name in ("k", "new"):
            first, then = (read_header(file.stream(name, part)) for part in range(2))
            assert then.kind == first.kind
            assert file.inspect(name).preset == options["preset"]


def test_parts_of_other_codings_are_told(tmp_path: Path) -> None:
    """Nor does the error of the first tokens speak for all of them."""
    path, x = tmp_path / "a.pqkv", tensor(2, 40, 32)
    save_cache(path, [(x, x)], preset="pq6", **REFERENCE)
    with PQKVFile(path) as file:
        assert file.entry("layers.0.key").rel_mse
    with PQKVAppender(path) as writer:
        writer.extend("layers.0.key", x, preset="quad3", center=None, **REFERENCE)
    with PQKVFile(path) as file:
        info = file.inspect("layers.0.key")
        assert (info.preset, info.centered) == ("pq6 + quad3", "mean + none")
        assert file.entry("layers.0.key").rel_mse is None
        assert file.entry("layers.0.value").rel_mse


def test_appending_writes_nothing_again(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    with PQKVWriter(path) as writer:
        writer.add("k", tensor(1, 4, 16), **REFERENCE)
    before = path.read_bytes()
    with PQKVAppender(path) as writer:
        writer.extend("k", tensor(1, 4, 16), **REFERENCE)
    assert path.read_bytes()[16 : len(before)] == before[16:]  # the head says that the file has grown


def test_a_cache_grows(tmp_path: Path) -> None:
    path, rope = tmp_path / "a.pqkv", pqcodec.Rope(theta=100.0)
    cache = [(torch.randn(1, 2, 90, 64), torch.randn(1, 2, 90, 64)) for _ in range(2)]
    save_cache(path, [(k[:, :, :50], v[:, :, :50]) for k, v in cache], preset="pq6", rope=rope)
    append_cache(path, [(k[:, :, 50:70], v[:, :, 50:70]) for k, v in cache], rope=rope)
    append_cache(path, [(k[:, :, 70:], v[:, :, 70:]) for k, v in cache])  # the file holds the rope
    for pair, found in zip(cache, load_cache(path), strict=True):
        for x, y in zip(pair, found, strict=True):
            assert float(((x - y) ** 2).mean()) < 0.001
    with PQKVFile(path) as file:
        headers = [read_header(file.stream("layers.0.key", part)) for part in range(3)]
        ropes = [header.rope for header in headers]
        assert ropes == [replace(rope, first_position=first).field(64) for first in (0, 50, 70)]
        assert len({header.row_bytes for header in headers}) == 1
    with pytest.raises(InvalidArgument, match="1 layers are given"):
        append_cache(path, cache[:1], rope=rope)
    assert load_cache(path)[0][0].shape[2] == 90


def test_another_rope_than_the_files_is_refused(tmp_path: Path) -> None:
    layers, rope = [(tensor(2, 30, 64), tensor(2, 30, 64))], pqcodec.Rope(theta=100.0)
    path, plain = tmp_path / "a.pqkv", tmp_path / "b.pqkv"
    save_cache(path, layers, rope=rope, backend="reference")
    save_cache(plain, layers, backend="reference")
    size = path.stat().st_size
    for other in (pqcodec.Rope(theta=101.0), pqcodec.Rope(theta=100.0, style="interleaved"), replace(rope, first_position=30)):
        with pytest.raises(InvalidArgument, match=r"'layers.0.key': rope is not that of .* leave rope out"):
            append_cache(path, layers, rope=other, backend="reference")
    with pytest.raises(InvalidArgument, match="rope is a float"):
        append_cache(path, layers, rope=100.0, backend="reference")
    with pytest.raises(InvalidArgument, match="no keys that are coded under RoPE; leave rope out"):
        append_cache(plain, layers, rope=rope, backend="reference")
    with pytest.raises(InvalidArgument, match="not of the same heads and tokens"):
        append_cache(plain, [(layers[0][0], layers[0][1][:, :5])], backend="reference")
    assert path.stat().st_size == size


def test_a_tensor_that_was_added_before_goes_on_under_its_rope(tmp_path: Path) -> None:
    x, rope = tensor(2, 30, 64), pqcodec.Rope(theta=100.0)
    save_cache(tmp_path / "a.pqkv", [], backend="reference")
    with PQKVAppender(tmp_path / "a.pqkv") as writer:
        writer.add("k", x, center="rope", rope=rope, **REFERENCE)
        writer.extend("k", x, center="rope", **REFERENCE)
        with pytest.raises(InvalidArgument, match="leave rope out"):
            writer.extend("k", x, center="rope", rope=pqcodec.Rope(theta=5.0), **REFERENCE)
    with PQKVFile(tmp_path / "a.pqkv") as file:
        assert read_header(file.stream("k", 1)).rope == replace(rope, first_position=30).field(64)


def test_every_prefix_opens_at_its_last_commit(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    ends, _ = grown(path)
    data = path.read_bytes()
    tokens = {ends[0]: 4, ends[1]: 5, ends[2]: 11}
    for size in range(len(data) + 1):
        if size < ends[0]:
            with pytest.raises(TruncatedStream):
                PQKVFile(data[:size])
            continue
        file = PQKVFile(data[:size])
        last = max(end for end in ends if end <= size)
        assert (file.committed_bytes, file.torn_bytes, file.entry("k").shape[1]) == (last, size - last, tokens[last])
        assert bool(file.verify(**REFERENCE)) == (size != last)


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    """Every seventh, which is one in each byte, by turns of all places in it."""
    path = tmp_path / "a.pqkv"
    grown(path)
    data = bytearray(path.read_bytes())
    missed = []
    for bit in range(0, 8 * len(data), 7):
        data[bit // 8] ^= 1 << bit % 8
        try:
            if not PQKVFile(bytes(data)).verify(**REFERENCE):
                missed.append(divmod(bit, 8))
        except PQError:
            pass
        data[bit // 8] ^= 1 << bit % 8
    assert missed == []


def test_random_edits_are_found(tmp_path: Path) -> None:
    """Bytes changed, runs of bytes overwritten, exchanged or removed: PQCODEC_EDITS of them (500 unless told)."""
    path = tmp_path / "a.pqkv"
    ends, _ = grown(path)
    good, rng = path.read_bytes(), random.Random(int(os.environ.get("PQCODEC_SEED", "0")))
    for number in range(int(os.environ.get("PQCODEC_EDITS", "500"))):
        data = bytearray(good)
        kind, at, length = rng.randrange(4), rng.randrange(len(data)), rng.randrange(1, 40)
        if kind == 0:
            for place in rng.sample(range(len(data)), rng.randrange(1, 4)):
                data[place] ^= rng.randrange(1, 256)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif kind == 2:
            other = rng.randrange(len(data))
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
        else:
            del data[at : at + length]
        if bytes(data) == good or (good.startswith(bytes(data)) and len(data) in ends):
            continue  # nothing changed, or an older state of the file
        with contextlib.suppress(PQError):
            assert PQKVFile(bytes(data)).verify(**REFERENCE), f"edit {number}"


def test_a_torn_append_is_cut_off_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    ends, x = grown(path)
    os.truncate(path, ends[2] - 30)
    with PQKVAppender(path) as writer:
        writer.extend("k", x[:, 5:], preset="pq2", **REFERENCE)
    with PQKVFile(path) as file:
        assert (file.names, file.torn_bytes, file.entry("k").shape) == (("k", "n5"), 0, (2, 11, 16))


def test_what_fails_leaves_the_last_commit(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    grown(path)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match="only tokens may differ"):
        _fail(path, lambda writer: writer.extend("k", tensor(3, 4, 16), **REFERENCE))
    assert path.read_bytes() == before
    with pytest.raises(ZeroDivisionError):
        _fail(path, lambda writer: 1 // 0, commit=True)
    assert PQKVFile(path.read_bytes()).names == ("k", "n5", "n11", "kept")
    with PQKVAppender(path) as writer:
        writer.add("vector", tensor(16), **REFERENCE)
        with pytest.raises(InvalidArgument, match="only tokens may differ"):
            writer.extend("vector", tensor(2, 16), **REFERENCE)
        for name, message in (("n5", "kept exactly"), ("x", "not in the file")):
            with pytest.raises(InvalidArgument, match=message):
                writer.extend(name, tensor(1, 1, 16), **REFERENCE)
        with pytest.raises(InvalidArgument, match="unique"):
            writer.add_exact("n5", np.arange(3))


def _fail(path: Path, work: Callable[[PQKVAppender], object], commit: bool = False) -> None:
    with PQKVAppender(path) as writer:
        writer.add_exact("kept", np.arange(3))
        if commit:
            writer.commit()
        writer.add_exact("lost", np.arange(1000))
        work(writer)


@pytest.mark.skipif(os.name != "posix", reason="files are locked by flock")
def test_a_second_appender_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    grown(path)
    with PQKVAppender(path), pytest.raises(BlockingIOError, match="another process appends"), PQKVAppender(path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a writer is forked to be killed")
def test_a_writer_killed_at_any_moment_loses_nothing_that_it_committed(tmp_path: Path) -> None:
    """Kill -9 at random; every commit that the writer told of is there, whole, and the next writer goes on."""
    path, told = tmp_path / "a.pqkv", tmp_path / "told"
    stream = pqcodec.encode(tensor(1, 2, 16), preset="pq2", **REFERENCE)
    with PQKVWriter(path) as writer:
        writer.add_stream("first", stream)
    rng, torn, committed = random.Random(0), 0, 0
    for _ in range(KILLS):
        told.write_text(str(committed))
        begun, begin = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(begin, b"!")
                _append_for_ever(path, told, committed, stream)
            finally:
                os._exit(1)
        os.read(begun, 1)  # a large process takes longer to fork than the writer is let live
        os.close(begun)
        os.close(begin)
        time.sleep(rng.uniform(0.0005, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with PQKVFile(path) as file:
            committed = len(file.names) - 1
            torn += file.torn_bytes > 0
            assert committed >= int(told.read_text() or 0)
            assert all(name is None for name, _ in file.verify(**REFERENCE))
        if committed > 200:
            with PQKVWriter(path) as writer:
                writer.add_stream("first", stream)
            committed = 0
    assert torn > 0


def _append_for_ever(path: Path, told: Path, committed: int, stream: bytes) -> None:
    with PQKVAppender(path) as writer:
        while True:
            writer.add_stream(f"{committed}.{os.getpid()}", stream)
            writer.commit()
            committed += 1
            handle = os.open(told, os.O_WRONLY)
            os.pwrite(handle, str(committed).encode(), 0)
            os.close(handle)


def test_parts_that_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    grown(path)
    with PQKVAppender(path) as writer:
        writer._entries["k"] = writer._entries["n5"].__class__("k", True, 0, "key", (2, 9, 16), "float16", "", 0, 0)
        writer.extend("k", tensor(2, 3, 16), preset="pq2", **REFERENCE)
    with pytest.raises(CorruptStream, match="begins with token 9, 11 is expected"):
        PQKVFile(path.read_bytes()).entry("k")


class Counting(io.BytesIO):
    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_only_wanted_parts_are_read(tmp_path: Path) -> None:
    path, x = tmp_path / "a.pqkv", tensor(4, 512, 64)
    with PQKVWriter(path) as writer:
        writer.add("k", x, **REFERENCE)
        writer.add("v", x, **REFERENCE)
    with PQKVAppender(path) as writer:
        writer.extend("k", x, **REFERENCE)
    source = Counting(path.read_bytes())
    with PQKVFile(source) as file:
        file.entry("k")
        source.count = 0
        file.decode("k", tokens=(512, 768), leading=(1, 2), **REFERENCE)
    payload = 256 * 64 * 3 // 8
    assert payload <= source.count <= payload + 4 * 4 + 1200  # checksums; and what frames and headers say


def test_a_damaged_frame_before_a_commit_is_no_torn_append(tmp_path: Path) -> None:
    """Two bytes that make a commit look like an append that was cut off: it is not cut off by the next appender."""
    path = tmp_path / "a.pqkv"
    ends, x = grown(path)
    data = bytearray(path.read_bytes())
    data[ends[0] + 8 + 2] ^= 100  # of meta_bytes: the frame seems to run out of the file
    data[-10] ^= 1  # the last footer
    path.write_bytes(data)
    with pytest.raises(CorruptStream, match=f"a commit lies behind it, which ends at byte {ends[1]}"):
        PQKVFile(path)
    with pytest.raises(CorruptStream), PQKVAppender(path) as writer:
        writer.extend("k", x[:, 5:], preset="pq2", **REFERENCE)
    assert path.read_bytes() == bytes(data)


def test_what_is_no_beginning_of_a_frame_is_no_torn_append(tmp_path: Path) -> None:
    """A few bytes of anything else behind the last footer are damage, not an append that was cut off."""
    path = tmp_path / "a.pqkv"
    ends, _ = grown(path)
    data = path.read_bytes()
    rng = random.Random(0)
    for size in range(1, 24):
        garbage = [b"\0" * size, b"\xff" * size, b"Q" + rng.randbytes(size - 1)]
        garbage += [b"PQFR" + bytes([9]) + bytes(size - 5), b"PQFR\1\0\1" + bytes(size - 7)] if size > 6 else []
        for rest in garbage:
            with pytest.raises(CorruptStream, match=f"at byte {ends[2]} is neither a frame nor a footer"):
                PQKVFile(data + rest)
    unknown = b"PQFR\x09\0\0\0" + bytes([200]) + bytes(40)  # of a kind that is not known; its meta is cut off
    with pytest.raises(CorruptStream, match="neither a frame nor a footer"):
        PQKVFile(data + unknown)
    assert PQKVFile(data + unknown.replace(b"\x09", b"\2")).torn_bytes == len(unknown)
    for rest in (b"P", b"PQFR", b"PQFR\2\0\0\0" + bytes(15)):
        assert PQKVFile(data + rest).torn_bytes == len(rest)


def test_a_torn_frame_is_believed_by_its_checksum_only(tmp_path: Path) -> None:
    """The first frame of an append is cut off and damaged: its sizes say nothing."""
    path = tmp_path / "a.pqkv"
    ends, _ = grown(path)
    data = bytearray(path.read_bytes()[: ends[2] - 30])
    data[ends[1] + 24] ^= 1  # of the meta
    with pytest.raises(CorruptStream, match="checksum does not hold"):
        PQKVFile(bytes(data))
