"""Law: one block of a prefix as a .pqkv file (SPEC IV.3): its tokens, its part of each layer, and its row of the index.

Tensors of one kind (path, preset, RoPE, shape, dtype) are stacked over the layers, so that a block is a few long streams
instead of two short ones a layer. They decode straight into the memory of the cache's layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec.backends import on_device
from pqcodec.errors import CorruptStream, UnsupportedStream
from pqcodec.formats.containers.pqkv.file import PQKVFile, write_pieces
from pqcodec.formats.containers.reader import LAYOUT
from pqcodec.formats.containers.writer import Piece
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.plain.documents import is_format
from pqcodec.formats.plain.in_memory import InMemory
from pqcodec.formats.plain.numbers import dtype_name
from pqcodec.formats.policy.names import TensorRole
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.formats.store.index import Row, problem_of
from pqcodec.formats.store.keys import is_keyed, unknown
from pqcodec.stages.centre import Rope
from pqcodec.stream.header import DTYPE_CODES, read_header
from pqcodec.stream.source import MemorySource, Source
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import device_type, is_torch

KEY = "prefix.block"  # key of the file's metadata
FORMAT = 1
TOKENS = "tokens"  # name of the exact tensor of token ids, or of a tenant's marks (``keys.Chain.marks``)
PART_BYTES = 1 << 24  # of a stack, allocated at once: malloc reuses freed memory up to this size, without new zeroed pages
EXACT = "exact"  # the preset of a store that keeps all numbers as they are
Choice = tuple[str, str | None]  # preset and RoPE pairing


# -- how layers are encoded --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BlockPresets:
    """Preset and RoPE pairing of each (layer, path) of a block; all blocks of a prefix use those of the first."""

    choices: Mapping[tuple[int, str], Choice]

    @classmethod
    def of(cls, state: tc.CacheState, config: Any, recipe: Recipe | None) -> BlockPresets:
        """The presets for a cache, from its energies; without a recipe all tensors are exact."""
        if recipe is None:
            return cls({})
        pairings = tc.pairings(config, state)
        by_name = recipe.presets(*tc.tensors_of(config, state, pairings))
        choices = {}
        for prefix, index, layer in state.layers():
            for path in layer.tensors:
                if f"{prefix}.{tc.ROLES.get(path)}" in by_name:
                    choices[index, path] = (by_name[f"{prefix}.{tc.ROLES[path]}"], pairings.get(f"{prefix}.{path}"))
        return cls(choices)

    @classmethod
    def in_file(cls, groups: Sequence[Mapping[str, Any]]) -> BlockPresets:
        """The presets of a block that was written, from ``groups`` in its metadata; raises KeyError or TypeError."""
        return cls({(layer, g["path"]): (g["preset"], g["pairing"]) for g in groups for layer in g["layers"]})

    def at(self, preset: str) -> BlockPresets:
        """The same pairings, with all tensors at one preset."""
        return BlockPresets({key: (preset, pairing) for key, (_, pairing) in self.choices.items()})


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose tensors at one path are stacked into one: [layers, batch, heads, tokens, head_dim]."""

    path: str  # of the attribute: "keys" or "values"
    preset: str
    pairing: str | None  # of channels under RoPE; None: no RoPE
    layers: tuple[int, ...]
    state: bool = False  # the tensor is of the whole prefix, not of the block's tokens


def _groups(layers: Sequence[tc.LayerState], presets: BlockPresets) -> list[LayerGroup]:
    """The groups of layers whose keys or values are of one kind and on one device."""
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        for path, tensor in layer.tensors.items():
            if path in tc.ROLES and tensor.ndim > 1:
                preset, pairing = presets.choices.get((index, path), (EXACT, None))
                extent = (not layer.cuttable, layer.tokens - layer.kept)
                kind = (path, preset, pairing, *extent, tuple(tensor.shape), tensor.dtype, tensor.device)
                found.setdefault(kind, []).append(index)
    return [LayerGroup(path, preset, pairing, tuple(at), state) for (path, preset, pairing, state, *_), at in found.items()]


# -- writing -----------------------------------------------------------------------------------------------------
def write_block(
    path: str,
    row: Row,
    layers: Sequence[tc.LayerState],
    presets: BlockPresets,
    rope_of: Callable[[int, int, str | None], Rope | None],
    recipe: Recipe,
    about: dict[str, Any],
) -> int:
    """Write a block's file and return its size in bytes.

    ``row``: the block's row, still without a size; ``layers``: each layer's part of the block; ``rope_of``: the RoPE of a
    layer's keys, from its number, head_dim and a pairing of channels; ``about``: ``label`` and ``settings`` of its root, and
    ``marked``, whether its tokens are a tenant's marks. Raises OSError, or as ``Recipe.pieces``.
    """
    import torch

    groups = {f"{number}.{tc.ROLES[group.path]}": group for number, group in enumerate(_groups(layers, presets))}
    pieces: list[Piece] = []
    for name, group in groups.items():
        of = [layers[index] for index in group.layers]
        stacked = torch.stack([layer.tensors[group.path] for layer in of])
        if group.preset == EXACT:
            pieces.append(_exact(name, stacked, None, tc.ROLES[group.path]))
            continue
        rope = rope_of(group.layers[0], int(stacked.shape[-1]), group.pairing)
        first = of[0].tokens - of[0].kept if group.state else row.start
        tensor = TensorRole(tc.ROLES[group.path], None, rope, first)
        cooked = replace(recipe, preset=group.preset, share_bits=False)
        pieces += cooked.pieces(InMemory({name: stacked}), {name: tensor})
    coded = {(index, group.path) for group in groups.values() for index in group.layers}
    for index, layer in enumerate(layers):
        rest = {path: x for path, x in layer.tensors.items() if (index, path) not in coded}
        pieces += [_exact(f"layers.{index}.{path}", x, index) for path, x in rest.items()]
    pieces.append(_exact(TOKENS, row.tokens, None))
    kinds = [{"class": layer.kind, "fields": dict(layer.fields), "tensors": list(layer.tensors)} for layer in layers]
    distinct = [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    metadata = {
        "format": FORMAT,
        **{key: getattr(row, key).hex() for key in ("name", "parent", "root")},
        **{key: getattr(row, key) for key in ("start", "whole", "stateful")},
        **about,
        "kinds": distinct,
        "layers": [distinct.index(kind) for kind in kinds],
        "groups": [{"name": name, **vars(group)} for name, group in groups.items()],
    }
    return write_pieces(path, pieces, {KEY: metadata})


def _exact(name: str, x: Any, layer: int | None, role: str = "other") -> Piece:
    return Piece(name, False, layer, role, tuple(int(n) for n in x.shape), dtype_name(x), LAYOUT, lambda: x)


# -- reading -----------------------------------------------------------------------------------------------------
def block_metadata(file: PQKVFile) -> dict[str, Any]:
    """The metadata of a block's file under ``KEY`` (SPEC IV.3); raises CorruptStream or UnsupportedStream."""
    metadata = file.metadata.get(KEY)
    if not isinstance(metadata, dict):
        raise CorruptStream(f"{file.label}: is no block of a prefix store")
    if not is_format(metadata.get("format"), FORMAT):
        raise UnsupportedStream(f"{file.label}: a block of format {metadata.get('format')!r}; install a newer pqcodec")
    return metadata


def row_in(file: PQKVFile, at: str) -> tuple[Row, dict[str, Any]]:
    """The row of the block in a file called ``at`` in the store, and label and settings of its root; raises CorruptStream."""
    metadata = block_metadata(file)
    try:
        row = replace(row_of(metadata, tokens_of(metadata, file.decode(TOKENS))), file=at, size=file.size)
        return row, {key: metadata[key] for key in ("label", "settings")}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptStream(f"{file.label}: does not say which block it is ({error!r})") from error


def row_of(metadata: Mapping[str, Any], tokens: Any) -> Row:
    """The row of a block, still without a file, from its metadata and tokens; raises KeyError, TypeError or ValueError."""
    name, parent, root = (bytes.fromhex(metadata[key]) for key in ("name", "parent", "root"))
    start, whole, stateful = (metadata[key] for key in ("start", "whole", "stateful"))
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype != np.int64:
        raise ValueError("its tokens are not those of a block")
    if type(whole) is not bool or type(stateful) is not bool:
        raise TypeError("whole and stateful are two truths")
    if not isinstance(metadata["label"], str) or not isinstance(metadata["settings"], dict):
        raise TypeError("label and settings are a string and an object")
    metadata["label"].encode()  # raises ValueError for half of a surrogate pair
    row = Row(name, parent, root, start, tokens.astype("<i8"), whole, stateful, "", 0)
    if problem := problem_of(row):
        raise ValueError(problem)
    return row


def tokens_of(metadata: Mapping[str, Any], stored: Any) -> np.ndarray:
    """A block's tokens from the tensor in its file; -1 each where an older version stored the token ids of a tenant."""
    tokens = np.asarray(stored)
    hidden = "marked" not in metadata and is_keyed(bytes.fromhex(metadata["root"]), metadata["settings"])
    return unknown(tokens) if hidden else tokens


def check_same_block(file: PQKVFile, metadata: Mapping[str, Any], row: Row) -> None:
    """Raises CorruptStream where a file with such metadata holds another block than that of ``row``; KeyError, ValueError."""
    told = tuple(metadata[key] for key in ("name", "parent", "start", "whole", "stateful"))
    same = told == (row.name.hex(), row.parent.hex(), row.start, row.whole, row.stateful)
    if not same or not np.array_equal(tokens_of(metadata, file.decode(TOKENS)), row.tokens):
        raise CorruptStream(f"{file.label}: is another block than {row.name.hex()[:16]} at token {row.start}")


@dataclass(frozen=True)
class Decoded:
    """What was decoded from a block beside the tensors in the stacks; tensors by (layer, path)."""

    count: int  # tokens
    kinds: list[tc.LayerState]  # each layer, without tensors
    pieces: dict[tuple[int, str], Any]  # exact tensors along the tokens, to be concatenated
    state: dict[tuple[int, str], Any]  # tensors of the prefix as a whole


class Assembly:
    """Layers of a cache of ``tokens`` tokens into which blocks are decoded one after the other.

    Call ``lay_out`` for the first block, ``decode`` for each, ``accept`` with the results in order, then ``finish`` and
    ``state``. ``together``: whole streams are left to ``finish``, which decodes all of them at once.
    """

    def __init__(self, tokens: int, device: Any, backend: str, together: bool = True) -> None:
        self._total, self._device, self._backend = tokens, device, backend
        self._on_device = on_device(backend, device_type(device or "cpu"))
        self._waiting: list[tuple[Source, Any, int]] | None = [] if together else None
        self._stacks: dict[tuple[str, tuple[int, ...]], tuple[Any, arrays.Room]] = {}  # by path and layers
        self._slices: dict[tuple[int, str], Any] = {}  # each layer's slice of a stack
        self._accepted: list[Decoded] = []

    @property
    def tokens(self) -> int:
        """Tokens of the blocks that were accepted."""
        return sum(decoded.count for decoded in self._accepted)

    def lay_out(self, file: PQKVFile, row: Row) -> None:
        """Allocate the stacks for all blocks, from the metadata of the first one; raises CorruptStream."""
        try:
            for name, group in groups_in(block_metadata(file)).items():
                entry = file.entry(name)
                if group.state:
                    continue
                if len(entry.shape) < 3 or (entry.shape[0], entry.shape[-2]) != (len(group.layers), len(row.tokens)):
                    expected = f"{len(group.layers)} layers and {len(row.tokens)} tokens are expected"
                    raise CorruptStream(f"{file.label}: {name!r} is {entry.shape}, {expected}")
                stack = self._stack((*entry.shape[:-2], self._total, entry.shape[-1]), entry.dtype)
                self._stacks[group.path, group.layers] = stack, arrays.room_of(stack)
                self._slices |= self._each(group, stack)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptStream(f"{file.label}: its metadata does not describe a block ({error!r})") from error

    def accept(self, decoded: Decoded) -> None:
        """Append a block's result; raises CorruptStream where it does not continue the blocks before."""
        before = self._accepted[-1] if self._accepted else decoded
        same = len(decoded.kinds) == len(before.kinds) and decoded.pieces.keys() == before.pieces.keys()
        if not same or not all(tc.continues(at[1], x, before.pieces[at]) for at, x in decoded.pieces.items()):
            raise CorruptStream("its layers do not continue the blocks before")
        self._accepted.append(decoded)

    def decode(self, file: PQKVFile, row: Row, count: int) -> Decoded:
        """Decode the first ``count`` tokens of a block into the stacks; raises CorruptStream, also for another block's file."""
        metadata = block_metadata(file)
        try:
            check_same_block(file, metadata, row)
            return self._decoded(file, metadata, row, count)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise CorruptStream(f"{file.label}: its metadata does not describe a block ({error!r})") from error

    def _decoded(self, file: PQKVFile, metadata: dict[str, Any], row: Row, count: int) -> Decoded:
        kinds = [tc.LayerState(kind["class"], {}, kind["fields"]) for kind in metadata["kinds"]]
        tc.check_layers(kinds, [kind["tensors"] for kind in metadata["kinds"]])
        layers = [kinds[number] for number in metadata["layers"]]
        groups = groups_in(metadata)
        if any(group.state == layers[layer].cuttable for group in groups.values() for layer in group.layers):
            raise ValueError("a group's state is not that of its layers")
        found = Decoded(count, layers, {}, {})
        for name, group in groups.items():
            if group.state:
                found.state.update(self._each(group, file.decode(name, device=self._device, backend=self._backend)))
            else:
                self._fill(file, name, group, row, count)
        coded = {(layer, group.path) for group in groups.values() for layer in group.layers}
        for index, number in enumerate(metadata["layers"]):
            for path in metadata["kinds"][number]["tensors"]:
                if (index, path) in coded:
                    continue
                x = file.decode(f"layers.{index}.{path}", device=self._device)
                if layers[index].cuttable:
                    if tc.tokens_along(path, x) != len(row.tokens):
                        raise ValueError(f"{path} of layer {index} is {tuple(x.shape)}")
                    found.pieces[index, path] = tc.along(path, x, 0, count)
                else:
                    found.state[index, path] = x
        return found

    def _stack(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Memory for the layers of a group: one tensor on a GPU, a list of parts of a few layers on the CPU."""
        import torch

        kind = getattr(torch, dtype)
        if self._on_device or dtype not in DTYPE_CODES or device_type(self._device or "cpu") != "cpu":
            return torch.empty(shape, dtype=kind, device=self._device)
        layers = shape[0]
        step = max(1, PART_BYTES // max(1, math.prod(shape[1:]) * kind.itemsize))
        sizes = [min(step, layers - at) for at in range(0, layers, step)]
        return [arrays.empty((size, *shape[1:]), DTYPE_CODES[dtype], numpy=False)[0] for size in sizes]

    def _each(self, group: LayerGroup, stacked: Any) -> dict[tuple[int, str], Any]:
        """The tensor of each layer in a group's stack, by (layer, path)."""
        rows = chain.from_iterable(stacked) if isinstance(stacked, list) else stacked
        return {(layer, group.path): x for layer, x in zip(group.layers, rows, strict=True)}

    def _fill(self, file: PQKVFile, name: str, group: LayerGroup, row: Row, count: int) -> None:
        """Decode a group's tokens into its stack, or layer by layer where the first block had other groups."""
        span = slice(row.start, row.start + count)
        tokens = None if count == len(row.tokens) else (0, count)
        stack, room = self._stacks.get((group.path, group.layers), (None, None))
        if room is not None and tokens is None and self._waiting is not None:
            stream = file.bare_stream(name)
            if (
                stream is not None
                and arrays.holds(room, (header := read_header(stream)).shape, header.dtype, row.start)
                and header.keep is None
            ):
                self._waiting.append((MemorySource(stream.read(0, stream.size), header), stack, row.start))  # outlives the file
                return
        if file.entry(name).coded and file.inspect(name).kept_of is not None:
            raise CorruptStream(f"{file.label}: {name} holds only some tokens, and blocks hold all of theirs")
        if stack is not None and is_torch(stack):
            file.decode(name, tokens=tokens, backend=self._backend, out=stack[..., span, :])
            return
        stacked = file.decode(name, tokens=tokens, device=self._device, backend=self._backend)
        for (layer, path), x in self._each(group, stacked).items():
            target = self._slices.get((layer, path))
            if target is None or target[..., span, :].shape != x.shape or target.dtype != x.dtype:
                raise CorruptStream(f"{file.label}: {path} of layer {layer} do not continue the blocks before")
            target[..., span, :] = x

    def finish(self) -> None:
        """Decode the streams that wait; raises CorruptStream, without naming the block, if one of them is damaged."""
        if not self._waiting:
            return
        sources, outs, starts = zip(*self._waiting, strict=True)
        codec.decode_together(sources, outs, starts, self._backend)
        self._waiting.clear()

    def state(self) -> tc.CacheState:
        """The state of a cache of the accepted blocks."""
        last, tokens = self._accepted[-1], self.tokens
        tensors: list[dict[str, Any]] = [{} for _ in last.kinds]
        for (layer, path), x in self._slices.items():
            tensors[layer][path] = x[..., :tokens, :]
        for layer, path in last.pieces:
            tensors[layer][path] = tc.joined(path, [decoded.pieces[layer, path] for decoded in self._accepted])
        for (layer, path), x in last.state.items():
            tensors[layer][path] = x
        layers = [replace(kind, tensors=of) for kind, of in zip(last.kinds, tensors, strict=True)]
        return tc.CacheState("DynamicCache", {"": layers})


def groups_in(metadata: Mapping[str, Any]) -> dict[str, LayerGroup]:
    """The groups in a block's metadata by the names of their tensors; raises KeyError, TypeError or ValueError."""
    found = {
        g["name"]: LayerGroup(g["path"], g["preset"], g["pairing"], tuple(g["layers"]), g["state"]) for g in metadata["groups"]
    }
    paths = [metadata["kinds"][number]["tensors"] for number in metadata["layers"]]
    for group in found.values():
        there = all(layer in range(len(paths)) and group.path in paths[layer] for layer in group.layers)
        if not there or type(group.state) is not bool:
            raise ValueError(f"a group of {group.path!r:.60} in layers {group.layers!r:.60}")
    return found
