"""Law: what ``encode`` does with each tensor of a file, decided from names, shapes and dtypes before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

from pqcodec.errors import InvalidArgument
from pqcodec.tools.keep import KeepRule, lists_in
from pqcodec.tools.outcome import shown
from pqcodec.tools.tables import shortened

if TYPE_CHECKING:
    from pqcodec.formats.plain.files import TensorReader
    from pqcodec.formats.plain.in_memory import CuttableTensors
    from pqcodec.formats.plain.layouts import TensorLayout
    from pqcodec.formats.policy.names import TensorRole
    from pqcodec.formats.policy.recipe import Recipe

_Sizes = Callable[[str, "TensorRole", tuple[int, ...], str], tuple[int, int]]
GROWN = "a stream would not be smaller; is the order of its dimensions another? see --layout"
_NAME_WIDTH = 60  # characters of a name in notes
_FEW_TOKENS = 8  # times as many indices in another dimension as tokens: these are probably another dimension
_MUCH = 2  # times the bits that the preset names


@dataclass(frozen=True)
class Choice:
    """Which tensors are encoded, by patterns of names, which tokens of them, and the order of their dimensions."""

    include: tuple[str, ...] = ()  # none: all
    exclude: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    layout: TensorLayout | None = None  # None: [..., tokens, head_dim]
    keep: KeepRule | None = None  # which tokens of keys and values; None: all
    channels: Mapping[str, Any] = field(default_factory=dict)  # by the names of tensors; "": of every key

    @classmethod
    def of(
        cls,
        include: list[str] | None,
        exclude: list[str] | None,
        drop: list[str] | None,
        layout: str | None,
        keep: str | None = None,
        channels: str | None = None,
    ) -> Choice:
        """The choice of the options of these names; raises InvalidArgument, and what reading a file of ``keep`` ... raises."""
        from pqcodec.formats.plain.layouts import TensorLayout

        wanted, exact, dropped = (tuple(given or ()) for given in (include, exclude, drop))
        rule = None if keep is None else KeepRule.of(keep)
        lists = {} if channels is None else lists_in("--channels", channels, "channels")
        return cls(wanted, exact, dropped, None if layout is None else TensorLayout.of(layout), rule, lists)

    def check(self, path: str, names: tuple[str, ...]) -> None:
        """Raises InvalidArgument for a pattern that fits no tensor."""
        for option, patterns in (("include", self.include), ("exclude", self.exclude), ("drop", self.drop)):
            for pattern in patterns:
                if not any(_fits(name, (pattern,)) for name in names):
                    raise InvalidArgument(f"{path}: --{option} {pattern!r} fits no tensor; there are {some(names)}")

    def drops(self, name: str) -> bool:
        """Whether a tensor is left out of the file."""
        return _fits(name, self.drop)

    def channels_of(self, name: str, tensor: TensorRole) -> Any:
        """The channels of a tensor that are encoded; None for all."""
        return self.channels.get(name, self.channels.get("") if tensor.role == "key" else None)

    def why_exact(self, name: str) -> str | None:
        """Why a tensor is not to be encoded, or None."""
        if _fits(name, self.exclude):
            return "--exclude"
        return "--include names others" if self.include and not _fits(name, self.include) else None


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits, or is the name itself, as of keys[3]."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Decided:
    """A tensor of a file. Where it has a ``layout``, ``shape`` is that of the turned tensor [..., tokens, head_dim]."""

    name: str
    tensor: TensorRole
    shape: tuple[int, ...]
    dtype: str
    exact: str | None  # why it is kept exactly; None: it is encoded
    layout: TensorLayout | None
    bytes: int  # of its numbers
    stream_bytes: int  # at the recipe's preset; 0 if it is kept exactly
    keep: Any = None  # positions of the tokens that are encoded; None: all

    @property
    def kept(self) -> int | None:
        """How many of its tokens are encoded; None for all."""
        return None if self.keep is None else int(self.keep.shape[-1])

    @property
    def bits(self) -> float:
        """Bits per coordinate of its stream."""
        return 8 * self.stream_bytes / max(math.prod(self.shape), 1)


@dataclass(frozen=True)
class Decisions:
    """All tensors of a file that are written, and the names of those that are not."""

    tensors: tuple[Decided, ...]
    dropped: tuple[str, ...]
    recipe: Recipe

    @classmethod
    def of(
        cls, path: str, reader: TensorReader, choice: Choice, recipe: Recipe, regexes: tuple[str | None, str | None]
    ) -> Decisions:
        """The decisions on an open file; ``regexes``: of keys and of values. Raises InvalidArgument."""
        from pqcodec.formats.containers.reader import named
        from pqcodec.formats.plain import mlx
        from pqcodec.formats.policy.names import TensorRole, role_of
        from pqcodec.stages.keep import positions_of

        @cache  # thousands of tensors have few shapes
        def cached(tensor: TensorRole, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
            return recipe.stream_bytes(tensor, shape, dtype), recipe.most_stream_bytes(tensor, shape, dtype)

        by_layer = recipe.codebooks is not None or recipe.stages.by_layer  # all that sizes depend on a layer by

        def sizes(name: str, tensor: TensorRole, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
            if name in recipe.stages.channels:
                return 2 * (recipe.stream_bytes(tensor, shape, dtype, name=name),)
            return cached(TensorRole(tensor.role, tensor.layer if by_layer else None), shape, dtype)

        def cut(one: Decided) -> Decided:
            if choice.keep is None or one.exact is not None or one.tensor.role == "other":
                return one
            with named(f"{path}: tensor {one.name!r}"):
                given = choice.keep.of_tensor(one.name, one.shape[-2])
                if given is None:
                    return one
                keep = positions_of(given, one.shape)
                keep = keep[0] if len(keep) == 1 else keep
                size = recipe.stream_bytes(one.tensor, one.shape, one.dtype, keep=keep, name=one.name)
                return replace(one, keep=keep, stream_bytes=size)

        choice.check(path, reader.names)
        if regexes == (None, None):
            regexes = mlx.regexes_of(reader.metadata) or regexes
        kept = [name for name in reader.names if not choice.drops(name)]
        for name in kept:
            if problem := reader.problem(name):
                raise InvalidArgument(f"{path}: tensor {name!r}: {problem}; or leave it out (--drop {name!r})")
        roles = {name: role_of(name, *regexes) for name in kept}
        channels = {name: found for name, role in roles.items() if (found := choice.channels_of(name, role)) is not None}
        if channels:
            recipe = replace(recipe, stages=replace(recipe.stages, channels=channels))
        elif choice.channels:
            raise InvalidArgument(f"{path}: --channels fits no tensor; there are {some(reader.names)}")
        decided = tuple(cut(_decided(path, name, roles[name], reader.describe(name), choice, sizes)) for name in kept)
        positions = {one.name: one.keep for one in decided if one.keep is not None}
        if choice.keep is not None:
            choice.keep.check(path, list(positions))
        if choice.layout is not None and not any(one.layout for one in decided):
            raise InvalidArgument(f"{path}: --layout {choice.layout} fits no tensor; there are {some(reader.names)}")
        return cls(decided, tuple(name for name in reader.names if choice.drops(name)), replace(recipe, keep=positions))

    @property
    def coded(self) -> list[Decided]:
        """The tensors that are encoded."""
        return [one for one in self.tensors if one.exact is None]

    def turned(self, reader: TensorReader) -> CuttableTensors:
        """The file's tensors that are written, all as [..., tokens, head_dim]."""
        from pqcodec.formats.plain.layouts import Turned

        layouts = {one.name: one.layout for one in self.tensors if one.layout}
        return Turned(reader, [one.name for one in self.tensors], layouts)

    def metadata(self) -> dict[str, dict[str, str]]:
        """What the file says of layouts, so that ``decode`` gives each tensor back as it was."""
        from pqcodec.formats.plain.layouts import LAYOUTS_KEY

        layouts = {one.name: str(one.layout) for one in self.tensors if one.layout}
        return {LAYOUTS_KEY: layouts} if layouts else {}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all numbers that are written."""
        return sum(one.bytes for one in self.tensors)

    @property
    def body_bytes(self) -> int:
        """Bytes of streams, about, and of exact numbers."""
        return sum(one.bytes if one.exact else one.stream_bytes for one in self.tensors)

    def notes(self) -> list[str]:
        """Lines about decisions that the user may not expect."""
        reasons = list(dict.fromkeys(one.exact for one in self.tensors if one.exact))
        lines = []
        for reason in reasons:
            names = [one.name for one in self.tensors if one.exact == reason]
            lines.append(f"{len(names)} kept exactly ({reason}): {some(names)}")
        if self.dropped:
            lines.append(f"{len(self.dropped)} left out (--drop): {some(self.dropped)}")
        if cut := [f"{one.name} ({one.kept} of {one.shape[-2]})" for one in self.coded if one.kept is not None]:
            lines.append(f"{len(cut)} with only some of their tokens (--keep): {some(cut)}")
        others = [one.name for one in self.coded if one.tensor.role == "other"]
        if others:
            lines.append(
                f"neither keys nor values by name, encoded, not centred: {some(others)}; see --keys, --values and --exclude"
            )
        return [*lines, *self.doubts()]

    def doubts(self) -> list[str]:
        """A line about tensors whose dimensions are probably in another order, or whose streams are large for the preset."""
        from pqcodec.codings.presets import preset

        rate = preset(self.recipe.preset).rate
        found = [one for one in self.coded if _few_tokens(one.shape) or one.bits > _MUCH * rate]
        if not found:
            return []
        worst = max(found, key=lambda one: one.bits)
        shape = " x ".join(map(str, worst.shape))
        read = f"{shape} is read as [..., tokens, head_dim] and takes {worst.bits:.3g} bits/coordinate"
        advice = "if tokens are another dimension, see --layout"
        return [
            f"few tokens for {self.recipe.preset}, which names {rate:g}: {some([one.name for one in found])}; {read}: {advice}"
        ]


def _decided(
    path: str, name: str, tensor: TensorRole, described: tuple[tuple[int, ...], str], choice: Choice, sizes: _Sizes
) -> Decided:
    """``sizes``: of a stream, by name, role, shape and dtype: its bytes, and the most bytes that it may take."""
    from pqcodec import constants as c
    from pqcodec.formats.containers.reader import named
    from pqcodec.formats.policy.recipe import why_exact

    shape, dtype = described
    layout = _layout(path, name, tensor, shape, dtype, choice.layout)
    shape = layout.turned(shape) if layout else shape
    size = math.prod(shape) * c.EXACT_ITEM_BYTES[dtype]
    exact = choice.why_exact(name) or why_exact(shape, dtype)
    if exact is None and choice.layout and not layout:
        exact = f"--layout names other dimensions than its {len(shape)}"
    stream = 0
    if exact is None:
        with named(f"{path}: tensor {name!r}"):
            stream, most = sizes(name, tensor, shape, dtype)
        if most >= size:
            exact, stream = GROWN, 0
    return Decided(name, tensor, shape, dtype, exact, layout, size, stream)


def _layout(
    path: str, name: str, tensor: TensorRole, shape: tuple[int, ...], dtype: str, layout: TensorLayout | None
) -> TensorLayout | None:
    """The layout of a tensor if it is turned: where it could be encoded, or is a key or value, of which tokens are cut.

    Raises InvalidArgument for a key or value that cannot have the layout.
    """
    from pqcodec.formats.policy.recipe import why_exact

    with_tokens = tensor.role != "other" and len(shape) > 1
    if layout is None or not (with_tokens or why_exact(shape, dtype) is None):
        return None
    if layout.fits(len(shape)):
        return layout
    if with_tokens:
        given = f"{path}: tensor {name!r} is a {tensor.role} of {len(shape)} dimensions, which --layout {layout} does not fit"
        raise InvalidArgument(f"{given}; encode it by itself, and leave it out here (--drop {name!r})")
    return None


def _few_tokens(shape: tuple[int, ...]) -> bool:
    return max(shape[:-2], default=0) >= _FEW_TOKENS * shape[-2]


def some(names: list[str] | tuple[str, ...]) -> str:
    """The first names of a list, shortened, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shortened(shown(name), _NAME_WIDTH) for name in names[:3]) + more
