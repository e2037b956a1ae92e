"""Law: the gallery's scripts, each shown with what it printed and drew: ``python -m tools.docs.scripts [NAME ...]`` runs them.

What they print and draw is kept beside them, for the site is built where pqcodec is not installed. They print only what is the
same on every machine.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

GALLERY = Path(__file__).parent / "gallery"
MARK = re.compile(r"^<!-- script: (\w+) -->$", re.MULTILINE)


def printed(name: str, folder: str | os.PathLike[str]) -> str:
    """What a script prints; it runs in ``folder``, where it leaves its picture, if it draws one. Raises what it raises."""
    out = io.StringIO()
    with chdir(folder), redirect_stdout(out):
        runpy.run_path(str(GALLERY / f"{name}.py"), run_name="__main__")
    return out.getvalue()


def pictures() -> list[Path]:
    """The pictures that scripts have drawn."""
    return sorted(GALLERY.glob("*.png"))


def with_scripts(page: str) -> str:
    """A page with a script, its output and its picture after each mark ``<!-- script: NAME -->``; raises OSError."""

    def shown(found: re.Match[str]) -> str:
        name = found[1]
        code, output = (GALLERY / f"{name}.{ending}" for ending in ("py", "txt"))
        parts = [f"```python\n{code.read_text()}```", f"```text\n{output.read_text()}```"]
        if (GALLERY / f"{name}.png") in pictures():
            parts.append(f"![{name}](gallery/{name}.png)")
        return "\n\n".join(parts)

    return MARK.sub(shown, page)


if __name__ == "__main__":
    for script in sys.argv[1:] or sorted(path.stem for path in GALLERY.glob("*.py")):
        (GALLERY / f"{script}.txt").write_text(printed(script, GALLERY))
