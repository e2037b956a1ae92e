"""Law: ``pqcodec calibrate``: ranges, levels or bases from files of a model's own keys and values, a table for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.completion import presets
from pqcodec.tools.encode import RopeDim, RopeFirst, RopeStyle, rope_asked
from pqcodec.tools.jobs import Show
from pqcodec.tools.made_tables import (
    KEY_AND_VALUE,
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
from pqcodec.tools.shared_tables import Key, table_options

if TYPE_CHECKING:
    import numpy as np

    from pqcodec.stages.centre import Rope
    from pqcodec.stream.tables import SharedTable


def calibrate(
    sources: Texts,
    target: Folder,
    ranges: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Scales and zeros for this preset, such as kvquant3-key.", autocompletion=presets),
    ] = None,
    levels: Annotated[
        str | None, typer.Option(metavar="PRESET", help="Levels for this preset, such as nuq3.", autocompletion=presets)
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Bases of N directions: the principal ones.")] = None,
    role: Annotated[str | None, typer.Option(help="Of key or of value only (default: both).")] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="Take keys as they were before RoPE of this base, for encode --before-rope.")
    ] = None,
    rope_dim: RopeDim = None,
    rope_style: RopeStyle = None,
    rope_first: RopeFirst = None,
    join_heads: Annotated[
        bool, typer.Option("--join-heads", help="Take the vectors of all heads of a token as one, for encode --join-heads.")
    ] = False,
    skip: Annotated[int, typer.Option(help="First tokens of each tensor that are left out, as encode keeps them exactly.")] = 4,
    table: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Ranges that --levels are to go with, or a folder of them.")
    ] = None,
    together: Together = False,
    keys: Keys = None,
    values: Values = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find ranges, levels or bases that many streams share in a model's own keys and values.

    They are used by `pqcodec encode --table FOLDER`, with the same preset and the same stages. Give caches of texts like those
    to come. Keys are taken less their mean, but for ranges and the levels that go with these, as encode codes them. The error
    is that of the last tenth of each tensor's tokens, which are not looked at: as the preset codes them, or what a basis leaves
    out.
    """
    asked = [option for option, given in (("--ranges", ranges), ("--levels", levels), ("--rank", rank)) if given is not None]
    if len(asked) != 1:
        raise InvalidArgument(f"{' and '.join(asked) or 'nothing'} to find: give one of --ranges, --levels and --rank")
    if role not in (None, *KEY_AND_VALUE):
        raise InvalidArgument(f"--role {role!r} is unknown; choose from {', '.join(KEY_AND_VALUE)}, or leave it out")
    if skip < 0:
        raise InvalidArgument(f"--skip {skip}: a number of tokens from 0 on is expected")
    there = table_options(table or [])
    if there and (levels is None or set(there) != {"ranges"}):
        raise InvalidArgument("--table is for ranges that --levels are to go with")
    rope = rope_asked(rope_theta, rope_dim, rope_style, rope_first)
    work = _Work(ranges, levels, rank, there.get("ranges"), rope, join_heads, skip)
    rows = keys_and_values(sources, keys, values, together, KEY_AND_VALUE if role is None else (role,), work.rows)
    write_tables(rows, target, "calibrate", work.table, work.error, force=force, as_json=as_json)


@dataclass(frozen=True)
class _Work:
    """What is found in rows, which are what streams code; one of ``ranges``, ``levels`` and ``rank`` is given."""

    ranges: str | None  # the preset
    levels: str | None  # likewise
    rank: int | None
    given: Any  # ranges that levels go with: one table, or by role and layer
    rope: Rope | None  # that keys are turned back from
    join_heads: bool
    skip: int

    def rows(self, key: Key, x: Any) -> np.ndarray:
        """What streams code of a key or value."""
        from pqcodec.calibrate import rows_to_code

        is_key = key[0] == "key"
        found = rows_to_code(x, rope=self.rope if is_key else None, join_heads=self.join_heads)[..., self.skip :, :]
        centred = is_key and self.ranges is None and self.given is None  # as encode does
        return found - found.mean(-2, keepdims=True) if centred and found.size else found

    def table(self, key: Key, rows: list[Any], show: Show) -> SharedTable:
        """The table of a role and a layer; raises InvalidArgument where nothing is to be found in the rows."""
        import numpy as np

        from pqcodec.bases import data_basis
        from pqcodec.calibrate import shared_levels, shared_ranges
        from pqcodec.stream.tables import BasisTable

        rows = [x for x in rows if x.size]
        if not rows:
            raise InvalidArgument(f"no token is left to look at: give longer texts, or a --skip below {self.skip}")
        if self.ranges is not None:
            return shared_ranges(rows, self.ranges)
        if self.levels is not None:
            return shared_levels(rows, self.levels, ranges=self._ranges_of(key))
        assert self.rank is not None
        if len(widths := {x.shape[-1] for x in rows}) > 1:
            raise InvalidArgument(f"vectors of {' and '.join(map(str, sorted(widths)))} numbers have no basis in common")
        if not any(x.any() for x in rows):
            raise InvalidArgument("all vectors are 0 (keys less their mean), which have no directions: give longer texts")
        return BasisTable(data_basis(np.concatenate([x.reshape(1, -1, x.shape[-1]) for x in rows], 1), self.rank))

    def error(self, key: Key, rows: list[Any], table: Any) -> float | None:
        """relMSE of rows: of a basis what it leaves out, else as the preset codes them."""
        if self.rank is None:
            options = {"levels": table, "ranges": self._ranges_of(key)} if self.levels else {"ranges": table}
            return coded_error(rows, preset=self.levels or self.ranges, **options)
        import numpy as np

        whole = [x.astype(np.float64) for x in rows]  # whose squares do not overflow
        basis = table.basis.astype(np.float64)
        norm = sum(float(np.square(x).sum()) for x in whole)
        left = sum(float(np.square(x - x @ basis.T @ basis).sum()) for x in whole)
        return left / norm if norm else None

    def _ranges_of(self, key: Key) -> Any:
        from pqcodec.formats.policy.names import TensorRole
        from pqcodec.formats.policy.stages import given_for

        return given_for(self.given, TensorRole(*key))
