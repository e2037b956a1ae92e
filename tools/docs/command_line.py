"""Law: the page of the command line is what its verbs say of themselves: ``python -m tools.docs.command_line`` writes it.

It is a file of the repository, since the site is built where pqcodec is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "pages" / "reference" / "command-line.md"
_OPENING = """# Command line

`pqcodec VERB --help` says the same. INPUT may be a file, a folder, a pattern or a URL, and `-` is stdin or stdout.
`pqcodec --version` prints the version, `--install-completion` sets up the shell's completion.
"""


def _verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, command) of every verb, those of groups, too."""
    for own, verb in command.commands.items():
        if hasattr(verb, "commands"):
            yield from _verbs(verb, f"{name} {own}")
        else:
            yield f"{name} {own}", verb


def _text(text: str | None) -> str:
    """A text of help as a cell of a table."""
    return re.sub(r"\s+", " ", text or "").replace("|", "\\|").replace("<", "&lt;").strip()


def _option(option: Any) -> str:
    metavar = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    default = option.default
    told = "" if option.is_flag or default in (None, "", ()) or callable(default) else f" Default: {default}."
    names = ", ".join((*option.opts, *option.secondary_opts))
    return f"| `{names}{metavar}` | {_text(option.help)}{told} |"


def page() -> str:
    """The page, in Markdown."""
    from typer.main import get_command

    from pqcodec.tools.cli import app

    lines = [_OPENING]
    for name, verb in _verbs(get_command(app), "pqcodec"):
        params = [param for param in verb.params if not getattr(param, "hidden", False)]
        arguments = [param for param in params if param.param_type_name == "argument"]
        options = [param for param in params if param.param_type_name == "option"]
        shown = " ".join(param.metavar or param.name.upper() for param in arguments)
        lines += [f"## {name} {shown}".rstrip(), "", " ".join((verb.help or "").split()), ""]
        cells = [f"| `{param.metavar or param.name.upper()}` | {_text(param.help)} |" for param in arguments]
        cells += [_option(param) for param in options]
        lines += ["| argument or option | what it is |", "|---|---|", *cells, ""] if cells else []
    epilog = _text(app.info.epilog)
    return "\n".join([*lines, epilog[:1].upper() + epilog[1:], ""])


if __name__ == "__main__":
    PAGE.write_text(page())
