"""Law: ``pqcodec inspect``: the contents of encoded files, from their headers, as a table of layers or of tensors."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.tools.decode import Sources
from pqcodec.tools.files import ENCODED, Input, input_file, inputs
from pqcodec.tools.jobs import Show, report, run
from pqcodec.tools.outcome import bytes_text, shown
from pqcodec.tools.tables import console, print_table, shortened, table_width

if TYPE_CHECKING:
    from pqcodec.formats.containers.reader import TensorFile
    from pqcodec.stream.tables import SharedTable

PAIR = ("key", "value")
_METADATA_WIDTH = 400  # characters of a value; --json has all of it


def inspect(
    sources: Sources,
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for each tensor, instead of one for each layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what encoded files hold.

    Only headers and means are read. relMSE is what the writer measured; |mean| is the length of what was subtracted, "at" the
    byte at which a tensor begins.
    """
    from pqcodec.formats.containers.kinds import open_encoded

    def work(item: Input, show: Show) -> _Outcome:
        with input_file(item.path) as path, open_encoded(path) as file:
            tensor_list = [_tensor_fields(file, name) for name in file.names]
            whole = {"file": item.path, "file_bytes": file.size, "metadata": file.metadata, "tensors": tensor_list}
            whole["tables"] = [_table_fields(table) for table in file.tables.values()]
        return _Outcome(whole, tensors)

    listed = inputs(sources, ENCODED)
    found = run(listed.items, work, lambda item: item.path, 1, "inspect")
    if not listed.many and not as_json:
        found[0].outcome.print()
    report(found, _Outcome.COLUMNS, listed.many, as_json)


def _table_fields(table: SharedTable) -> dict[str, Any]:
    from pqcodec.stream.tables import LevelTable

    levels = {"levels": table.levels} if isinstance(table, LevelTable) else {}
    return {"name": table.name, "content": table.content, **levels}


def _tensor_fields(file: TensorFile, name: str) -> dict[str, Any]:
    from pqcodec import codec

    entry = file.entry(name)
    fields: dict[str, Any] = {
        "name": name,
        "coded": entry.coded,
        "layer": entry.layer,
        "role": entry.role,
        "shape": entry.shape,
        "dtype": entry.dtype,
        "tensor_bytes": entry.tensor_bytes,
        "at": entry.body_start,
        "bytes": entry.body_bytes,
        "ratio": entry.tensor_bytes / max(entry.body_bytes, 1),
    }
    if entry.coded:
        info, means = file.inspect(name), codec.means(file.stream(name))
        fields |= {"bits_per_coordinate": info.bits_per_coordinate, "rel_mse": entry.rel_mse, "parts": entry.parts}
        fields |= {"tables": info.tables}
        fields |= {"mean_norm": None if means is None or not means.size else float((means**2).sum(-1).mean() ** 0.5)}
        size = info.tensor_bytes  # with the tokens that were not kept
        fields |= {"stream": asdict(info), "tensor_bytes": size, "ratio": size / max(entry.body_bytes, 1)}
    return fields


class _Outcome:
    """The outcome of ``inspect`` for a file."""

    COLUMNS = ("tensors", "layers", "bits/coord", "smaller", "bytes")
    exit_code = 0

    def __init__(self, whole: dict[str, Any], by_tensor: bool) -> None:
        self._whole, self._tensors = whole, whole["tensors"]
        layered = [t for t in self._tensors if t["coded"] and t["layer"] is not None and t["role"] in PAIR]
        found = {(t["layer"], t["role"]): t for t in layered}
        whole_layers = len(found) == len(layered)
        self._cache = found if whole_layers and not by_tensor else {}

    def as_dict(self) -> dict[str, Any]:
        return self._whole

    def cells(self) -> list[str]:
        coded = [t for t in self._tensors if t["coded"]]
        coordinates = sum(t["bytes"] * 8 / t["bits_per_coordinate"] for t in coded if t["bits_per_coordinate"])
        bits = 8 * sum(t["bytes"] for t in coded) / coordinates if coordinates else None
        layers = len({t["layer"] for t in self._tensors if t["layer"] is not None})
        size = self._whole["file_bytes"]
        cells = ["-" if bits is None else f"{bits:.3f}", f"{self._original / max(size, 1):.2f}x", bytes_text(size)]
        return [str(len(self._tensors)), str(layers), *cells]

    @property
    def _original(self) -> int:
        return sum(t["tensor_bytes"] for t in self._tensors)

    def print(self) -> None:
        from rich.text import Text

        out = console()
        whole = self._whole
        size = f"{bytes_text(whole['file_bytes'])}, {len(self._tensors)} tensors of {bytes_text(self._original)}"
        ratio = self._original / max(whole["file_bytes"], 1)
        out.print(Text(f"{shown(whole['file'])}: {size}, {ratio:.2f}x smaller"))
        for key, value in whole["metadata"].items():
            text = value if isinstance(value, str) and value.isprintable() else ascii(value)
            out.print(Text(f"{shown(key)}: {shortened(text, _METADATA_WIDTH)}"))
        for table in whole["tables"]:
            out.print(Text(f"shared table {table['name']}: {table['content']}"))
        needed = {name: None for t in self._tensors if t["coded"] for name in t["tables"]}
        for name in needed.keys() - {table["name"] for table in whole["tables"]}:
            out.print(Text(f"shared table {name}: is needed, and not here"))
        layers = [self._layer(layer) for layer in sorted({layer for layer, _ in self._cache})]
        if layers and table_width(_LAYER_COLUMNS, layers) <= out.width:
            print_table(out, _LAYER_COLUMNS, layers, _LEFT)
        elif layers:  # a row for keys and one for values
            rows = [[str(layer), role, *_coded(t), f"{t['ratio']:.2f}x"] for (layer, role), t in sorted(self._cache.items())]
            print_table(out, ("layer", "role", "preset", *_HALF, "smaller"), rows, _LEFT, _SPARE)
        sketches = {t["stream"]["preset"]: t for t in self._tensors if t["coded"] and t["stream"]["estimate_error"] is not None}
        for preset, t in sketches.items():
            error = f"relMSE of a decoded vector about {t['stream']['estimate_error']:.2g}"
            out.print(Text(f"{preset or t['stream']['coding']}: inner products only, {error}"))
        others = [t for t in self._tensors if self._cache.get((t["layer"], t["role"])) is not t]
        if others:
            print_table(out, _TENSOR_COLUMNS, [_tensor(t) for t in others], _LEFT, _SPARE)

    def _layer(self, layer: int) -> list[str]:
        cells = [str(layer)]
        pair = [self._cache.get((layer, role)) for role in PAIR]
        for t in pair:
            cells += _coded(t) if t else ["-"] * 6
        there = [t for t in pair if t]
        return [*cells, f"{sum(t['tensor_bytes'] for t in there) / max(sum(t['bytes'] for t in there), 1):.2f}x"]


_HALF = ("bits/coord", "bytes", "relMSE", "|mean|", "at")
_LAYER_COLUMNS = ("layer", "key", *_HALF, "value", *_HALF, "smaller")
_TENSOR_COLUMNS = (
    "name",
    "role",
    "layer",
    "shape",
    "dtype",
    "preset",
    "bits/coord",
    "bytes",
    "relMSE",
    "|mean|",
    "at",
    "smaller",
)
_SPARE = ("at", "|mean|", "relMSE")  # left out where the terminal is narrow
_LEFT = ("name", "role", "shape", "dtype", "preset", "key", "value")


def _coded(t: dict[str, Any]) -> list[str]:
    """Cells of a coded tensor: preset, centring and other stages, bits a coordinate, bytes, error, norm of the mean, offset."""
    stream = t["stream"]
    stages = [] if stream["kept_of"] is None else [f"{t['shape'][-2]} of {stream['kept_of']} tokens"]
    stages += ["before rope"] if stream["before_rope"] else []
    stages += [f"{stream['joined_heads']} heads joined"] if stream["joined_heads"] else []
    stages += [f"{stream['width']} {stream['linear']}"] if stream["linear"] else []
    preset = " ".join(filter(None, (stream["preset"] or f"({stream['coding']})", stream["centered"], *stages)))
    error = "-" if t["rel_mse"] is None else f"{t['rel_mse']:.5f}"
    norm = "-" if t["mean_norm"] is None else f"{t['mean_norm']:.3g}"
    return [preset, f"{t['bits_per_coordinate']:.3f}", str(t["bytes"]), error, norm, str(t["at"])]


def _tensor(t: dict[str, Any]) -> list[str]:
    shape = " x ".join(map(str, t["shape"])) or "-"
    about = [t["name"], t["role"], "-" if t["layer"] is None else str(t["layer"]), shape, t["dtype"]]
    how = _coded(t) if t["coded"] else ["exact", "-", str(t["bytes"]), "-", "-", str(t["at"])]
    return [*about, *how, f"{t['ratio']:.2f}x"]
