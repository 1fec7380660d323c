"""Each sample's gradient of a weight, out of a batch's backward. Knows nothing of losses, optimizers or scores.

For a linear map `y = x W^T`, with `a` (T, I) the sample's input and `b` (T, O) the loss gradient at its output, the
gradient of W is `b^T a`, (O, I). It is formed a few rows at a time, so that a tile is used while it is in the cache.
For a block that is no linear map, such as fused experts, the block is run again for the sample alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .modes import requiring_grad

TILE_ENTRIES = {"cpu": 1 << 18}  # a megabyte of float32: stays in the cache of a core
TILE_ENTRIES_ELSEWHERE = 1 << 25  # few launches, 128 MB


@dataclass(frozen=True)
class Segment:
    """Where one sample lies in a batch: in which row, and at which of its tokens."""

    row: int
    tokens: slice


def segments_of(batch: Mapping[str, Tensor]) -> list[Segment]:
    """The samples of a batch: its rows without their padding, or the parts of a padding-free batch's one row.

    Args:
        batch: `attention_mask` (B, T), 0 on padding; or, without one, `position_ids` (1, T) that begin anew at 0 with
            every sample.
    """
    mask = batch.get("attention_mask")
    if mask is None and "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        ends = [*starts[1:], batch["position_ids"].shape[1]]
        return [Segment(0, slice(start, end)) for start, end in zip(starts, ends, strict=True)]
    if mask is None:
        return [Segment(row, slice(0, tokens.shape[0])) for row, tokens in enumerate(batch["input_ids"])]
    return [Segment(row, _run(tokens)) for row, tokens in enumerate(mask.bool().cpu().numpy())]


def runs_of(counts: Tensor) -> list[Segment]:
    """Samples that follow each other in one row, of so many tokens each, (B,)."""
    ends = counts.cumsum(0).tolist()
    return [Segment(0, slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def spans(b: Tensor, segments: Sequence[Segment]) -> list[Segment]:
    """Where each sample's gradient lives: the shortest run of tokens outside which it is zero.

    Args:
        b: (B, T, O) loss gradient. What comes after the last learnt token has none.
        segments: the samples.
    """
    used = (b != 0).any(-1).cpu().numpy()
    runs = []
    for each in segments:
        run = _run(used[each.row, each.tokens])
        offset = each.tokens.start
        runs.append(Segment(each.row, slice(offset + run.start, offset + run.stop)))
    return runs


def _run(used: np.ndarray) -> slice:
    """From the first to the last position in use."""
    positions = used.nonzero()[0]
    return slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0, 0)


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
    where: Segment,
) -> tuple[Tensor | None, ...]:
    """One sample's gradients of parameters anywhere inside a block, by running the block again on its tokens.

    Args:
        block: takes each token by itself; gives hidden states, (B, T, H) or (B * T, H), or a tuple that begins so.
        parameters: whose gradients are wanted.
        args, kwargs: what the block was called with.
        b: (B, T, H) loss gradient at its output.
        where: the sample's tokens.

    Returns:
        The gradients, None for a parameter that none of these tokens used.
    """
    own = partial(_own_tokens, shape=b.shape[:2], where=where)
    with torch.enable_grad(), requiring_grad(parameters, True):
        output = block(*map(own, args), **{name: own(value) for name, value in kwargs.items()})
        output = output[0] if isinstance(output, tuple) else output
        if not output.requires_grad:  # no token at all
            return (None,) * len(parameters)
        return torch.autograd.grad(output, parameters, own(b).view_as(output), allow_unused=True)


def _own_tokens(value: Any, shape: torch.Size, where: Segment) -> Any:
    """One sample's run of a tensor with an entry for each token, (B, T, ...) or (B * T, ...); all else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.shape[:2] == shape:
        return value[where.row : where.row + 1, where.tokens].detach()
    if value.shape[:1] == (shape.numel(),):
        return value.unflatten(0, shape)[where.row, where.tokens].detach()
    return value
