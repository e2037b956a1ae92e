"""Sound inputs that everything begins with."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .base import FOLDER
from .shapes import _compact, packed
from .targets import CHUNK, _open_pqkv, scratch


def gaussian(*shape: int, seed: int = 0, dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def seeds(name: str) -> dict[str, bytes]:
    """Sound inputs of a target, small ones, that show every part of the format."""
    return _SEEDS[name]()


def _stream_seeds() -> dict[str, bytes]:
    import torch
    from spec_vectors import BOOKS

    import pqcodec
    from pqcodec import Rope

    def coded(x: Any, preset: str = "pq2", **options: Any) -> bytes:
        return pqcodec.encode(x, preset=preset, backend="reference", **options)

    holes = gaussian(2, 9, 16, seed=3, dtype=np.float32)
    holes[1, 5, 2], holes[0, 3, 1] = np.nan, np.inf
    rope, turned = Rope(theta=100.0, dim=8), Rope(theta=100.0, style="interleaved", first_position=1 << 61)
    everywhere = {"center": "rope", "rope": rope, "exact_tokens": 1, "nonfinite": "exact", "chunk_tokens": 5}
    return {
        "all-sections.pqs": coded(holes, **everywhere),
        "bfloat16-mean.pqs": coded(torch.from_numpy(gaussian(2, 5, 20)).bfloat16(), "pq6", center="mean"),
        "basis.pqs": coded(gaussian(2, 5, 8), "q8_0", basis=3, center="mean"),
        "blocks.pqs": coded(gaussian(2, 5, 16), "int4", block_basis=True),
        "channels.pqs": coded(gaussian(2, 5, 20), "pq2", channels=[[0, 5, 19], [1, 2, 3]]),
        "before-rope.pqs": coded(gaussian(2, 5, 20), "int4", center="mean", rope=Rope(theta=100.0, dim=8), before_rope=True),
        "blocks-of-one-token.pqs": coded(gaussian(1, 7, 16), "pq2.5", chunk_tokens=1, seed=2**64 - 1),
        "empty-mean.pqs": coded(np.zeros((2, 0, 16), np.float16), center="mean"),
        "exact-last.pqs": coded(gaussian(2, 7, 16), center="mean", exact_tokens=1, exact_last=2, chunk_tokens=3),
        "exact-throughout.pqs": coded(gaussian(2, 3, 8), exact_tokens=9),
        "head-dim-1.pqs": coded(gaussian(3, 1, dtype=np.float32), "pq4"),
        "joined.pqs": coded(gaussian(2, 3, 5, 8), "quad2", join_heads=True, center="mean", exact_tokens=1, chunk_tokens=3),
        "keep-bitmap.pqs": coded(gaussian(2, 40, 16), keep=[list(range(0, 40, 2)), list(range(20))], **everywhere),
        "keep-few.pqs": coded(gaussian(2, 99, 20), "wu33", center="mean", keep=[1, 98]),
        "no-leading-index.pqs": coded(np.zeros((0, 4, 16), np.float32)),
        "paper-100.pqs": coded(1e-30 * gaussian(2, 100, dtype=np.float32), "paper", center="mean"),
        "quads-36.pqs": coded(gaussian(2, 7, 36), "quad2.25", chunk_tokens=3),
        "quads-mean.pqs": coded(gaussian(3, 5, 64), "quad3", center="mean", exact_tokens=1, effort="best"),
        "rope-interleaved.pqs": coded(gaussian(2, 4, 32), "pq3", center="rope", rope=turned),
        "split-576.pqs": coded(gaussian(2, 576), "pq5"),
        "pairs-20.pqs": coded(gaussian(2, 5, 20), "wu33", center="mean", exact_tokens=1),
        "scalar-20.pqs": coded(gaussian(2, 5, 20), "int4", nonfinite="exact"),
        "levels-20.pqs": coded(gaussian(2, 5, 20), "nuq2", levels=(-1, -0.25, 0.25, 1)),
        "sketch-20.pqs": coded(gaussian(2, 5, 20), "qjl-outliers", nonfinite="exact"),
        "outliers-20.pqs": coded(gaussian(2, 5, 20), "kvquant2", levels=(-1, -0.25, 0.25, 1)),
        "residual-16.pqs": coded(gaussian(2, 5, 16), "rvq2", codebooks=BOOKS),
        "vector.pqs": coded(gaussian(128), "pq3.5"),
        "zeros.pqs": coded(np.zeros((1, 1, 1, 1, 1, 1, 2, 16), np.float16)),
    }


def _pqkv_seeds() -> dict[str, bytes]:
    import torch
    from spec_vectors import BOOKS

    from pqcodec import BasisTable, LevelTable, RangeTable
    from pqcodec.formats import PQKVWriter

    def written(metadata: Any = None, tensors: Any = (), exact: Any = ()) -> bytes:
        file = io.BytesIO()
        with PQKVWriter(file, metadata) as writer:
            for i, (x, options) in enumerate(tensors):
                writer.add(f"layers.{i}.key", x, layer=i, role="key", backend="reference", **options)
            for i, x in enumerate(exact):
                writer.add_exact(f"exact.{i}", x)
        return file.getvalue()

    basis, fields = BasisTable(np.eye(16)[:6]), RangeTable(np.ones((2, 2, 1)), width=6, channels=32)
    kinds = [torch.ones(2).to(getattr(torch, name)) for name in ("bfloat16", "float8_e4m3fn", "bool", "complex64", "uint16")]
    two = [(gaussian(2, 6, 16), {"preset": "pq2"}), (gaussian(16, dtype=np.float32), {"preset": "paper", "center": "mean"})]
    whole, ends = grown_pqkv()
    return {
        "bare.pqkv": written(),
        "exact.pqkv": written(None, exact=[*kinds, np.array(2.5), np.zeros((0, 3)), np.arange(6).reshape(2, 3)]),
        "grown.pqkv": whole,
        "metadata.pqkv": written({"a": [1, None, {"b": "\u00e9"}], "c": 1.5}),
        "older.pqkv": whole[: ends[0]],
        "sealed.pqkv": whole,  # with seals, which the seeds of before lack
        "torn.pqkv": whole[: ends[1] + 40],
        "two-coded.pqkv": written({}, two),
        "tables.pqkv": written({}, 2 * [(gaussian(2, 6, 16), {"preset": "nuq2", "levels": LevelTable((-1, -0.25, 0.25, 1))})]),
        "shared.pqkv": written({}, [(gaussian(2, 6, 16), {"preset": "int4", "basis": basis, "ranges": fields})]),
        "vectors.pqkv": written({}, [(gaussian(2, 6, 16), {"preset": "rvq2", "codebooks": BOOKS})]),
    }


def grown_pqkv(*cuts: int) -> tuple[bytes, list[int]]:
    """A file of three commits with coded and exact tensors, and where the commits end; ``cuts``: tokens after each."""
    import pqcodec
    from pqcodec.formats import PQKVAppender, PQKVWriter

    path, x, ends = scratch().with_suffix(".pqkv"), gaussian(2, 11, 16), []
    first, second, third = cuts or (4, 5, 11)
    coded: dict[str, Any] = {"preset": "pq2", "backend": "reference"}
    with PQKVWriter(path, {"m": 1}) as writer:
        rope = pqcodec.Rope(theta=100.0)
        writer.add("k", x[:, :first], role="key", layer=0, exact_tokens=1, center="rope", rope=rope, **coded)
        writer.add_exact("n", np.arange(3))
    ends.append(path.stat().st_size)
    for begin, end in ((first, second), (second, third)):
        with PQKVAppender(path) as writer:
            writer.extend("k", x[:, begin:end], center=None, **coded)
            writer.add_exact(f"n{end}", x[0, :2])
        ends.append(path.stat().st_size)
    return path.read_bytes(), ends


def _safetensors_seeds() -> dict[str, bytes]:
    import torch

    from pqcodec.formats import containers
    from pqcodec.formats.cache import save_safetensors
    from pqcodec.formats.containers.writer import pieces_of

    def saved(tensors: Any, **options: Any) -> bytes:
        save_safetensors(scratch(), tensors, preset="pq2", exact_tokens=2, backend="reference", **options)
        return scratch().read_bytes()

    halves = {name: torch.ones(2, 2).to(getattr(torch, name)) for name in ("bfloat16", "float8_e5m2", "bool", "complex64")}
    containers.write(scratch(), pieces_of(_open_pqkv(grown_pqkv()[0])), {}, to="safetensors")
    grown = scratch().read_bytes()
    return {
        "cache.safetensors": saved(
            {
                "layers.0.key": gaussian(2, 9, 16),
                "layers.0.value": gaussian(2, 9, 16, seed=1),
                "norm": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16),
                "positions": np.arange(9),
            },
            metadata={"model": "tiny"},
        ),
        "empty-tensors.safetensors": saved({"layers.0.key": gaussian(0, 5, 16), "none": np.zeros((0, 4)), "one": np.ones(())}),
        "exact.safetensors": saved(halves),
        "grown.safetensors": grown,
        "nothing.safetensors": saved({}),
        "sealed.safetensors": grown,  # with order seals, which the seeds of before lack
        "of-torch.safetensors": saved([(torch.ones(1, 2, 3, 8).bfloat16(), torch.zeros(1, 2, 3, 8).bfloat16())]),
    }


def _plain_seeds() -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    def npy(x: np.ndarray, version: Any = None) -> bytes:
        file = io.BytesIO()
        np.lib.format.write_array(file, x, version)
        return file.getvalue()

    def npz(how: int) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, x in (("a", gaussian(3, 4)), ("b/c", np.arange(6)), ("d", np.zeros((40, 8), np.float32))):
                archive.writestr(zipfile.ZipInfo(name + ".npy"), npy(x), how)
        return file.getvalue()

    names = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "bool", "int8", "uint16", "uint32", "int64", "float64", "complex64")
    return {
        "big-endian.npy": npy(np.arange(6, dtype=">f4").reshape(2, 3)),
        "bzip2.npz": npz(zipfile.ZIP_BZIP2),
        "deflated.npz": npz(zipfile.ZIP_DEFLATED),
        "fortran.npy": npy(np.asfortranarray(gaussian(3, 4))),
        "dtypes.safetensors": save({name: torch.ones(2).to(getattr(torch, name)) for name in names}, {"a": "b"}),
        "lzma.npz": npz(zipfile.ZIP_LZMA),
        "nothing.npy": npy(np.zeros((0, 4))),
        "nothing.npz": b"PK\5\6" + bytes(18),
        "numbers.safetensors": save({"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(1.5), "c": torch.zeros(0, 2)}),
        "records.npy": npy(np.zeros(2, [("a", "<f2"), ("b", "<i4", (2,))])),
        "scalar.npy": npy(np.array(1.5), (2, 0)),
        "stored.npz": npz(zipfile.ZIP_STORED),
    }


def _zarr_seeds() -> dict[str, bytes]:
    import pqcodec
    from pqcodec import Rope

    x, holes = gaussian(*CHUNK), gaussian(*CHUNK, seed=3)
    holes[1, 5, 2] = np.nan
    sides: dict[str, Any] = {"center": "rope", "rope": Rope(theta=100.0), "exact_tokens": 2, "nonfinite": "exact"}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "all-sections.pqs": (holes, {"chunk_tokens": 4, **sides}),
        "bare.pqs": (x, {}),
        "blocks.pqs": (x, {"chunk_tokens": 3, "preset": "pq4"}),
        "exact-throughout.pqs": (x, {"exact_tokens": 9}),
        "few-tokens.pqs": (x[:, :4], {"center": "mean", "chunk_tokens": 2}),
        "float32.pqs": (x.astype(np.float32), {"chunk_tokens": 5, "preset": "paper"}),
        "no-tokens.pqs": (x[:, :0], {"center": "mean"}),
        "of-another-array.pqs": (x[:, :, :8], {}),
    }
    return {name: pqcodec.encode(x, **{"preset": "pq2", "backend": "reference"} | how) for name, (x, how) in kinds.items()}


def _store_seeds() -> dict[str, bytes]:
    import torch
    import zarr
    from zarr.storage import MemoryStore

    from pqcodec.formats.cache import save_zarr
    from pqcodec.formats.containers.writer import pieces_of
    from pqcodec.formats.containers.zarr.writer import write_pieces

    def small(objects: dict[str, Any]) -> bytes:
        raw = {key: value.to_bytes() for key, value in objects.items()}
        return packed({key: _compact(json.loads(x)).encode() if key.endswith(".json") else x for key, x in raw.items()})

    def saved(layers: Any, **options: Any) -> bytes:
        objects: dict[str, Any] = {}
        save_zarr(MemoryStore(objects), layers, preset="pq2", backend="reference", **options)
        return small(objects)

    def moved(file: bytes, *names: str, **options: Any) -> bytes:
        objects: dict[str, Any] = {}
        pieces = [piece for piece in pieces_of(_open_pqkv(file)) if piece.name in names]
        write_pieces(MemoryStore(objects), pieces, {"m": 1}, **options)
        return small(objects)

    x, halves = gaussian(1, 5, 8), torch.ones(1, 3, 8).bfloat16()
    foreign: dict[str, Any] = {}
    zarr.create_group(MemoryStore(foreign), attributes={"a": 1})
    return {
        "bfloat16.store": saved([(halves, halves)], metadata={"a": "\u00e9"}),
        "chunks.store": moved(grown_pqkv(4, 8, 11)[0], "k", "n11"),
        "exact.store": moved(seeds("pqkv")["exact.pqkv"], "exact.0", "exact.5", "exact.7"),
        "foreign.store": small(foreign),
        "grown.store": moved(grown_pqkv()[0], "k", "n5"),
        "no-tokens.store": saved([(x[:, :0], x[:, :0])]),
        "nothing.store": saved([]),
        "sealed.store": moved(grown_pqkv(4, 8, 11)[0], "k", "n11"),  # with order seals, which the seeds of before lack
        "shards.store": moved(grown_pqkv(4, 8, 11)[0], "k", chunks_per_shard=2),
    }


_SEEDS = {
    "header": _stream_seeds,
    "stream": _stream_seeds,
    "pqkv": _pqkv_seeds,
    "safetensors": _safetensors_seeds,
    "plain": _plain_seeds,
    "zarr": _zarr_seeds,
    "zarr-cache": _store_seeds,
}


def folders(name: str) -> list[Path]:
    """Where inputs of a target are kept beside the tests."""
    return [folder for folder in (FOLDER / name, FOLDER / "found" / name) if folder.is_dir()]


def corpus(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for folder in folders(name) for path in sorted(folder.iterdir())}
