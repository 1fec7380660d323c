"""Why a forward did not call an up-projection. Knows modules, nothing of scores."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..config import InputError
from .modes import requiring_grad
from .up_projection import UpProjection

UNCOMPILED = "Pass the model uncompiled, and train without torch.compile"


def not_called(model: nn.Module, each: UpProjection) -> InputError:
    """The error for an up-projection that a forward of the model did not call, with the cause if it can be seen."""
    if any(_is_compiled(module) for module in model.modules()):
        return InputError(f"The forward did not show '{each.name}': a compiled model drops hooks. {UNCOMPILED}.")
    for path, module in _around(model, each):
        own = vars(module).get("forward")
        if path and own is not None and "_hf_hook" not in vars(module):  # accelerate wraps the module's own, too
            return InputError(
                f"The forward did not call '{each.name}': the forward of '{path}' was replaced by {_name_of(own)}, "
                "which computes without calling it, as fused kernels such as Unsloth's do. Give these modules their "
                f"own forward back, in every layer: `del model.get_submodule('{path}').forward`."
            )
    path, module = next(_around(model, each))
    return InputError(
        f"The forward did not call '{each.name}': either {type(module).__name__}.forward ('{path}') computes without "
        "calling it, as fused kernels do, or it is skipped, as by layerdrop, or compiled. Load the model without such "
        'kernels, layerdrop and torch.compile, or pass up_projection="<regex>" that finds a map it calls.'
    )


def is_used(parameters: Iterable[nn.Parameter], output: Any) -> bool:
    """Whether what `output()` computes depends on any of these parameters, by whatever way."""
    floating = [each for each in parameters if each.is_floating_point()]
    with torch.enable_grad(), requiring_grad(floating, True):
        result = output()
        if not floating or not result.requires_grad:
            return False
        return any(each is not None for each in torch.autograd.grad(result.sum(), floating, allow_unused=True))


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None


def _around(model: nn.Module, each: UpProjection) -> Iterator[tuple[str, nn.Module]]:
    """The modules that contain an up-projection, with their names, innermost first."""
    names = {module: name for name, module in model.named_modules()}
    path = names[each.outer]
    while path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


def _name_of(function: Any) -> str:
    plain = inspect.unwrap(getattr(function, "__func__", function))
    name = getattr(plain, "__qualname__", type(plain).__name__)
    return f"{getattr(plain, '__module__', '')}.{name}".lstrip(".")
