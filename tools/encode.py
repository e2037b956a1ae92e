"""Law: ``pqcodec encode``: a file of tensors becomes one .pqkv file, tensor by tensor."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.files import STANDARD, check_output, input_file
from pqcodec.tools.outcome import bytes_text, print_json, say, shown
from pqcodec.tools.progress import load_kernels, progress_bar

if TYPE_CHECKING:
    from pqcodec.centre import Rope
    from pqcodec.formats.names import Part
    from pqcodec.formats.tensors import TensorReader

Input = Annotated[str, typer.Argument(metavar="INPUT", help="A .safetensors, .npz or .npy file, or - for stdin.")]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="The .pqkv file to write, or - for stdout.")]


def encode(
    source: Input,
    target: Output,
    preset: Annotated[str, typer.Option(help="pq2, pq2.5, pq3, pq3.5, pq4, pq5, pq6 or paper.")] = "pq3",
    seed: Annotated[int, typer.Option(help="Seed of the random rotation.")] = 0,
    center: Annotated[
        str,
        typer.Option(help="What is subtracted from keys: auto (rope if --rope-theta is given, else mean), none, mean or rope."),
    ] = "auto",
    rope_theta: Annotated[float | None, typer.Option(help="Base of RoPE's frequencies, such as 10000.")] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Channels that RoPE turns (default: all).")] = None,
    rope_style: Annotated[str | None, typer.Option(help="Channels that RoPE pairs: half (default) or interleaved.")] = None,
    rope_first: Annotated[int | None, typer.Option(help="Position of the first token (default 0).")] = None,
    exact_tokens: Annotated[
        int | None, typer.Option(help="First tokens kept exactly (default: 4 of keys and values, 0 of others).")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Tensors that are keys (default: by naming conventions).")
    ] = None,
    values: Annotated[str | None, typer.Option(metavar="REGEX", help="Tensors that are values (default: likewise).")] = None,
    flat: Annotated[
        bool,
        typer.Option("--flat", help="The same preset for every tensor; else keys of high energy get more bits than values."),
    ] = False,
    nonfinite: Annotated[
        str, typer.Option(help="Vectors with NaN or Inf: error, or exact to keep them as they are.")
    ] = "error",
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens under one checksum (default 64).")] = None,
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend.")] = "auto",
    check: Annotated[bool, typer.Option("--check", help="Decode every stream and tell the error.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Encode tensors into a .pqkv file.

    Tensors are [..., tokens, head_dim] of float16, bfloat16 or float32; all others are kept exactly.
    """
    if as_json and target == STANDARD:
        raise InvalidArgument("--json and OUTPUT '-' would both write to stdout; choose one")
    check_output(source, target, force)
    from pqcodec.presets import preset as preset_of

    preset_of(preset)
    rope = _rope(rope_theta, rope_dim, rope_style, rope_first)
    plan = _Plan(preset, _center(center, rope), rope, exact_tokens, flat)
    options = {"seed": seed, "nonfinite": nonfinite, "backend": backend}
    if chunk_tokens is not None:
        options["chunk_tokens"] = chunk_tokens
    with input_file(source) as path:
        outcome = _encode_file(path, target, plan, options, (keys, values), center in ("mean", "rope"), check)
    if as_json:
        print_json({"output": target, **outcome.as_dict()})
        return
    for line in outcome.notes():
        say(line)
    print(outcome.line(target), file=sys.stderr if target == STANDARD else sys.stdout)


# -- what is asked for -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Plan:
    """What is done to keys, to values and to others."""

    preset: str
    center: str | None  # of keys
    rope: Rope | None
    exact_tokens: int | None
    flat: bool

    def presets(self, reader: TensorReader, parts: dict[str, Part]) -> dict[str, str]:
        """Tensors whose preset is not the one asked for: those of a cache that shares its bits (``formats.rates``)."""
        from pqcodec.formats import rates
        from pqcodec.formats.cache import EXACT_TOKENS

        layers = _layers(parts)
        if self.flat or self.center is None or self.preset not in rates.SHARED or not layers:
            return {}
        exact_tokens = EXACT_TOKENS if self.exact_tokens is None else self.exact_tokens
        shapes, energies = set(), []
        for key, value in layers:
            tensors = reader.read(key), reader.read(value)
            shapes |= {tuple(tensor.shape) for tensor in tensors}
            if len(shapes) > 1 or any(map(_why_exact, tensors)):
                return {}
            energies.append(rates.centred_energy(tensors[0], rope=self.rope, exact_tokens=exact_tokens))
        shared = rates.share(self.preset, energies)
        return {
            name: preset
            for pair, both in zip(layers, zip(*shared, strict=True), strict=True)
            for name, preset in zip(pair, both, strict=True)
        }

    def options(self, part: Part) -> dict[str, Any]:
        from pqcodec.formats.cache import EXACT_TOKENS

        default = 0 if part.role == "other" else EXACT_TOKENS
        options: dict[str, Any] = {"exact_tokens": default if self.exact_tokens is None else self.exact_tokens}
        if part.role == "key":
            options |= {"center": self.center, "rope": self.rope}
        return options


def _layers(parts: dict[str, Part]) -> list[tuple[str, str]]:
    """Names of each layer's key and value, where every layer from 0 on has exactly one of both; else nothing."""
    found = {(part.layer, part.role): name for name, part in parts.items() if part.role != "other"}
    count = sum(part.role != "other" for part in parts.values())
    pairs = [(found.get((layer, "key")), found.get((layer, "value"))) for layer in range(count // 2)]
    return [(key, value) for key, value in pairs if key and value] if 2 * len(pairs) == count == len(found) else []


def _rope(theta: float | None, dim: int | None, style: str | None, first: int | None) -> Rope | None:
    if theta is None:
        if (dim, style, first) != (None, None, None):
            raise InvalidArgument("--rope-dim, --rope-style and --rope-first need --rope-theta")
        return None
    from pqcodec.centre import Rope

    return Rope(theta=theta, dim=dim, style=style or "half", first_position=first or 0)


def _center(center: str, rope: Rope | None) -> str | None:
    from pqcodec.formats.cache import key_center

    chosen = {"auto": key_center(rope), "none": None, "mean": "mean", "rope": "rope"}
    if center not in chosen:
        raise InvalidArgument(f"--center {center!r} is unknown; choose from {', '.join(chosen)}")
    if (chosen[center] == "rope") != (rope is not None):
        raise InvalidArgument("--center rope and --rope-theta go together; give both or neither")
    return chosen[center]


# -- the work ----------------------------------------------------------------------------------------------------
@dataclass
class _Coded:
    """A tensor that was encoded."""

    name: str
    part: Part
    coordinates: int
    stream_bytes: int
    error: float = 0.0  # squared error and squared norm over finite coordinates, with --check
    norm: float = 0.0


@dataclass
class _Outcome:
    """What ``encode`` tells at its end."""

    checked: bool
    coded: list[_Coded] = field(default_factory=list)
    exact: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    tensor_bytes: int = 0
    coded_bytes: int = 0  # bytes of the tensors that were encoded
    file_bytes: int = 0
    seconds: float = 0.0
    encode_seconds: float = 0.0

    def bits(self, role: str | None = None) -> float | None:
        """Bits per coordinate of the coded tensors (of a role)."""
        of = [c for c in self.coded if role in (None, c.part.role)]
        coordinates = sum(c.coordinates for c in of)
        return 8 * sum(c.stream_bytes for c in of) / coordinates if coordinates else None

    def rel_mse(self, role: str | None = None) -> float | None:
        """Squared error over squared norm of the coded tensors (of a role); None without --check."""
        of = [c for c in self.coded if role in (None, c.part.role)]
        norm = sum(c.norm for c in of)
        return sum(c.error for c in of) / norm if self.checked and norm else None

    @property
    def ratio(self) -> float:
        return self.tensor_bytes / self.file_bytes

    @property
    def rate(self) -> float:
        """GB/s of tensors into the encoder, reading and writing not counted."""
        return self.coded_bytes / self.encode_seconds / 1e9 if self.encode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        roles = {"all": None, "key": "key", "value": "value", "other": "other"}
        return {
            "tensors": len(self.coded),
            "exact_tensors": [{"name": name, "reason": reason} for name, reason in self.exact],
            "coordinates": sum(c.coordinates for c in self.coded),
            "bits_per_coordinate": {name: self.bits(role) for name, role in roles.items()},
            "rel_mse": {name: self.rel_mse(role) for name, role in roles.items()} if self.checked else None,
            "tensor_bytes": self.tensor_bytes,
            "file_bytes": self.file_bytes,
            "ratio": self.ratio,
            "seconds": self.seconds,
            "encode_seconds": self.encode_seconds,
            "encode_gb_per_s": self.rate,
        }

    def notes(self) -> list[str]:
        """Lines about what the user may not expect."""
        lines = []
        for reason in dict.fromkeys(reason for _, reason in self.exact):
            lines.append(f"kept exactly ({reason}): {_some([name for name, why in self.exact if why == reason])}")
        others = [c.name for c in self.coded if c.part.role == "other"]
        if others:
            lines.append(f"neither keys nor values by name, encoded as they are: {_some(others)}; see --keys and --values")
        return lines

    def line(self, target: str) -> str:
        parts = [f"{len(self.coded)} tensors" + (f" and {len(self.exact)} exact" if self.exact else "")]
        if (bits := self.bits()) is not None:
            parts.append(f"{bits:.3f} bits/coordinate")
        parts.append(f"{self.ratio:.2f}x smaller ({bytes_text(self.tensor_bytes)} to {bytes_text(self.file_bytes)})")
        if (error := self.rel_mse()) is not None:
            by_role = [f"{role}s {e:.5f}" for role in ("key", "value", "other") if (e := self.rel_mse(role)) is not None]
            parts.append(f"relMSE {error:.5f} ({', '.join(by_role)})")
        parts.append(f"{self.rate:.3g} GB/s")
        return f"{'stdout' if target == STANDARD else target}: {', '.join(parts)}"


def _some(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _encode_file(
    path: Path,
    target: str,
    plan: _Plan,
    options: dict[str, Any],
    regexes: tuple[str | None, str | None],
    needs_keys: bool,
    check: bool,
) -> _Outcome:
    from pqcodec.formats import exact
    from pqcodec.formats.names import part_of
    from pqcodec.formats.pqkv import PQKVWriter
    from pqcodec.formats.tensors import open_tensors

    start = time.perf_counter()
    outcome = _Outcome(check)
    with open_tensors(path) as reader:
        parts = {name: part_of(name, *regexes) for name in reader.names}
        if needs_keys and all(part.role != "key" for part in parts.values()):
            raise InvalidArgument(f"keys are to be centred, but no tensor is a key by name ({_some(list(parts))}); use --keys")
        metadata = {"format": reader.format} | ({"safetensors": reader.metadata} if reader.metadata else {})
        load_kernels(options["backend"])
        presets = plan.presets(reader, parts)
        out = sys.stdout.buffer if target == STANDARD else target
        with progress_bar("encode", reader.total_bytes) as show, PQKVWriter(out, metadata) as writer:
            for name, part in parts.items():
                tensor = reader.read(name)
                reason = _why_exact(tensor)
                if reason:
                    writer.add_exact(name, tensor, layer=part.layer, role=part.role)
                    outcome.exact.append((name, reason))
                else:
                    how = {**options, **plan.options(part), "preset": presets.get(name, plan.preset)}
                    _encode_tensor(name, tensor, part, writer, how, outcome, show)
                outcome.tensor_bytes += exact.nbytes(tensor)
                show(outcome.tensor_bytes)
    outcome.file_bytes = writer.bytes_written
    outcome.seconds = time.perf_counter() - start
    return outcome


def _encode_tensor(
    name: str, tensor: Any, part: Part, writer: Any, options: dict[str, Any], outcome: _Outcome, show: Any
) -> None:
    import math

    from pqcodec import codec
    from pqcodec.formats import exact
    from pqcodec.formats.pqkv import named

    size, before = exact.nbytes(tensor), outcome.tensor_bytes
    start = time.perf_counter()
    with named(f"tensor {name!r}"):
        stream = codec.encode(tensor, progress=lambda done, total: show(before + size * done // max(total, 1)), **options)
    outcome.encode_seconds += time.perf_counter() - start
    outcome.coded_bytes += size
    coded = _Coded(name, part, math.prod(tensor.shape), len(stream))
    if outcome.checked:
        coded.error, coded.norm = _errors(tensor, codec.decode(stream, backend=options["backend"]))
    writer.add_stream(name, stream, layer=part.layer, role=part.role)
    outcome.coded.append(coded)


def _why_exact(tensor: Any) -> str | None:
    """Why a tensor cannot be encoded, or None."""
    from pqcodec import constants as c
    from pqcodec.formats import exact
    from pqcodec.header import DTYPE_NAMES

    if exact.dtype_name(tensor) not in DTYPE_NAMES.values():
        return f"dtype {exact.dtype_name(tensor)}"
    if not 2 <= tensor.ndim <= c.MAX_NDIM:
        return f"{tensor.ndim} dimensions, 2 to {c.MAX_NDIM} can be encoded"
    if not 1 <= tensor.shape[-1] <= c.MAX_HEAD_DIM:
        return f"head_dim outside 1 to {c.MAX_HEAD_DIM}"
    return None


def _errors(x: Any, y: Any) -> tuple[float, float]:
    """Squared error and squared norm, over the coordinates where ``x`` is finite."""
    import numpy as np

    from pqcodec import arrays
    from pqcodec.kernels.reference import widen

    seen = arrays.view(x), arrays.view(y)
    given, decoded = (view.values() for view in seen)
    tokens = x.shape[-2]
    error = norm = 0.0
    for lead in range(len(given.starts)):
        for first in range(0, tokens, 4096):
            count = min(4096, tokens - first)
            a, b = (widen(v.rows(lead, first, count), seen[0].dtype).astype(np.float64) for v in (given, decoded))
            finite = np.isfinite(a)
            error += float((np.where(finite, a - b, 0) ** 2).sum())
            norm += float((np.where(finite, a, 0) ** 2).sum())
    return error, norm
