"""Law: changes of a model's numbers that no digest can identify are refused, with their names, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import code
from pqcodec.formats.engines.model_identity.digests import json_digest
from pqcodec.formats.engines.model_identity.watch import Named, classes_of

_HARMLESS_HOOKS = {  # module: end of the hook's name; they record outputs, move tensors or count
    "transformers.utils.output_capturing": "",
    "transformers.modeling_utils": "make_inputs_require_grads",
    "peft.utils.other": "make_inputs_require_grads",
    "torch.utils.module_tracker": "",
}
_WRAPS_FORWARD = ("transformers.distributed.", "accelerate.hooks")  # modules whose wrappers spread a model over devices
_DROPS = ("dropout", "layerdrop", "drop_path", "drop_prob", "jitter")
_SAME_IN_TRAINING = tuple(f"torch.nn.modules.{name}" for name in ("container", "linear", "normalization", "sparse"))
_OR = "or pass an Identity of your own"


def refuse_hooks(modules: Named) -> None:
    """Raises InvalidArgument for a forward hook that may change a module's input or output."""
    for path, module in modules:
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            _refuse_hooks(getattr(module, kind), f"the module {path or type(module).__name__!r}")


def refuse_global_hooks() -> None:
    """Raises InvalidArgument for a global forward hook of torch; fast where there is none."""
    from torch.nn.modules import module

    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        hooks = getattr(module, kind, None)
        if hooks:
            _refuse_hooks(hooks, "every module (a global hook)")


def _refuse_hooks(hooks: Mapping[int, Any], where: str) -> None:
    for hook in hooks.values():
        end = _HARMLESS_HOOKS.get(code.module_of(hook))
        if end is None or not code.name_of(hook).endswith(end):
            raise InvalidArgument(
                f"{where} has the forward hook {code.name_of(hook)}, which may change its numbers: remove the hook, {_OR}"
            )


def refuse_forwards(modules: Named) -> None:
    """Raises InvalidArgument for a ``forward`` set on a module, unless accelerate or torch.compile wraps the class's own."""
    for path, module in modules:
        if "forward" in vars(module) and not _leads_to_own(module, vars(module)["forward"]):
            raise InvalidArgument(
                f"the module {path or type(module).__name__!r} has a forward of its own, {code.name_of(module.forward)}, "
                f"in the place of its class's: delete it, {_OR}"
            )


def _leads_to_own(module: Any, forward: Any) -> bool:
    """Whether a module's ``forward`` only wraps that of its class."""
    for _ in range(16):
        if code.unbound(forward) is code.unbound(type(module).forward):
            return True
        if hasattr(forward, "_torchdynamo_orig_callable"):  # torch.compile(module.forward)
            forward = forward._torchdynamo_orig_callable
        elif code.module_of(forward).startswith(_WRAPS_FORWARD):
            if code.module_of(forward) == "accelerate.hooks":
                if not _only_accelerates(getattr(module, "_hf_hook", None)):
                    return False
                forward = getattr(module, "_old_forward", None)
            else:
                function = code.unbound(forward)
                cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
                forward = cells["original_forward"].cell_contents if "original_forward" in cells else None
        else:
            return False
    return False


def _only_accelerates(hook: Any) -> bool:
    hooks = getattr(hook, "hooks", (hook,))
    return type(hook).__module__ == "accelerate.hooks" and all(type(each).__module__ == "accelerate.hooks" for each in hooks)


def patched_classes(modules: Named) -> list[str]:
    """Names and digests of functions from elsewhere that replace the ``forward`` of a class.

    Raises InvalidArgument for a function without a lasting name, such as a lambda.
    """
    found = []
    for kind in classes_of(modules):
        home = next((base for base in kind.__mro__ if "forward" in vars(base)), kind)
        own = {"torch", home.__module__.split(".")[0]}
        chain = list(code.layers(kind.forward))
        others = [each for each in chain if code.package_of(each) not in own]
        innermost, expected = code.name_of(chain[-1]), f"{code.type_name(home)}.forward"
        beside = innermost.rpartition(".")[0] == home.__module__  # a function of the module that the class is in
        if not others and innermost != expected and not beside and code.is_lasting(innermost):
            others = [chain[-1]]
        for each in others:
            name = code.name_of(each)
            if not code.is_lasting(name):
                raise InvalidArgument(
                    f"the forward of {code.type_name(kind)} was replaced by {name}, which has no name of its own: put the "
                    f"class's own back, {_OR}"
                )
            found.append(f"{code.type_name(kind)}.forward = {name} {_digest(each)}")
    return sorted(found)


def _digest(function: Any) -> str:
    return json_digest(code.function_content(function)) if hasattr(function, "__code__") else ""


def training_mode(modules: Named) -> str:
    """ "" for a model in eval mode, "train" for one in training mode, else a digest of the modules in training mode.

    Modules that compute the same in both modes do not count, since layers that are added later are often in training mode.
    Raises InvalidArgument where dropout would be active.
    """
    modules = [(path, module) for path, module in modules if not type(module).__module__.startswith(_SAME_IN_TRAINING)]
    training = [(path, module) for path, module in modules if module.training]
    configs = {id(config): config for _, module in training if (config := getattr(module, "config", None)) is not None}
    for path, module in training:
        _refuse_drops(f"the module {path or type(module).__name__!r}", _drops(module))
    for config in configs.values():
        _refuse_drops("the config", vars(config).items() if hasattr(config, "__dict__") else ())
    if len(training) in (0, len(modules)):
        return "train" if training else ""
    return json_digest([path for path, _ in training])


def _drops(module: Any) -> list[tuple[str, Any]]:
    from torch.nn.modules.dropout import _DropoutNd

    settings = list(vars(module).items())
    return [*settings, ("dropout", module.p)] if isinstance(module, _DropoutNd) else settings


def _refuse_drops(where: str, settings: Iterable[tuple[str, Any]]) -> None:
    for name, value in settings:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and value > 0 and any(drop in name for drop in _DROPS) and not name.startswith("_"):
            raise InvalidArgument(
                f"the model is in training mode and {where} drops numbers at random ({name} {value}), so that no cache is like "
                "another: call model.eval() first"
            )
