"""A model in another mode for a while, and put back. Knows nothing of what is done in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from .quantised import giving_gradients


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and so that gradients can be had; every module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with giving_gradients(model):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter], required: bool) -> Iterator[None]:
    """With `requires_grad` set alike for all; each parameter's own is put back."""
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    for parameter in flags:
        parameter.requires_grad_(required)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def own_precision(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Let a float64 model compute in float64 throughout.

    The models of transformers "upcast" to float32 inside norms, attention, routers and rotary embeddings. For a
    float64 model that is a downcast, whose noise depends on the shape of the batch.
    """
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return _Float32MeansFloat64() if double else contextlib.nullcontext()


class _Float32MeansFloat64(TorchFunctionMode):
    """Reads every request for float32 as one for float64."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextlib.contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """With another `forward`; the module's own is put back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def bfloat16_forward(model: nn.Module, enabled: bool, aside: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """With bfloat16 autocast.

    Autocast casts the weight of a linear map whenever it is used. On a CPU, where batches are small, that takes a tenth
    of the time, so there the weights are cast once, beside the user's own, which are put back; but for sharded ones.

    Args:
        model: stays where it is; on a CPU it takes half as much memory again meanwhile.
        enabled: False to change nothing.
        aside: parameters that have to stay as they are.
    """
    device = next(each.device.type for each in model.parameters() if each.device.type != "meta")
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {module.weight for module in model.modules() if type(module) is nn.Linear} - embeddings - set(aside)
    linear = {each for each in linear if each.device.type == "cpu" and not isinstance(each, DTensor)}
    own = {each: each.data for each in linear if enabled and each.dtype == torch.float32}
    try:
        for parameter, data in own.items():
            parameter.data = data.bfloat16()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            yield
    finally:
        for parameter, data in own.items():
            parameter.data = data


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float32 or float64 already."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def same_but_for(tolerance: float, a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by no more than this share of the largest number."""
    return bool((a - b).abs().max() <= tolerance * a.abs().max())
