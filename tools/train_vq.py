"""Law: ``pqcodec train-vq``: codebooks of residual VQ from files of a model's own keys and values, a table for each layer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.completion import backends
from pqcodec.tools.files import ENCODED, PLAIN, check_output, input_file, inputs, make_parents
from pqcodec.tools.jobs import Show, report, run
from pqcodec.tools.outcome import bytes_text
from pqcodec.tools.shared_tables import Key, table_file

if TYPE_CHECKING:
    from pqcodec.stream.tables import VectorTable

_HELD_OUT = 10  # one of so many tokens, the last ones of each tensor, on which the error is measured
_MOST_HELD_OUT = 512  # tokens of a tensor


def train_vq(
    sources: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files of keys and values, plain or encoded, folders or patterns.")
    ],
    target: Annotated[str, typer.Argument(metavar="FOLDER", help="Where key.0.pqt, value.0.pqt and so on are written.")],
    stages: Annotated[int, typer.Option(help="Codebooks of a table, 1 to 8: rvq1 .. rvq8 take the first ones.")] = 8,
    entries: Annotated[int, typer.Option(help="Entries of a codebook: 16, 32 ... 4096.")] = 2048,
    group: Annotated[int, typer.Option(help="Channels that an entry stands for: 8, 16, 32 or 64.")] = 32,
    pairing: Annotated[
        str, typer.Option(help="Channels that the model's RoPE pairs, which keys' strided groups go by: half or interleaved.")
    ] = "half",
    rope_dim: Annotated[int | None, typer.Option(help="Channels that RoPE turns (default: all).")] = None,
    neighbours: Annotated[
        bool, typer.Option("--neighbours", help="Groups of neighbouring channels for keys, too, instead of strided ones.")
    ] = False,
    together: Annotated[
        bool, typer.Option("--together", help="One table for the keys of all layers, and one for their values.")
    ] = False,
    least: Annotated[float, typer.Option(help="Groups of channels for each entry that there have to be.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the order in which vectors are taken.")] = 0,
    keys: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Tensors that are keys (default: by naming conventions).")
    ] = None,
    values: Annotated[str | None, typer.Option(metavar="REGEX", help="Tensors that are values (default: likewise).")] = None,
    backend: Annotated[str, typer.Option(help="auto, cpu or reference.", autocompletion=backends)] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Train codebooks for the presets rvq1 to rvq8 on a model's own keys and values.

    They are used by `pqcodec encode --preset rvq8 --table FOLDER`. Give caches of texts like those to come, a hundred
    thousand tokens a layer, or several thousand at the least; the error is that of the last tenth of each tensor's tokens,
    which are not trained on.
    """
    listed = inputs(sources, (*PLAIN, *ENCODED), keep_going=False)
    found: dict[Key, list[Any]] = {}
    for item in listed.todo:
        with input_file(item.path, local=True) as path:
            for key, tensor in _keys_and_values(path, keys, values):
                found.setdefault((key[0], None) if together else key, []).append(tensor)
    if not found:
        raise InvalidArgument("no tensor is a key or a value by name; use --keys and --values")
    paths = {key: os.path.join(target, table_file(key)) for key in sorted(found, key=str)}
    for path in paths.values():
        check_output("", path, force)
    make_parents(os.path.join(target, "key"))
    options = {"stages": stages, "entries": entries, "group": group, "pairing": pairing, "rope_dim": rope_dim}
    options |= {"least": least, "seed": seed, "backend": backend}

    def work(key: Key, show: Show) -> _Outcome:
        return _trained(paths[key], found.pop(key), show, options | {"strided": key[0] == "key" and not neighbours})

    done = run(list(paths), work, lambda key: paths[key], 1, "train", keep_going=False)
    if len(done) == 1 and not as_json:
        print(done[0].outcome.line())
    report(done, _Outcome.COLUMNS, len(done) > 1, as_json)


def _keys_and_values(path: str, keys: str | None, values: str | None) -> Iterator[tuple[Key, Any]]:
    """Keys and values of a plain or an encoded file, each with its role and layer; raises as opening the file does."""
    from pqcodec.formats.containers.kinds import kind_of, open_encoded
    from pqcodec.formats.plain.files import holds_streams, open_tensors
    from pqcodec.formats.policy.names import role_of

    kind = kind_of(path)
    encoded = kind in ("pqkv", "zarr") or (kind == "safetensors" and holds_streams(path))
    opened: Any = open_encoded(path) if encoded else open_tensors(path)
    with opened as file:
        for name in file.names:
            tensor = role_of(name, keys, values)
            if tensor.role != "other":
                yield (tensor.role, tensor.layer), file.decode(name) if encoded else file.read(name)


def _trained(path: str, tensors: list[Any], show: Show, options: dict[str, Any]) -> _Outcome:
    """Train a table on all but the last tokens of tensors, measure its error on these, and write it."""
    from pqcodec.formats.places.atomic import replacing
    from pqcodec.training import train_vq as train

    start = time.perf_counter()
    held = [min(x.shape[-2] // _HELD_OUT, _MOST_HELD_OUT) for x in tensors]
    seen = [x[..., : x.shape[-2] - count, :] for x, count in zip(tensors, held, strict=True)]
    table = train(seen, **options, progress=lambda done, total: show(done / total))
    rel_mse = _error([x[..., x.shape[-2] - count :, :] for x, count in zip(tensors, held, strict=True)], table)
    with replacing(path) as part:
        part.write_bytes(table.to_bytes())
    return _Outcome(path, table.name, table.content, len(table.to_bytes()), rel_mse, time.perf_counter() - start)


def _error(tensors: list[Any], table: VectorTable) -> float | None:
    """relMSE of tensors that a table codes; None without a number."""
    from pqcodec import codec
    from pqcodec.formats.policy.measure import Error, error_of
    from pqcodec.stream.source import MemorySource

    error = Error()
    for x in tensors:
        stream = codec.encode(x, preset=f"rvq{table.vectors.stages}", codebooks=table, nonfinite="exact")
        error += error_of(x, codec.given_tables(MemorySource(stream), table), sample=False)
    return error.rel_mse


@dataclass(frozen=True)
class _Outcome:
    """The outcome of ``train-vq`` for a table."""

    file: str
    name: str
    content: str
    size: int
    rel_mse: float | None
    seconds: float

    COLUMNS = ("relMSE", "seconds", "bytes", "SHA-256")
    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "table": self.name,
            "content": self.content,
            "bytes": self.size,
            "rel_mse": self.rel_mse,
            "seconds": self.seconds,
        }

    def cells(self) -> list[str]:
        error = "-" if self.rel_mse is None else f"{self.rel_mse:.5f}"
        return [error, f"{self.seconds:.1f}", bytes_text(self.size), self.name[:16]]

    def line(self) -> str:
        error, seconds, size, _ = self.cells()
        return f"{self.file}: {self.content}, {size}; relMSE {error} of tokens that were held out; {seconds} s"
