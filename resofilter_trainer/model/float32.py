"""Half-precision weights in float32 for a while, where that is possible. Knows tensors and memory, no layers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.environment import launched_here
from .quantised import PLAIN, bits_of
from .zero3 import whole_shape

HALF = (torch.bfloat16, torch.float16)
SPARE = 2  # times what the weights need must be free: activations need memory, too


def half_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers in bfloat16 or float16, each once."""
    return [each for each in (*model.parameters(), *model.buffers()) if each.dtype in HALF]


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most weights: embeddings or norms of a half-precision model are often float32."""
    own = cast(torch.dtype, cast(Any, model).dtype)
    sizes: Counter[torch.dtype] = Counter()
    for each in model.parameters():
        if each.dtype in (torch.float32, *HALF):
            sizes[each.dtype] += whole_shape(each).numel()
    return sizes.most_common(1)[0][0] if own == torch.float32 and sizes else own


def fits_in_float32(model: nn.Module) -> bool:
    """Whether a model can be converted to float32 where it is, and there is memory for it.

    Quantised, sharded and offloaded weights cannot be converted, and flash attention has no float32.
    """
    plain = all(
        each.dtype in PLAIN and bits_of(each) is None and not isinstance(each, DTensor) and each.device.type != "meta"
        for each in model.parameters()
    )
    if not plain or "flash" in str(cast(Any, model).config._attn_implementation):
        return False
    more: Counter[torch.device] = Counter()
    for each in half_tensors(model):
        more[each.device] += each.numel() * each.element_size()  # as much again
    return all(SPARE * size <= _free(device) for device, size in more.items())


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Converts bfloat16 and float16 weights to float32, and back at the end, which changes no bit of them."""
    own = {each: each.dtype for each in half_tensors(model)}
    try:
        for each in own:
            each.data = each.data.float()
        yield
    finally:
        for each, dtype in own.items():
            each.data = each.data.to(dtype)


def _free(device: torch.device) -> int:
    """The memory that a process may take on a device, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available) // launched_here()
