"""Parameters that DeepSpeed's ZeRO-3 divides among processes. Knows DeepSpeed's marks on a parameter, no model.

A parameter is empty but while its module runs, in the forward and in the backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def is_divided(parameter: Any) -> bool:
    """Whether ZeRO-3 divides a parameter among processes."""
    return "ds_status" in vars(parameter)


def is_absent(parameter: Any) -> bool:
    """Whether a parameter is divided, and not whole in this process now."""
    return is_divided(parameter) and parameter.ds_status.name != "AVAILABLE"


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter when it is whole."""
    return torch.Size(parameter.ds_shape) if is_divided(parameter) else parameter.shape


@contextlib.contextmanager
def present(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which parameters are whole; all processes enter it together if any is divided."""
    absent = [each for each in parameters if is_absent(each)]
    if not absent:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(absent):
        yield
