"""Law: foreign code in a model: classes of other packages, and functions that replace those of transformers' modules.

A shell is built from the same foreign class, so it shows no deviation, but the code may change between processes. So its
classes enter an identity by name and a digest of their code, and so do functions that were put into a module of transformers.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import lru_cache
from types import CodeType
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import code
from pqcodec.formats.engines.model_identity.digests import json_digest
from pqcodec.formats.engines.model_identity.watch import Named, classes_of


def foreign_classes(modules: Named) -> list[Any]:
    """The foreign ones among the modules' classes and their base classes."""
    return [kind for each in classes_of(modules) for kind in each.__mro__ if code.is_foreign(kind)]


def homes_of(modules: Named) -> list[Any]:
    """The Python modules of ``transformers.models`` in which the modules' classes are written, each once."""
    names = dict.fromkeys(kind.__module__ for kind in classes_of(modules) if kind.__module__.startswith("transformers.models."))
    return [sys.modules[name] for name in names if name in sys.modules]


def foreign(modules: Named) -> list[str]:
    """Foreign classes, and foreign functions in transformers' Python modules, each as its name and a digest of its code.

    Names that the source of the module does not mention are passed over: ``torch.compile`` keeps its functions under such.
    Raises InvalidArgument for such a function without a lasting name.
    """
    found = {f"{code.type_name(kind)} {json_digest(code.class_content(kind))}" for kind in foreign_classes(modules)}
    for home in homes_of(modules):
        mentioned = _names_in(home.__name__)
        for name, value in vars(home).items():
            if mentioned and name not in mentioned:
                continue
            for function in code.layers(value) if callable(value) else ():
                package = code.package_of(function)
                if not isinstance(getattr(function, "__code__", None), CodeType) or package in code.KNOWN + code.LIBRARIES:
                    continue
                called = code.name_of(function)
                if not code.is_lasting(called):
                    raise InvalidArgument(
                        f"{home.__name__}.{name} was replaced by {called}, which has no name of its own: put the library's own "
                        "back, or pass an Identity of your own"
                    )
                found.add(f"{home.__name__}.{name} = {called} {json_digest(code.function_content(function))}")
    return sorted(found)


@lru_cache(maxsize=256)
def _names_in(module: str) -> frozenset[str]:
    """All words in the source of a Python module; empty where it cannot be read."""
    try:
        return frozenset(re.findall(r"\w+", inspect.getsource(sys.modules[module])))
    except (OSError, TypeError):
        return frozenset()
