"""What pages show, run as a reader would: their blocks of Python, and the lines of ``pqcodec`` in their blocks of a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pqcodec.tools.cli import app

BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```(python|sh)\n(.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a language, in their order."""
    return [code for _, found, code in BLOCK.findall(page.read_text()) if found == language]


def run(page: Path, *needs: str, replaced: Mapping[str, str] | None = None, **names: Any) -> dict[str, Any]:
    """The names that a page's blocks leave, run one after the other in the current folder, beginning with ``names``.

    Blocks that need something run only if it is named. Lines of other programs are left out. ``replaced``: addresses on the
    page, by their first part, and those of servers that are there.
    """
    wanted = [(language, code) for need, language, code in BLOCK.findall(page.read_text()) if not need or need in needs]
    if any("model" in code for language, code in wanted if language == "python"):
        torch.manual_seed(0)
        names = {"model": tiny_model(), "input_ids": torch.randint(3, 100, (1, 300))} | names
    for language, code in wanted:
        for scheme, address in (replaced or {}).items():
            code = re.sub(rf"{scheme}://localhost:\d+/0", address, code)
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            continue
        for line in code.splitlines():
            if line.startswith("pqcodec "):
                done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
                assert done.exit_code == 0, (line, done.output, done.exception)
    return names


def tiny_model() -> Any:
    """A model of transformers of random weights, made in no time."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
