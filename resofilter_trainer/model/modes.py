"""Context managers that change a model's mode and restore it. Know nothing of what runs inside them."""

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
    """Evaluation mode in which gradients can be computed; restores the mode of every module."""
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
    """Sets `requires_grad` of all parameters; restores each one's own value."""
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    for parameter in flags:
        parameter.requires_grad_(required)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def own_precision(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Makes a float64 model compute everything in float64.

    transformers models "upcast" to float32 in norms, attention, routers and rotary embeddings. For a float64 model that
    is a downcast, whose noise depends on the shape of the batch.
    """
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return _Float32MeansFloat64() if double else contextlib.nullcontext()


class _Float32MeansFloat64(TorchFunctionMode):
    """Replaces float32 by float64 in every call of a torch function."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        if function is torch.full and any(type(value) is float for value in (*args, *kwargs.values())):
            kwargs.setdefault("dtype", torch.float64)  # its default is float32, in which a mask overflows
        return function(*args, **kwargs)


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces the `forward` of a module; restores the module's own."""
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
    """Runs the forward in bfloat16 autocast.

    Autocast casts the weight of a linear map on every use. On a CPU, where batches are small, that is a tenth of the
    time, so weights that are not sharded are cast once there; the originals are kept and restored.

    Args:
        model: the model; on a CPU it needs half as much memory again inside the context.
        enabled: False to change nothing.
        aside: parameters to leave in their own dtype.
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
    """The tensor in float32 if it is bfloat16 or float16; otherwise unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def same_but_for(tolerance: float, a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by at most `tolerance` times the largest absolute value of `a`."""
    return bool((a - b).abs().max() <= tolerance * a.abs().max())
