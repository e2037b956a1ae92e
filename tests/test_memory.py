"""Memory: what is held at once, what is refused before anything is allocated, and files that promise more than they hold."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import safe_open

import pqcodec
from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats import PQKVFile, PQKVWriter, containers
from pqcodec.formats.containers import listing
from pqcodec.formats.containers.writer import Coded
from pqcodec.formats.plain.files import open_tensors, write_tensors
from pqcodec.formats.plain.in_memory import InMemory
from pqcodec.formats.plain.numbers import SAFETENSORS_CODES
from pqcodec.stream.source import MappedSource
from pqcodec.tools import memory
from tests.conftest import gaussian
from tests.test_cli import run

MIB = 1 << 20
STATUS = Path("/proc/self/status")
needs_status = pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="this system does not tell the most memory of a process"
)


@contextmanager
def allocating(most: int) -> Iterator[None]:
    """The block allocates at most so many bytes at once, of Python's and of numpy's memory."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= most, f"{peak / MIB:.1f} MiB"


# -- what is held at once ----------------------------------------------------------------------------------------
PEAKS = """
import json, sys
from pqcodec.tools.cli import app
def told(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
warm, *jobs = json.loads(sys.argv[1])
app(warm, standalone_mode=False)
before, found = told("VmRSS"), []
for job in jobs:
    app(job, standalone_mode=False)
    found.append(told("VmHWM") - before)
print(json.dumps(found))
"""


def peaks(folder: Path, *jobs: list[str]) -> list[int]:
    """The most memory that a process took up to the end of each verb but the first, above what it had after that."""
    call = [sys.executable, "-c", PEAKS, json.dumps(jobs)]
    process = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True)
    found: list[int] = json.loads(process.stdout.splitlines()[-1])
    return found


@needs_status
def test_decoding_a_file_holds_one_tensor(tmp_path: Path) -> None:
    """64 MiB beside a tensor, above a process that has decoded a small file, from every container."""
    x = gaussian(8, 8192, 128).numpy().astype(np.float16)
    stream = pqcodec.encode(x)
    sources = {name: tmp_path / f"{name}.pqkv" for name in ("tiny", "many", "exact")}
    with PQKVWriter(sources["tiny"]) as tiny:
        tiny.add("k", x[:, :64])
        tiny.add("half", gaussian(2, 64, 64, dtype=torch.bfloat16))
        tiny.add_exact("e", x[0, :64])
    with PQKVWriter(sources["many"]) as many:
        for name in "abcdefgh":
            many.add_stream(name, stream)
    with PQKVWriter(sources["exact"]) as exact:
        for name in "abcdef":
            exact.add_exact(name, x)
    for name, kind in (("many", "safetensors"), ("many", "zarr"), ("exact", "zarr")):
        containers.convert(sources[name], tmp_path / f"{name}.{kind}")
    jobs = [["tiny.pqkv", "warm.safetensors"]]
    jobs += [["many.pqkv", "m.safetensors"], ["many.safetensors", "m.npz"], ["many.zarr", "z.safetensors"]]
    jobs += [["exact.pqkv", "e.safetensors"], ["exact.zarr", "e.npz"]]
    found = peaks(tmp_path, *(["decode", *job] for job in jobs))
    told = [f"{job}: {peak / MIB:.0f} MiB" for job, peak in zip(jobs[1:], found, strict=True)]
    assert max(found) <= x.nbytes + 64 * MIB, told


@needs_status
def test_of_a_mapped_file_little_stays_in_memory_and_what_left_comes_again(tmp_path: Path) -> None:
    data = np.arange(10 * MIB, dtype=np.uint32).view(np.uint8)
    data.tofile(tmp_path / "x")
    before, most, views = status("RssFile"), 0, []
    with MappedSource(tmp_path / "x") as source:
        for start in range(0, data.size, 4 * MIB):
            views.append(source.read(start, 4 * MIB))
            np.testing.assert_array_equal(views[-1], data[start : start + 4 * MIB])
            most = max(most, status("RssFile") - before)
        assert 4 * MIB <= most <= 20 * MIB
        np.testing.assert_array_equal(np.concatenate(views), data)
        np.testing.assert_array_equal(source.read(0, data.size), data)


def status(key: str) -> int:
    """Bytes that the system tells of this process."""
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if line.startswith(key))


@pytest.mark.parametrize("extension", ["npz", "npy"])
def test_reading_takes_no_more_than_is_told(extension: str, tmp_path: Path) -> None:
    x = np.zeros((4, 2 * MIB, 2), np.float16)
    for number, array in enumerate((x, x.astype(">f2"), np.asfortranarray(x))):
        path = tmp_path / f"{number}.{extension}"
        np.savez_compressed(path, x=array) if extension == "npz" else np.save(path, array)
        with open_tensors(path) as reader:
            (name,) = reader.names
            told = reader.held_bytes(name)
            assert told == x.nbytes * ((extension == "npz") + (number > 0))
            with allocating(told + 4 * MIB):
                found = reader.read(name)
            np.testing.assert_array_equal(found, x)


# -- files of safetensors ----------------------------------------------------------------------------------------
def of_every_dtype() -> dict[str, torch.Tensor]:
    found = {f"a {name}": (gaussian(3, 5) * 9).to(getattr(torch, name)) for name in SAFETENSORS_CODES}
    found |= {f"b {name}": torch.ones(1).to(x.dtype) for name, x in found.items()}
    found |= {f"{number} é\n\x7f\x01": torch.zeros(3) for number in range(20)}
    return found | {"": torch.zeros(7), "empty": torch.zeros(0, 4, dtype=torch.float16), "scalar": torch.tensor(2.5)}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_safetensors_are_byte_for_byte_the_librarys(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = of_every_dtype()
    write_tensors(tmp_path / "ours.safetensors", InMemory(tensors), metadata)
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata=metadata or None)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    arrays = {name: x.numpy() for name, x in tensors.items() if "float8" not in name and "bfloat16" not in name}
    arrays["big"] = np.arange(4, dtype=">i2")
    arrays["fortran"] = np.asfortranarray(np.arange(6).reshape(2, 3))
    write_tensors(tmp_path / "ours.safetensors", InMemory(arrays), metadata)
    for name, x in arrays.items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "ours.safetensors")[name], x)


def test_both_readers_of_the_library_take_what_is_written(tmp_path: Path) -> None:
    tensors = of_every_dtype()
    metadata = {"model": "tiny", "é": "\n", "a": "b"}
    write_tensors(tmp_path / "x.safetensors", InMemory(tensors), metadata)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        for name, x in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (x.dtype, x.shape)
            assert found.reshape(-1).view(torch.uint8).tolist() == x.reshape(-1).view(torch.uint8).tolist()
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        for name, x in tensors.items():
            if "float8" not in name and "bfloat16" not in name:
                np.testing.assert_array_equal(file.get_tensor(name), x.numpy())


def test_what_a_file_of_tensors_cannot_hold_is_told_before_anything_is_read(tmp_path: Path) -> None:
    class Unread(InMemory):
        def read(self, name: str) -> Any:
            raise AssertionError(name)

    for extension, x, metadata, told in (
        ("safetensors", {"x": np.ones(2, np.complex128)}, {}, "no complex128"),
        ("safetensors", {"__metadata__": np.ones(2)}, {}, "for itself"),
        ("safetensors", {"x": np.ones(2)}, {"a": 1}, "metadata"),
        ("safetensors", {"x": np.ones(2)}, ["a"], "metadata"),
        ("npz", {"x": np.ones(2), "y": torch.ones(2).bfloat16()}, {}, "numpy has no bfloat16"),
        ("npz", {"x": np.ones(2), "../y": np.ones(2)}, {}, "outside an archive"),
        ("npy", {"x": torch.ones(2).bfloat16()}, {}, "numpy has no bfloat16"),
    ):
        with pytest.raises(InvalidArgument, match=told):
            write_tensors(tmp_path / f"x.{extension}", Unread(x), metadata)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# -- limits ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of a large tensor, 32 MiB, and a small one."""
    path = tmp_path_factory.mktemp("zeros") / "x.npz"
    np.savez_compressed(path, k_0=np.zeros((2, 65536, 128), np.float16), v_0=np.zeros((2, 64, 128), np.float16))
    assert path.stat().st_size < MIB
    return path


def test_encode_refuses_what_takes_too_much(zeros: Path, tmp_path: Path) -> None:
    for kind, least in (("pqkv", 34), ("safetensors", 34), ("zarr", 34)):
        with allocating(16 * MIB):
            told = run("encode", zeros, tmp_path / "o", "--to", kind, "--memory", "33MB", code=2).stderr
        assert "x.npz: tensor 'k_0' takes" in told
        assert "--memory allows 33 MB; pass a larger --memory" in told
        assert float(told.split(" takes ")[1].split(" MB")[0]) >= least
    assert not list(tmp_path.iterdir())
    with allocating(64 * MIB):
        run("encode", zeros, tmp_path / "o", "--to", "pqkv", "--memory", "64MiB")
    with PQKVFile(tmp_path / "o") as file:
        assert not file.decode("k_0").any()


def test_encode_counts_copies_and_what_is_mapped(tmp_path: Path) -> None:
    x = np.zeros((2, 65536, 128), np.float16)
    np.save(tmp_path / "k.npy", x)
    run("encode", tmp_path / "k.npy", tmp_path / "o.pqkv", "--memory", "30MB")  # less than the tensor, which stays on the disk
    np.save(tmp_path / "b.npy", x.astype(">f2"))
    run("encode", tmp_path / "b.npy", tmp_path / "b.pqkv", "--memory", "30MB", code=2)
    np.savez(tmp_path / "e.npz", e=np.zeros(4 * MIB, np.int64))  # kept exactly
    run("encode", tmp_path / "e.npz", tmp_path / "e.pqkv", "--memory", "32MiB")
    run("encode", tmp_path / "e.npz", tmp_path / "e.zarr", "--memory", "32MiB", code=2)


def test_decode_refuses_what_takes_too_much(zeros: Path, tmp_path: Path) -> None:
    run("encode", zeros, tmp_path / "c.pqkv")
    with allocating(8 * MIB):
        told = run("decode", tmp_path / "c.pqkv", tmp_path / "o.npz", "--memory", "20MB", code=2).stderr
    assert "c.pqkv: tensor 'k_0' takes 33.6 MB of memory at once, --memory allows 20 MB" in told
    assert "--tokens A:B" in told
    assert not (tmp_path / "o.npz").exists()
    run("decode", tmp_path / "c.pqkv", tmp_path / "o.npz", "--memory", "20MB", "--tokens", "0:64")
    run("decode", tmp_path / "c.pqkv", tmp_path / "o.npy", "--memory", "20MB", "--only", "v_0")
    run("decode", tmp_path / "c.pqkv", tmp_path / "o.safetensors", "--memory", "33.6MB")


def test_convert_refuses_what_takes_too_much(zeros: Path, tmp_path: Path) -> None:
    run("encode", zeros, tmp_path / "c.pqkv")
    run("convert", tmp_path / "c.pqkv", tmp_path / "o.safetensors", "--memory", "1MB")  # streams go along in pieces
    assert "'k_0' takes" in run("convert", tmp_path / "c.pqkv", tmp_path / "o.zarr", "--memory", "1MB", code=2).stderr
    with PQKVWriter(tmp_path / "e.pqkv") as writer:
        writer.add_exact("e", np.zeros(MIB))
    run("convert", tmp_path / "e.pqkv", tmp_path / "e.safetensors", "--memory", "9MB")
    assert "'e' takes" in run("convert", tmp_path / "e.pqkv", tmp_path / "e.zarr", "--memory", "9MB", code=2).stderr
    assert not (tmp_path / "e.zarr").exists()


def test_files_at_once_share_the_memory(zeros: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.npz").write_bytes(zeros.read_bytes())
    told = run("encode", folder, tmp_path / "out", "--memory", "80MB", "--jobs", 2, code=2).stderr
    assert "--memory allows 80 MB, 40 MB for each of 2 jobs" in told
    assert "(--jobs)" in told
    run("encode", folder, tmp_path / "out", "--memory", "80MB")
    run("encode", zeros, tmp_path / "one.pqkv", "--memory", "80MB", "--jobs", 2)


def test_the_limit_is_what_the_machine_has(zeros: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 30_000_000)
    told = run("encode", zeros, tmp_path / "o.pqkv", code=2).stderr
    assert "30 MB are free here; pass a larger --memory" in told
    run("encode", zeros, tmp_path / "o.pqkv", "--memory", "1GB")
    monkeypatch.setattr(memory, "available", lambda: None)
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.safetensors")


@pytest.mark.parametrize("size", ["", "much", "-5", "5iB"])
def test_sizes_that_are_none(size: str, zeros: Path, tmp_path: Path) -> None:
    assert "--memory" in run("encode", zeros, tmp_path / "o.pqkv", "--memory", size, code=2).stderr


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"}, 4000 << 10),
        (
            {
                "proc/meminfo": "MemAvailable: 4000 kB",
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "1000000\n",
                "sys/fs/cgroup/a/memory.current": "900000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 500000\nactive_file 100000\ninactive_file 200000\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5\n",
            },
            400_000,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 4000 kB",
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/not/here\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000",
                "sys/fs/cgroup/memory/memory.stat": "active_file 9\ntotal_active_file 1000\ntotal_inactive_file 2000",
            },
            503_000,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 4000 kB",
                "sys/fs/cgroup/memory.max": "9",
                "sys/fs/cgroup/memory.current": "99",
            },
            0,
        ),
    ],
)
def test_what_is_free(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.available(tmp_path) == expected


def test_this_machine_tells_what_is_free() -> None:
    assert memory.available() is None or memory.available() > 0


# -- files that promise more than they hold ----------------------------------------------------------------------
def lying_npz(path: Path, shape: tuple[int, ...], packed: int | None, compression: int) -> Path:
    """An archive whose directory goes with an array's header and not with its bytes."""
    header = path.with_suffix(".head")
    with open(header, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    size = header.stat().st_size + 8 * int(np.prod(shape, dtype=object))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("k_0.npy", header.read_bytes() + bytes(64))
        info = archive.infolist()[0]
        info.file_size, info.compress_size = size, packed or info.compress_size
    return path


@pytest.mark.parametrize("packed", [None, 1 << 45])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_that_promise_too_much_allocate_nothing(packed: int | None, compression: int, tmp_path: Path) -> None:
    path = lying_npz(tmp_path / "x.npz", (1 << 33, 64), packed, compression)
    with allocating(16 * MIB):
        told = run("encode", path, tmp_path / "o.pqkv", code=1).stderr
    assert "x.npz: array 'k_0'" in told
    assert "at most" in told


def test_arrays_that_say_less_than_their_file_are_damaged(tmp_path: Path) -> None:
    """What a header leaves out would be left out of the check of the file's sum, too."""
    np.savez(tmp_path / "x.npz", k_0=np.ones((80, 64), np.float32))
    data = (tmp_path / "x.npz").read_bytes()
    assert data.count(b"(80, 64)") == 1
    (tmp_path / "x.npz").write_bytes(data.replace(b"(80, 64)", b"(60, 64)"))
    assert "20480 are there" in run("encode", tmp_path / "x.npz", tmp_path / "o.pqkv", code=1).stderr


@needs_status
@pytest.mark.parametrize("extension", ["npy", "npz"])
def test_arrays_of_nothing_are_not_much(extension: str, tmp_path: Path) -> None:
    """Leading indices without tokens take no bytes in a file, and no memory."""
    for name, leading in (("warm", 2), ("x", 1 << 26)):
        x = np.zeros((leading, 0, 64), np.float16)
        np.save(tmp_path / f"{name}.npy", x)
        np.savez(tmp_path / f"{name}.npz", v_0=x)
    verbs = [["encode", f"{name}.{extension}", f"{name}.pqkv"] for name in ("warm", "x")]
    assert max(peaks(tmp_path, *verbs, ["decode", "x.pqkv", "x.safetensors"])) < 32 * MIB
    np.save(tmp_path / "much.npy", np.zeros((1 << 40, 0, 64), np.float16))
    assert "1 exact" in run("encode", tmp_path / "much.npy", tmp_path / "much.pqkv", "--memory", "1MB").stdout
    assert (tmp_path / "much.pqkv").stat().st_size < 1000


def lying_parts(path: Path, tokens: int) -> Path:
    """A file whose second part of a tensor says that it holds so many tokens."""
    stream = pqcodec.encode(np.ones((2, 8, 64), np.float16), backend="reference")
    with PQKVWriter(path, parts=True) as writer:
        writer.add_streams("k", Coded.of(stream), layer=0, role="key")
        meta = {"shape": (2, tokens, 64), "dtype": "float16", "layout": "..., tokens, head_dim", "first_token": 8}
        writer._tensor(c.FRAME_CODED, "k", 0, "key", meta, [stream])
    return path


def test_tensors_that_their_bytes_cannot_hold_are_refused(tmp_path: Path) -> None:
    with PQKVFile(lying_parts(tmp_path / "sound.pqkv", 8)) as file:
        assert file.decode("k").shape == (2, 16, 64)
    path = lying_parts(tmp_path / "c.pqkv", 1 << 38)
    with PQKVFile(path) as file, pytest.raises(CorruptStream, match="at most"), allocating(MIB):
        file.decode("k")
    with allocating(16 * MIB):
        assert "at most" in run("decode", path, tmp_path / "o.npz", code=1).stderr


@pytest.mark.parametrize("kind", ["safetensors", "zarr"])
def test_lists_that_promise_too_much_allocate_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.{kind}"
    with PQKVWriter(tmp_path / "c.pqkv") as writer:
        writer.add("k", np.ones((2, 8, 64), np.float16), layer=0, role="key", backend="reference")
        writer.add_exact("e", np.arange(5.0))
    containers.convert(tmp_path / "c.pqkv", path)
    decode = ("decode", path, tmp_path / "o.npz", "--only")
    promise(path, "k")
    with allocating(16 * MIB):
        assert "tensor 'k'" in (told := run(*decode, "k", code=1).stderr)
        assert "at most" in told
    promise(path, "e")
    with allocating(16 * MIB):
        if kind == "zarr":
            assert "tensor 'e' takes 281.5 TB" in run(*decode, "e", code=2).stderr
        told = run(*decode, "e", "--memory", "1000TB", code=1).stderr
    assert ("44 bytes, " if kind == "zarr" else "no safetensors file that holds together") in told


def promise(path: Path, name: str) -> None:
    """Have a container's list (and a safetensors header) say that a tensor is huge, under a checksum that holds."""
    shape = [2, 1 << 38, 64] if name == "k" else [1 << 45]
    if path.is_dir():
        document = path / "complete" / "zarr.json"
        whole = json.loads(document.read_text())
        values, said = whole["attributes"], None
        listed = json.loads(values["pqcodec_tensors"])
        next(fields for fields in listed if fields["name"] == name)["shape"] = shape
        whole["attributes"] = listing.sealed_listing(listed, values["pqcodec_metadata"], said, {})
        document.write_text(json.dumps(whole))
        return
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    values = header.pop("__metadata__")
    listed = json.loads(values["pqcodec_tensors"])
    fields = next(fields for fields in listed if fields["name"] == name)
    (fields if fields["coded"] else header[name])["shape"] = shape
    elsewhere = sorted([name, item["dtype"], item["shape"]] for name, item in header.items())
    values = listing.sealed_listing(listed, values["pqcodec_metadata"], elsewhere, {})
    text = json.dumps({"__metadata__": values, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_a_zarr_chunk_that_is_not_there_is_no_tensor_of_zeros(tmp_path: Path) -> None:
    with PQKVWriter(tmp_path / "c.pqkv") as writer:
        writer.add("k", np.ones((2, 8, 64), np.float16), layer=0, role="key", backend="reference")
        writer.add_exact("e", np.arange(5.0))
    containers.convert(tmp_path / "c.pqkv", tmp_path / "c.zarr")
    for name, chunk in (("k", "k/c/0/0/0"), ("e", "e/c/0")):
        (tmp_path / "c.zarr" / chunk).unlink()
        assert "not in the store" in run("decode", tmp_path / "c.zarr", tmp_path / "o.npz", "--only", name, code=1).stderr


@pytest.mark.parametrize("text", ["9" * 400, "1e9", "9300000TB", "-1", "nan", "inf"])
def test_a_size_that_is_none(text: str) -> None:
    from pqcodec.sizes import size_of

    with pytest.raises(InvalidArgument, match=r"--memory .*(is expected|too many)"):
        size_of(text, "--memory")
