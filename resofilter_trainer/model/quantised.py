"""The matrix that a stored weight represents, quantised or not. Knows bitsandbytes' storage, nothing of models.

    Linear4bit     (O * I / 2, 1) packed nf4 or fp4, with a scale for each block of entries
    Linear8bitLt   (O, I) int8, with a scale for each row

A model stays quantised: one matrix at a time is dequantised, and freed after use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..config import InputError
from .zero3 import whole_shape

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REMEDY = "Load the model without quantisation, or with bitsandbytes in 4 or 8 bits."
CPU_LAYOUT = "support_avx512bf16_for_cpu"  # the attribute by which bitsandbytes allows it for a 4-bit map


def bits_of(parameter: Any) -> Literal[4, 8] | None:
    """The number of bits in which bitsandbytes stores a parameter; None for one that is not quantised, or not yet.

    Decided by class names, so that bitsandbytes need not be installed.
    """
    kind = type(parameter).__name__
    if kind == "Params4bit" and parameter.bnb_quantized:
        return 4
    return 8 if kind == "Int8Params" and parameter.dtype == torch.int8 else None


def matrix_shape(name: str, module: nn.Module, parameter: nn.Parameter) -> torch.Size:
    """The shape of the matrix, or stack of matrices, that a parameter represents; nothing is dequantised.

    Args:
        name: the name of the parameter, for the error.
        module: the module that owns the parameter.
        parameter: the parameter as it is stored.

    Raises:
        InputError: the parameter is quantised by something other than bitsandbytes, so it cannot be read.
    """
    if bits_of(parameter) == 4:
        return torch.Size(_state_of_4_bits(module).shape)
    if bits_of(parameter) == 8:
        return parameter.shape
    wrapped = is_traceable_wrapper_subclass(parameter) and not isinstance(parameter, DTensor)
    if wrapped or parameter.dtype not in PLAIN:
        kind = type(parameter).__name__ if wrapped else parameter.dtype
        raise InputError(f"'{name}' is quantised to {kind}, in a {type(module).__name__}. {REMEDY}")
    return whole_shape(parameter)


@torch.no_grad()
def plain_matrix(module: Any, parameter: nn.Parameter) -> Tensor:
    """The values of a parameter that `matrix_shape` accepts: the parameter itself, or a dequantised copy."""
    if bits_of(parameter) is None:
        return parameter.detach()
    if bits_of(parameter) == 8:
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return parameter.detach().float().mul_((scales.float() / 127)[:, None])
    from bitsandbytes.functional import dequantize_4bit

    _leave_cpu_layout(module)
    plain: Tensor = dequantize_4bit(module.weight.data.view(-1, 1), _state_of_4_bits(module))
    return plain


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a quantised module saves: its packed weight and its scales."""
    if any(bits_of(each) == 4 for each in module.parameters(recurse=False)):
        _leave_cpu_layout(module)
    return module.state_dict()


def check_plain(model: nn.Module, what: str) -> None:
    """Raise InputError for a model with quantised weights; `what` is the procedure that needs their gradients."""
    for name, parameter in model.named_parameters():
        if bits_of(parameter) is not None:
            raise InputError(
                f"{what} needs the gradients of the weights themselves, and '{name}' is quantised to "
                f"{bits_of(parameter)} bits. Load the model without quantisation."
            )


@contextlib.contextmanager
def giving_gradients(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit maps on a CPU out of a layout that is faster on some processors but has no backward.

    In evaluation mode bitsandbytes switches to that layout, for good, at the first forward without gradients.
    """
    modules = [module for module in model.modules() if CPU_LAYOUT in vars(module)]
    own = {module: vars(module)[CPU_LAYOUT] for module in modules}
    for module in modules:
        _leave_cpu_layout(module)
        vars(module)[CPU_LAYOUT] = False
    try:
        yield
    finally:
        for module, value in own.items():
            vars(module)[CPU_LAYOUT] = value


def _state_of_4_bits(module: Any) -> Any:
    """How a weight is packed. A weight loses this when the model is converted; its module does not."""
    return module.quant_state if module.weight.quant_state is None else module.weight.quant_state


def _leave_cpu_layout(module: Any) -> None:
    state = _state_of_4_bits(module)
    if state is not None and vars(state).get("packing_format_for_cpu", False):
        module.state_dict()  # unpacks the weight for saving, but not scales that were not packed
        if state.absmax.dim() == 2:  # (I / block, O), as in the CPU layout
            state.absmax = state.absmax.T.reshape(-1).float()
