"""Law: the functions that models look up by name in transformers' registries: attention, masks, experts and RoPE.

``transformers.AttentionInterface.register("sdpa", mine)`` changes every model that uses "sdpa". So, for each name in a model's
configs, the registered function enters the identity if it is not transformers' own; or if "sdpa" or "eager", which otherwise
count as one, is registered to another function of transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import code
from pqcodec.formats.engines.model_identity.digests import json_digest
from pqcodec.formats.engines.model_identity.watch import Named, classes_of

_TABLES = {  # registries of transformers, by Python module
    "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
    "transformers.masking_utils": ("ALL_MASK_ATTENTION_FUNCTIONS", "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING"),
    "transformers.integrations.moe": ("ALL_EXPERTS_FUNCTIONS",),
    "transformers.modeling_rope_utils": ("ROPE_INIT_FUNCTIONS",),
}
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
_SAME = ("eager", "sdpa")  # names whose functions have names that begin so, or are not registered


def tables_of(modules: Named) -> list[tuple[str, dict[str, Any]]]:
    """(name, dict) of the registries that a model's code may use, including those of its own Python modules; each dict once."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    names = [(home, name) for home, names in _TABLES.items() for name in names]
    homes = dict.fromkeys(kind.__module__ for kind in classes_of(modules))
    spaces = {home: vars(sys.modules[home]) for home in [*_TABLES, *homes] if home in sys.modules}
    names += [(home, name) for home in homes if home in spaces for name, value in spaces[home].items() if _is_interface(value)]
    for home, name in names:
        table: Any = spaces.get(home, {}).get(name)
        layers = (table._local_mapping, table._global_mapping) if _is_interface(table) else (table,)
        for each in layers:  # an instance's own entries come before its class's
            if isinstance(each, dict):
                found.setdefault(id(each), (f"{home}.{name}", each))
    return list(found.values())


def dicts_of(modules: Named) -> list[dict[str, Any]]:
    """The dicts of the registries, and the dicts among their values."""
    tables = [table for _, table in tables_of(modules)]
    return tables + [value for table in tables for value in table.values() if isinstance(value, dict)]


def _is_interface(value: Any) -> bool:
    return hasattr(type(value), "_global_mapping") and hasattr(value, "_local_mapping")


def registered(modules: Named, configs: list[Any]) -> list[str]:
    """The functions registered under names in a model's configs that are not transformers' own, with digests of their code.

    Raises InvalidArgument for a function without a lasting name.
    """
    names = {str(getattr(config, which, None)) for config in configs for which in _IMPLEMENTATIONS}
    names |= {text for config in configs for text in _texts(config.to_dict())}
    found = []
    for table, functions in tables_of(modules):
        for name in names & functions.keys():
            value = functions[name]
            for each in value.values() if isinstance(value, dict) else (value,):  # a dict of masks by kind of layer
                entry = _described(each, f"{table}[{name!r}]", name if name in _SAME else "")
                found += [f"{table}[{name!r}] = {entry}"] if entry else []
    return sorted(found)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _texts(member)


def _described(function: Any, where: str, expected: str) -> str:
    """The name and digest of a function; "" for transformers' own whose name begins with ``expected``."""
    others = [each for each in code.layers(function) if code.package_of(each) not in code.KNOWN]
    if not others:
        name = code.name_of(function)
        return "" if name.rpartition(".")[2].startswith(expected) else name
    for each in others:
        if not code.is_lasting(code.name_of(each)):
            raise InvalidArgument(
                f"{where} was registered as {code.name_of(each)}, which has no name of its own: register the library's own "
                "again, or pass an Identity of your own"
            )
    bound = [code.value_content([function.args, function.keywords])] if isinstance(function, partial) else []
    return f"{code.name_of(others[0])} {json_digest([*map(code.callable_content, others), *bound])}"
