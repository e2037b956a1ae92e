"""Law: ``pqcodec encode``: files of plain tensors are encoded, one tensor at a time."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.tools.completion import backends, containers, presets
from pqcodec.tools.decisions import Choice, Decided, Decisions, some
from pqcodec.tools.files import PLAIN, STANDARD, Task, input_file, tasks, written_like
from pqcodec.tools.forecast import DryRun, Forecast
from pqcodec.tools.jobs import KeepGoing, Show, report, run
from pqcodec.tools.memory import Limit, Memory
from pqcodec.tools.outcome import bytes_text, say
from pqcodec.tools.progress import load_kernels
from pqcodec.tools.shared_tables import table_options

if TYPE_CHECKING:
    from pqcodec.formats.plain.files import TensorReader
    from pqcodec.formats.policy.recipe import Encoded, Recipe
    from pqcodec.formats.policy.stages import Stages
    from pqcodec.stages.centre import Rope

Sources = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Files (.safetensors, .npz, .npy), folders, patterns or URLs, or - for stdin."),
]
Target = Annotated[
    str,
    typer.Argument(metavar="OUTPUT", help="The file to write (.pqkv, .safetensors or .zarr), a folder for many, or -."),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to", help="pqkv, safetensors or zarr (default: by OUTPUT's extension, else pqkv).", autocompletion=containers
    ),
]
Backend = Annotated[str, typer.Option(help="auto, or the name of a backend.", autocompletion=backends)]
Jobs = Annotated[int, typer.Option("--jobs", "-j", help="Files worked on at once.")]
RopeDim = Annotated[int | None, typer.Option(help="Channels that RoPE turns (default: all).")]
RopeStyle = Annotated[str | None, typer.Option(help="Channels that RoPE pairs: half (default) or interleaved.")]
RopeFirst = Annotated[int | None, typer.Option(help="Position of the first token (default 0).")]


def encode(
    sources: Sources,
    target: Target,
    to: To = None,
    preset: Annotated[
        str,
        typer.Option(
            help="pq2 to pq6, pq2.5 and pq3.5; quad2, quad2.25 ... quad3.5; of other systems paper, wu44, int4, rvq8 ...",
            autocompletion=presets,
        ),
    ] = "quad3",
    value_preset: Annotated[
        str | None,
        typer.Option(help="Another preset for values; bits are then not shared. qjl needs one: int2.", autocompletion=presets),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random rotation.")] = 0,
    center: Annotated[
        str,
        typer.Option(help="What is subtracted from keys: auto (rope if --rope-theta is given, else mean), none, mean or rope."),
    ] = "auto",
    rope_theta: Annotated[
        float | None,
        typer.Option(
            help="Base of RoPE's frequencies, as the model's config has it; a wrong one is no error, and keys lose more."
        ),
    ] = None,
    rope_dim: RopeDim = None,
    rope_style: RopeStyle = None,
    rope_first: RopeFirst = None,
    exact_tokens: Annotated[
        int | None, typer.Option(help="First tokens kept exactly (default: 4 of keys and values, 0 of others).")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Tensors that are keys (default: by naming conventions).")
    ] = None,
    values: Annotated[str | None, typer.Option(metavar="REGEX", help="Tensors that are values (default: likewise).")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Encode only tensors of such names; keep the others exactly.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Keep tensors of such names exactly; may be repeated.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave tensors of such names out; may be repeated.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Order of dimensions, if another: tokens,heads,head_dim. decode gives it back."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="A+B/FILE",
            help="Encode only the first A and last B tokens of keys and values, or those at the positions in a file, "
            "[n] or [..., n]: one tensor for all, or one for each by its name.",
        ),
    ] = None,
    flat: Annotated[
        bool,
        typer.Option("--flat", help="The same preset for every tensor; else keys of high energy get more bits than values."),
    ] = False,
    nonfinite: Annotated[
        str, typer.Option(help="Vectors with NaN or Inf: error, or exact to keep them as they are.")
    ] = "error",
    effort: Annotated[
        str, typer.Option(help="Of the search in presets of quads and pairs: fast, or best for a smaller error.")
    ] = "fast",
    pairing: Annotated[
        str | None,
        typer.Option(help="Channels that wu presets pair: half or interleaved (default: as --rope-style, else half)."),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="A shared table: levels for nuq (default: fitted), codebooks for rvq, ranges, a basis; or a folder of them, "
            "as train-vq's; may be repeated.",
        ),
    ] = None,
    before_rope: Annotated[
        bool, typer.Option("--before-rope", help="Code keys as they were before RoPE (--rope-theta), less their mean.")
    ] = False,
    join_heads: Annotated[
        bool, typer.Option("--join-heads", help="Code the vectors of all heads of a token as one: of keys and values.")
    ] = False,
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Code only these channels, [n] or [..., n]: one tensor for all keys, or one for each tensor by its name.",
        ),
    ] = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Combine each 16 channels by a matrix fitted to the tensor (DecoQuant).")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="Code N coordinates, along the first principal directions of the tensor itself."),
    ] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens under one checksum: the least that is read (24).")] = None,
    note: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Metadata that the file carries; may be repeated.")
    ] = None,
    backend: Backend = "auto",
    check: Annotated[bool, typer.Option("--check", help="Take the error of all numbers, not of a sample.")] = False,
    jobs: Jobs = 1,
    keep_going: KeepGoing = False,
    dry_run: DryRun = False,
    memory: Memory = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Encode files of tensors.

    Tensors are [..., tokens, head_dim] of float16, bfloat16 or float32; others, and those that would not become smaller, are
    kept exactly. Several inputs, a folder or a pattern go into the folder OUTPUT. A PATTERN of names is as a shell's: 'k_*'.
    """
    if as_json and target == STANDARD:
        raise InvalidArgument("--json and OUTPUT '-' would both write to stdout; choose one")
    rope = rope_asked(rope_theta, rope_dim, rope_style, rope_first)
    from pqcodec.formats.policy.recipe import CHUNK_TOKENS, Recipe

    tables = table_options(table or [])
    _check_codebooks([preset, value_preset or preset], tables)
    given = {"before_rope": before_rope, "join_heads": join_heads, "blocks": blocks, "rank": rank, "channels": channels}
    stages = _stages(given, tables, rope)
    recipe = Recipe(
        preset=preset,
        rope=rope,
        center=_center(center, rope, stages),
        exact_tokens=exact_tokens,
        seed=seed,
        share_bits=not flat,
        nonfinite=nonfinite,
        effort=effort,
        pairing=pairing,
        chunk_tokens=CHUNK_TOKENS if chunk_tokens is None else chunk_tokens,
        measured="all" if check else "sample",
        backend=backend,
        **tables,
        value_preset=value_preset,
        stages=stages,
    )
    choice = Choice.of(include, exclude, drop, layout, keep, channels)
    listed = tasks(sources, target, PLAIN, f".{to or 'pqkv'}", force, keep_going)
    limit = Limit.of(memory, min(jobs, len(listed.items)))
    settings = _Settings(recipe, (keys, values), center in ("mean", "rope"), _notes(note), limit, choice)
    kinds = {task.target: container(task.target, to) for task in listed.todo}
    listed = listed.checked(settings.check, keep_going)
    if listed.todo and not dry_run:
        load_kernels(backend)

    def work(task: Task, show: Show) -> _Outcome | Forecast:
        with input_file(task.source, local=True) as path:
            if dry_run:
                return settings.forecast(path, task.target, kinds[task.target])
            with written_like(task.source, task.target, folder=listed.many):
                return _encode_file(path, task.target, kinds[task.target], settings, show)

    found = run(listed.items, work, lambda task: task.source, jobs, "encode", keep_going=keep_going)
    if not as_json:
        for line in dict.fromkeys(line for done in found if done.outcome for line in done.outcome.notes):
            say(line)
    if not listed.many and not as_json:
        print(found[0].outcome.line(), file=sys.stderr if target == STANDARD else sys.stdout)
    report(found, (Forecast if dry_run else _Outcome).COLUMNS, listed.many, as_json)


def container(target: str, to: str | None) -> str:
    """The kind of container of an output, a .pqkv file for stdout; raises InvalidArgument."""
    from pqcodec.formats.containers.kinds import container_of

    return container_of(target, to or ("pqkv" if target == STANDARD else None))


# -- options -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Settings:
    """The options of ``encode``, the same for each file."""

    recipe: Recipe
    regexes: tuple[str | None, str | None]  # of keys and of values
    needs_keys: bool  # centring was asked for, so a file without keys is an error
    notes: dict[str, str]  # of --note
    limit: Limit
    choice: Choice

    def check(self, source: str) -> None:
        """Raises what reading an input, or deciding on it, raises; of a URL only the first bytes are read."""
        from pqcodec.formats.containers.kinds import kind_of
        from pqcodec.formats.places import remote
        from pqcodec.formats.plain.files import open_tensors

        if remote.is_url(source):
            kind_of(source)
        else:
            with open_tensors(source) as reader:
                self.decide(source, reader, "pqkv")

    def decide(self, path: str, reader: TensorReader, kind: str) -> Decisions:
        """What is done with an open file's tensors; ``kind``: of container. Raises InvalidArgument, also for little memory."""
        decisions = Decisions.of(path, reader, self.choice, self.recipe, self.regexes)
        if self.needs_keys and all(one.tensor.role != "key" for one in decisions.tensors):
            names = some([one.name for one in decisions.tensors])
            raise InvalidArgument(f"keys are to be centred, but no tensor is a key by name ({names}); use --keys")
        for one in decisions.tensors:
            needed = _held_bytes(reader, one, self.recipe, kind)
            self.limit.check(path, one.name, needed, "or encode fewer files at once (--jobs)")
        return decisions

    def forecast(self, path: str, target: str, kind: str) -> Forecast:
        """What would be written for an input."""
        from pqcodec.formats.plain.files import open_tensors

        with open_tensors(path) as reader:
            decisions = self.decide(path, reader, kind)
        exact = len(decisions.tensors) - len(decisions.coded)
        return Forecast(
            target, len(decisions.tensors), exact, decisions.tensor_bytes, decisions.body_bytes, tuple(decisions.notes())
        )


def _notes(given: list[str] | None) -> dict[str, str]:
    from pqcodec.formats.plain.layouts import LAYOUTS_KEY

    pairs = [note.partition("=") for note in given or ()]
    for key, equals, _ in pairs:
        if not key or not equals or key in ("format", "safetensors", LAYOUTS_KEY):
            raise InvalidArgument(
                f"--note {key + equals!r}: KEY=VALUE is expected; format, safetensors and {LAYOUTS_KEY} are the codec's own"
            )
    return {key: value for key, _, value in pairs}


def rope_asked(theta: float | None, dim: int | None, style: str | None, first: int | None) -> Rope | None:
    """The RoPE of options of these names, None without a base; raises InvalidArgument."""
    if theta is None:
        if (dim, style, first) != (None, None, None):
            raise InvalidArgument("--rope-dim, --rope-style and --rope-first need --rope-theta")
        return None
    from pqcodec.stages.centre import Rope

    return Rope(theta=theta, dim=dim, style=style or "half", first_position=first or 0)


def _check_codebooks(presets: list[str], tables: dict[str, Any]) -> None:
    """Raises InvalidArgument for a preset of residual VQ without codebooks."""
    from pqcodec.codings.presets import preset

    if "codebooks" not in tables and (needing := [name for name in presets if preset(name).by_vectors]):
        raise InvalidArgument(f"--preset {needing[0]} needs codebooks: give --table PATH, as `pqcodec train-vq` writes them")


def _stages(given: dict[str, Any], tables: dict[str, Any], rope: Rope | None) -> Stages:
    """The stages that options of these names ask for; takes what tables are for stages out of ``tables``."""
    from pqcodec.formats.policy.stages import Stages

    basis, ranges = tables.pop("basis", None), tables.pop("ranges", None)
    linear = {
        "--channels": given["channels"],
        "--blocks": given["blocks"],
        "--rank": given["rank"],
        "--table of a basis": basis,
    }
    if len(asked := [option for option, there in linear.items() if there not in (None, False)]) > 1:
        raise InvalidArgument(f"{' and '.join(asked)} exclude each other: choose one")
    if given["before_rope"] and rope is None:
        raise InvalidArgument("--before-rope needs --rope-theta: the RoPE that keys are turned back from")
    if given["rank"] is not None and given["rank"] < 1:
        raise InvalidArgument(f"--rank {given['rank']}: a number of directions from 1 on is expected")
    basis = given["rank"] if basis is None else basis
    return Stages(given["before_rope"], given["join_heads"], given["blocks"], basis, ranges)


def _center(center: str, rope: Rope | None, stages: Stages) -> str | None:
    auto = "auto" if rope is None or stages.before_rope else "rope"
    chosen = {"auto": auto, "none": None, "mean": "mean", "rope": "rope"}
    if center not in chosen:
        raise InvalidArgument(f"--center {center!r} is unknown; choose from {', '.join(chosen)}")
    if stages.before_rope and chosen[center] == "rope":
        raise InvalidArgument("--center rope is of keys after RoPE: with --before-rope choose mean or none")
    if not stages.before_rope and (chosen[center] == "rope") != (rope is not None):
        raise InvalidArgument("--center rope and --rope-theta go together; give both or neither")
    return chosen[center]


# -- the work ----------------------------------------------------------------------------------------------------
@dataclass
class _Outcome:
    """The outcome of ``encode`` for a file; sizes in bytes."""

    COLUMNS = ("tensors", "bits/coord", "relMSE", "smaller", "bytes", "GB/s")
    exit_code = 0

    output: str
    decisions: Decisions
    coded: list[Encoded] = field(default_factory=list)
    file_bytes: int = 0
    seconds: float = 0.0

    @property
    def exact(self) -> list[Decided]:
        """The tensors that are kept exactly."""
        return [one for one in self.decisions.tensors if one.exact]

    @property
    def all_measured(self) -> bool:
        """Whether relMSE was measured on all numbers, not on a sample."""
        return self.decisions.recipe.measured == "all"

    def bits(self, role: str | None = None) -> float | None:
        """Bits per coordinate of the coded tensors (of a role); None without any."""
        of = [c for c in self.coded if role in (None, c.tensor.role)]
        coordinates = sum(c.coordinates for c in of)
        return 8 * sum(c.stream_bytes for c in of) / coordinates if coordinates else None

    def rel_mse(self, role: str | None = None) -> float | None:
        """Squared error over squared norm of the coded tensors (of a role), samples weighted by tensor size; None without."""
        of = [c for c in self.coded if role in (None, c.tensor.role) and c.error.norm]
        seen = sum(c.error.norm * c.weight for c in of)
        return sum(c.error.squares * c.weight for c in of) / seen if seen else None

    @property
    def ratio(self) -> float:
        return self.decisions.tensor_bytes / self.file_bytes

    @property
    def encode_seconds(self) -> float:
        return sum(c.seconds for c in self.coded)

    @property
    def rate(self) -> float:
        """GB/s of tensors encoded, without reading and writing."""
        return sum(c.tensor_bytes for c in self.coded) / self.encode_seconds / 1e9 if self.encode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        roles = {"all": None, "key": "key", "value": "value", "other": "other"}
        return {
            "output": self.output,
            "tensors": len(self.coded),
            "exact_tensors": [{"name": one.name, "reason": one.exact} for one in self.exact],
            "left_out": list(self.decisions.dropped),
            "notes": self.notes,
            "coordinates": sum(c.coordinates for c in self.coded),
            "bits_per_coordinate": {name: self.bits(role) for name, role in roles.items()},
            "rel_mse": {name: self.rel_mse(role) for name, role in roles.items()},
            "rel_mse_of": "all" if self.all_measured else "sample",
            "tensor_bytes": self.decisions.tensor_bytes,
            "file_bytes": self.file_bytes,
            "ratio": self.ratio,
            "seconds": self.seconds,
            "encode_seconds": self.encode_seconds,
            "encode_gb_per_s": self.rate,
        }

    def cells(self) -> list[str]:
        bits, error = self.bits(), self.rel_mse()
        figures = ["-" if bits is None else f"{bits:.3f}", "-" if error is None else f"{error:.5f}", f"{self.ratio:.2f}x"]
        return [str(len(self.coded) + len(self.exact)), *figures, bytes_text(self.file_bytes), f"{self.rate:.3g}"]

    @property
    def notes(self) -> list[str]:
        """Lines about decisions that the user may not expect, and about tensors that grew all the same."""
        grown = [one.name for one in self.coded if one.stream_bytes >= one.tensor_bytes]
        lines = [f"larger than before, for so many vectors are not finite: {some(grown)}; see --exclude"] if grown else []
        return [*self.decisions.notes(), *lines]

    def line(self) -> str:
        parts = [f"{len(self.coded)} tensors" + (f" and {len(self.exact)} exact" if self.exact else "")]
        if (bits := self.bits()) is not None:
            parts.append(f"{bits:.3f} bits/coordinate")
        parts.append(f"{self.ratio:.2f}x smaller ({bytes_text(self.decisions.tensor_bytes)} to {bytes_text(self.file_bytes)})")
        if (error := self.rel_mse()) is not None:
            by_role = [f"{role}s {e:.5f}" for role in ("key", "value", "other") if (e := self.rel_mse(role)) is not None]
            parts.append(f"relMSE {'' if self.all_measured else 'about '}{error:.5f} ({', '.join(by_role)})")
        parts.append(f"{self.rate:.3g} GB/s")
        return f"{'stdout' if self.output == STANDARD else self.output}: {', '.join(parts)}"


def _encode_file(path: str, target: str, kind: str, settings: _Settings, show: Show) -> _Outcome:
    from pqcodec.formats import containers
    from pqcodec.formats.plain.files import open_tensors
    from pqcodec.formats.policy.recipe import Callbacks

    start = time.perf_counter()
    with open_tensors(path) as reader:
        decisions = settings.decide(path, reader, kind)
        outcome = _Outcome(target, decisions)
        metadata = {"format": reader.format} | ({"safetensors": reader.metadata} if reader.metadata else {})
        sizes = {one.name: one.bytes for one in decisions.coded}
        all_bytes = max(sum(sizes.values()), 1)
        finished = 0

        def advance(name: str, done: int, total: int) -> None:
            show((finished + sizes[name] * done / max(total, 1)) / all_bytes)

        def encoded(one: Encoded) -> None:
            nonlocal finished
            finished += one.tensor_bytes
            outcome.coded.append(one)

        roles = {one.name: one.tensor for one in decisions.tensors}
        pieces = decisions.recipe.pieces(decisions.turned(reader), roles, list(sizes), Callbacks(advance, encoded))
        out: Any = sys.stdout.buffer if target == STANDARD else target
        try:
            outcome.file_bytes = containers.write(out, pieces, metadata | decisions.metadata() | settings.notes, to=kind)
        except NonFiniteInput as error:
            place = " (its place is told in the order ..., tokens, head_dim)" if decisions.metadata() else ""
            advice = f"mend the tensor{place}, or pass --nonfinite exact to keep such vectors"
            raise NonFiniteInput(error.found, advice) from None
    outcome.seconds = time.perf_counter() - start
    return outcome


def _held_bytes(reader: TensorReader, one: Decided, recipe: Recipe, kind: str) -> int:
    """The most bytes of memory for a tensor until it is written."""
    read, zarr = reader.held_bytes(one.name) + (one.bytes if one.layout else 0), kind == "zarr"
    if one.exact:
        return read + 3 * zarr * one.bytes  # zarr makes copies to append a checksum
    made = recipe.held_bytes(one.tensor, one.shape, one.dtype, one.kept)
    return max(read + made, 2 * zarr * made)  # zarr's chunk copies the stream


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor's numbers; 0 for an unknown dtype, which is refused later."""
    import math

    from pqcodec import constants as c

    return math.prod(shape) * c.EXACT_ITEM_BYTES.get(dtype, 0)
