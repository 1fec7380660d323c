"""Each sample's gradient of a weight, out of a batch's backward. Knows nothing of losses, optimizers or scores.

For a linear map `y = x W^T`, with `a` (T, I) the sample's input and `b` (T, O) the loss gradient at its output, the
gradient of W is `b^T a`, (O, I). It is formed a few rows at a time, so that a tile is used while it is in the cache.
For a block that is no linear map, such as fused experts, the block is run again for the sample alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .modes import requiring_grad

TILE_ENTRIES = {"cpu": 1 << 18}  # a megabyte of float32: stays in the cache of a core
TILE_ENTRIES_ELSEWHERE = 1 << 25  # few launches, 128 MB


def spans(b: Tensor, attention_mask: Tensor) -> list[slice]:
    """Where each sample's gradient lives: the shortest run of tokens outside which it is zero.

    Args:
        b: (B, T, O) loss gradient. Padding has none, nor has what comes after the last learnt token.
        attention_mask: (B, T), 0 on padding.
    """
    used = (b != 0).any(-1).logical_and(attention_mask.bool()).cpu().numpy()
    runs = []
    for row in used:
        positions = row.nonzero()[0]
        runs.append(slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0, 0))
    return runs


def tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of `b^T a`, a tile at a time.

    Args:
        a: (T, I) input of the linear map.
        b: (T, O) gradient at its output.

    Yields:
        The rows' slice and the gradient of those rows, (rows, I). The caller may overwrite it; its memory is used
        again for the next tile.
    """
    inputs, outputs = a.shape[1], b.shape[1]
    rows = max(1, TILE_ENTRIES.get(a.device.type, TILE_ENTRIES_ELSEWHERE) // inputs)
    buffer = a.new_empty(min(rows, outputs), inputs)
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        yield slice(start, stop), torch.mm(b[:, start:stop].T, a, out=buffer[: stop - start])


def gram_is_cheaper(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether two (T, T) Gram matrices cost fewer FLOPs than the (O, I) gradient: T < I * O / (I + O)."""
    return tokens * (inputs + outputs) < inputs * outputs


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """`||b^T a||^2`, Frobenius, without forming the gradient: `sum((a a^T) * (b b^T))`, a float64 scalar."""
    return ((a @ a.T) * (b @ b.T)).sum(dtype=torch.float64)


def block_gradients(
    block: nn.Module,
    parameters: Sequence[nn.Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    b: Tensor,
    sample: int,
    run: slice,
) -> tuple[Tensor | None, ...]:
    """One sample's gradients of parameters anywhere inside a block, by running the block again on its tokens.

    Args:
        block: takes each token by itself; gives hidden states, (B, T, H) or (B * T, H), or a tuple that begins so.
        parameters: whose gradients are wanted.
        args, kwargs: what the block was called with.
        b: (B, T, H) loss gradient at its output.
        sample: the sample's place in the batch.
        run: its tokens.

    Returns:
        The gradients, None for a parameter that none of these tokens used.
    """
    own = partial(_own_tokens, shape=b.shape[:2], sample=sample, run=run)
    with torch.enable_grad(), requiring_grad(parameters, True):
        output = block(*map(own, args), **{name: own(value) for name, value in kwargs.items()})
        output = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(output, parameters, own(b).view_as(output), allow_unused=True)


def _own_tokens(value: Any, shape: torch.Size, sample: int, run: slice) -> Any:
    """One sample's run of a tensor with an entry for each token, (B, T, ...) or (B * T, ...); all else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.shape[:2] == shape:
        return value[sample : sample + 1, run].detach()
    if value.shape[:1] == (shape.numel(),):
        return value.unflatten(0, shape)[sample, run].detach()
    return value
