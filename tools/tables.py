"""Law: tables on stdout: numbers are never cut, and names that are too long are shortened in the middle."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pqcodec.tools.outcome import shown

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 160
_NAMES = ("name", "file", "model")  # columns that are shortened
_LEAST_NAME = 20  # characters
_GAP = 2  # characters between columns


def console() -> Console:
    """A console for tables, of fixed width where stdout is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)


def print_table(
    out: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Sequence[str], spare: Sequence[str] = ()
) -> None:
    """Print cells, which are strings or bars of rich, with the columns ``left`` left-aligned.

    Where the console is too narrow, the columns ``spare`` are left out, first ones first, then names are shortened. A table
    that is still wider is printed as wide as it is: a terminal that breaks its lines shows all of its numbers.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[shown(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    there = list(range(len(columns)))
    for name in spare:
        if table_width([columns[i] for i in there], [[row[i] for i in there] for row in cells]) > out.width:
            there.remove(columns.index(name))
    columns, cells = [columns[i] for i in there], [[row[i] for i in there] for row in cells]
    over = table_width(columns, cells) - out.width
    for at in [at for at, column in enumerate(columns) if column in _NAMES and over > 0]:
        longest = max((_width(row[at]) for row in cells), default=0)
        room = max(longest - over, _LEAST_NAME)
        cells = [[*row[:at], shortened(row[at], room), *row[at + 1 :]] for row in cells]
        over -= max(longest - room, 0)
    made = Table(box=None, show_header=any(columns), header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for row in cells:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    width = max(out.width, table_width(columns, cells))
    (out if width == out.width else Console(width=width)).print(made)


def table_width(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """The characters that a line of a table takes where nothing is cut."""
    return sum(max(map(_width, column)) for column in zip(columns, *rows, strict=True)) + _GAP * (len(columns) - 1)


def shortened(text: str, width: int) -> str:
    """A text of at most ``width`` characters of a terminal, with its beginning and its end.

    >>> shortened("layers.0.attention.keys", 12), shortened("keys", 12)
    ('layers….keys', 'keys')
    """
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    end = (width - 1) // 2
    tail = set_cell_size(text[::-1], end)[::-1].lstrip(" ")
    return set_cell_size(text, width - 1 - end).rstrip(" ") + "…" + tail


def _width(cell: Any) -> int:
    from rich.cells import cell_len

    return cell_len(cell) if isinstance(cell, str) else int(cell.width)
