"""The matrix that a stored weight stands for, quantised or not. Knows bitsandbytes' storage, nothing of models.

    Linear4bit     (O * I / 2, 1) packed nf4 or fp4, with a scale for each block of entries
    Linear8bitLt   (O, I) int8, with a scale for each row

A model stays quantised: one matrix is made plain while its numbers are needed, and let go of.
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

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REMEDY = "Load the model without quantisation, or with bitsandbytes in 4 or 8 bits."
CPU_LAYOUT = "support_avx512bf16_for_cpu"  # what bitsandbytes calls whether a 4-bit map may take it


def bits_of(parameter: Any) -> Literal[4, 8] | None:
    """In how many bits bitsandbytes has stored a parameter; None for a plain one, or one that is yet to be quantised.

    Known by names, so that bitsandbytes need not be there.
    """
    kind = type(parameter).__name__
    if kind == "Params4bit" and parameter.bnb_quantized:
        return 4
    return 8 if kind == "Int8Params" and parameter.dtype == torch.int8 else None


def matrix_shape(name: str, module: nn.Module, parameter: nn.Parameter) -> torch.Size:
    """The shape of the matrix, or the stack of them, that a parameter stands for; nothing is dequantised.

    Args:
        name: what to call it.
        module: whose own parameter it is.
        parameter: as it is stored.

    Raises:
        InputError: its numbers cannot be read: it is quantised by something else than bitsandbytes.
    """
    if bits_of(parameter) == 4:
        return torch.Size(_state_of_4_bits(module).shape)
    if bits_of(parameter) == 8:
        return parameter.shape
    wrapped = is_traceable_wrapper_subclass(parameter) and not isinstance(parameter, DTensor)
    if wrapped or parameter.dtype not in PLAIN:
        kind = type(parameter).__name__ if wrapped else parameter.dtype
        raise InputError(f"'{name}' is quantised to {kind}, in a {type(module).__name__}. {REMEDY}")
    return parameter.shape


@torch.no_grad()
def plain_matrix(module: Any, parameter: nn.Parameter) -> Tensor:
    """The numbers of a parameter that `matrix_shape` knows: the parameter itself, or a dequantised copy."""
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
    """What a quantised module would save: its weight, and what gives the weight its meaning."""
    if any(bits_of(each) == 4 for each in module.parameters(recurse=False)):
        _leave_cpu_layout(module)
    return module.state_dict()


def check_plain(model: nn.Module, what: str) -> None:
    """Raise InputError for a model of which anything is quantised; `what` needs gradients of its weights themselves."""
    for name, parameter in model.named_parameters():
        if bits_of(parameter) is not None:
            raise InputError(
                f"{what} needs the gradients of the weights themselves, and '{name}' is quantised to "
                f"{bits_of(parameter)} bits. Load the model without quantisation."
            )


@contextlib.contextmanager
def giving_gradients(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit maps on a CPU from the layout that some processors are faster with, and that has no backward.

    In evaluation mode bitsandbytes takes it at the first forward without gradients, and stays with it.
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
    """How a weight is packed; where it has lost that on being converted, its module still knows."""
    return module.quant_state if module.weight.quant_state is None else module.weight.quant_state


def _leave_cpu_layout(module: Any) -> None:
    state = _state_of_4_bits(module)
    if state is not None and vars(state).get("packing_format_for_cpu", False):
        module.state_dict()  # to be saved, the weight is put back as it was, but for scales that were not packed
        if state.absmax.dim() == 2:  # (I / block, O), as in that layout
            state.absmax = state.absmax.T.reshape(-1).float()
