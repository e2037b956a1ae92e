"""Law: ``pqcodec train-vq``: codebooks of residual VQ from files of a model's own keys and values, a table for each layer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pqcodec.tools.completion import backends
from pqcodec.tools.jobs import Show
from pqcodec.tools.made_tables import (
    AsJson,
    Folder,
    Force,
    Keys,
    Texts,
    Together,
    Values,
    coded_error,
    keys_and_values,
    write_tables,
)
from pqcodec.tools.shared_tables import Key


def train_vq(
    sources: Texts,
    target: Folder,
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
    together: Together = False,
    least: Annotated[float, typer.Option(help="Groups of channels for each entry that there have to be.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the order in which vectors are taken.")] = 0,
    keys: Keys = None,
    values: Values = None,
    backend: Annotated[str, typer.Option(help="auto, cpu or reference.", autocompletion=backends)] = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train codebooks for the presets rvq1 to rvq8 on a model's own keys and values.

    They are used by `pqcodec encode --preset rvq8 --table FOLDER`. Give caches of texts like those to come, a hundred
    thousand tokens a layer, or several thousand at the least; the error is that of the last tenth of each tensor's tokens,
    which are not trained on.
    """
    options: dict[str, Any] = {"stages": stages, "entries": entries, "group": group, "pairing": pairing, "rope_dim": rope_dim}
    options |= {"least": least, "seed": seed, "backend": backend}

    def make(key: Key, tensors: list[Any], show: Show) -> Any:
        from pqcodec.training import train_vq as train

        strided = key[0] == "key" and not neighbours
        return train(tensors, **options, strided=strided, progress=lambda done, total: show(done / total))

    def measure(key: Key, tensors: list[Any], table: Any) -> float | None:
        return coded_error(tensors, preset=f"rvq{table.vectors.stages}", codebooks=table)

    found = keys_and_values(sources, keys, values, together)
    write_tables(found, target, "train", make, measure, force=force, as_json=as_json)
