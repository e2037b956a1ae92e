"""Law: what mkdocs calls while it builds the site; all that is not Markdown on a page comes from here.

The code is copied so that it is one package, as it is when it is installed; mkdocstrings reads it there and imports nothing.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

from benchmarks.tables import charts, with_tables
from tools.docs.scripts import pictures, with_scripts

ROOT = Path(__file__).parents[2]
CODE = ROOT / "build" / "docs-code"
_FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\s\">]+", re.IGNORECASE)


class _ExamplesAsCode(Preprocessor):
    """Lines from ``>>>`` to the next empty one become a block of code; Markdown would make quotations of them."""

    def run(self, lines: list[str]) -> list[str]:
        """The lines of a page or docstring, with fences around its examples."""
        out: list[str] = []
        fenced = example = False
        for line in lines:
            if not example and line.lstrip().startswith("```"):
                fenced = not fenced
            if not fenced and not example and line.startswith(">>> "):
                example = True
                out += ["", "```pycon"]
            elif example and not line.strip():
                example = False
                out.append("```")
            out.append(line)
        return [*out, "```"] if example else out


class ExamplesAsCode(Extension):
    """The extension of Markdown that puts ``_ExamplesAsCode`` before blocks of code are found."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Markdown's name
        """Register the preprocessor."""
        md.preprocessors.register(_ExamplesAsCode(md), "examples", 40)


@event_priority(100)
def on_config(config: Any) -> Any:
    """The code as one package, before mkdocstrings looks for it, and the extension."""
    shutil.rmtree(CODE, ignore_errors=True)
    code = shutil.ignore_patterns("__pycache__", "docs")
    for source, target in (("pqcodec", "."), ("formats", "formats"), ("tools", "tools")):
        shutil.copytree(ROOT / source, CODE / "pqcodec" / target, ignore=code, dirs_exist_ok=True)
    config.markdown_extensions.append(ExamplesAsCode())
    return config


def on_files(files: Any, config: Any) -> Any:
    """The charts, from where benchmarks write them, and the pictures of the gallery's scripts."""
    for name in charts():
        path = ROOT / "benchmarks" / "results" / f"{name}.png"
        files.append(File.generated(config, f"results/{name}.png", abs_src_path=str(path)))
    for path in pictures():
        files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The tables of results, and the gallery's scripts, in the place of their marks."""
    return with_scripts(with_tables(markdown))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would fetch something from elsewhere when it is read."""
    found = [tag for tag in _FETCHED.findall(output) if 'rel="canonical"' not in tag]
    if found:
        raise PluginError(f"{page.file.src_uri} fetches {', '.join(found)}; a page needs nothing from elsewhere")
    return output
