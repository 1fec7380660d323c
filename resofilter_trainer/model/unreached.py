"""Why a forward does not run an up-projection once, on all tokens. Knows modules, nothing of scores."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import InputError
from .modes import requiring_grad
from .plain import UNCOMPILED, is_compiled
from .up_projection import UpProjection

DETACHED = (
    "The loss has no gradient at any measured up-projection: the model's forward detaches what they compute, or runs "
    "under torch.no_grad. Load a model that can be trained, or measure other layers with a larger n_layers."
)
FUSED = {  # by the package of a forward that replaces a module's own
    "unsloth": "as unsloth's fused LoRA kernels do",
    "axolotl": "as axolotl's LoRA kernels do unless lora_mlp_kernel is false",
}
LAYER = re.compile(r"\.\d+(?=\.|$)")


def not_called(model: nn.Module, each: UpProjection) -> InputError:
    """The error for an up-projection that a forward of the model did not call, with the cause if it can be seen."""
    if any(is_compiled(module) for module in model.modules()):
        return InputError(f"The forward did not show '{each.name}': a compiled model drops hooks. {UNCOMPILED}.")
    for path, module in _around(model, each):
        own = vars(module).get("forward")
        if path and own is not None and "_hf_hook" not in vars(module):  # accelerate wraps the module's own, too
            name = _name_of(own)
            whose = next((said for package, said in FUSED.items() if name.startswith(package)), "as fused kernels do")
            return InputError(
                f"The forward did not call '{each.name}': the forward of '{path}' was replaced by {name}, which "
                f"computes without calling it, {whose}. Give the modules their own forward back before training: "
                f"`{_restoring(path)}`. Or score with a plain model (resofilter score), and train on the selection."
            )
    path, module = next(_around(model, each))
    return InputError(
        f"The forward did not call '{each.name}': either {type(module).__name__}.forward ('{path}') computes without "
        "calling it, as fused kernels do, or it is skipped, as by layerdrop, or compiled. Load the model without such "
        'kernels, layerdrop and torch.compile, or pass up_projection="<regex>" that finds a map it calls.'
    )


def used_twice(each: UpProjection) -> InputError:
    """The error for a module that a forward pass calls more than once."""
    return InputError(
        f"'{each.name}' is used twice in a forward pass, as by layers that share it, or in chunks, and only a module "
        "that runs once can be measured. If layers share it, give each its own with copy.deepcopy; if the model's "
        "config has chunk_size_feed_forward, set it to 0; or measure other modules, with n_layers or up_projection."
    )


def not_token_by_token(each: UpProjection, what: str) -> InputError:
    """The error for a module from whose output the tokens of a sample cannot be told; `what` the module does."""
    return InputError(
        f"'{each.name}' cannot be measured: {what}, so the tokens of a row cannot be told apart in it. If the model's "
        'config has chunk_size_feed_forward, set it to 0; or pass up_projection="<regex>" that finds a linear map that '
        "runs on all tokens of a batch."
    )


@contextlib.contextmanager
def used_once(model: nn.Module, up_projections: Sequence[UpProjection]) -> Iterator[None]:
    """Raises InputError in a forward that calls a module twice."""
    called: set[nn.Module] = set()

    def see(module: nn.Module, args: Any, each: UpProjection) -> None:
        if module in called:
            raise used_twice(each)
        called.add(module)

    with contextlib.ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda module, args: called.clear()).remove)
        for module, each in {each.module: each for each in up_projections}.items():
            stack.callback(module.register_forward_pre_hook(partial(see, each=each)).remove)
        yield


def is_used(parameters: Iterable[nn.Parameter], output: Any) -> bool:
    """Whether what `output()` computes depends on any of these parameters, by whatever way."""
    floating = [each for each in parameters if each.is_floating_point()]
    with torch.enable_grad(), requiring_grad(floating, True):
        result = output()
        if not floating or not result.requires_grad:
            return False
        return any(each is not None for each in torch.autograd.grad(result.sum(), floating, allow_unused=True))


def _around(model: nn.Module, each: UpProjection) -> Iterator[tuple[str, nn.Module]]:
    """The modules that contain an up-projection, with their names, innermost first."""
    names = {module: name for name, module in model.named_modules()}
    path = names[each.outer]
    while path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


def _name_of(function: Any) -> str:
    plain = inspect.unwrap(getattr(function, "__func__", function))
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__qualname__", type(plain).__name__)
    return f"{getattr(plain, '__module__', '')}.{name}".lstrip(".")


def _restoring(path: str) -> str:
    """The code that gives the modules at a path, in every layer, their own forward back."""
    found = LAYER.search(path)
    if found is None:
        return f"del model.get_submodule('{path}').forward"
    layers, inside = path[: found.start()], path[found.end() :]
    return f"for layer in model.get_submodule('{layers}'): vars(layer{inside}).pop('forward', None)"
