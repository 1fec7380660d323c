"""Each sample's gradient of a weight, from a batch's backward. Knows nothing of losses, optimizers or scores.

For a linear map `y = x W^T`, with `a` (T, I) the sample's input and `b` (T, O) the loss gradient at its output, the
gradient of W is `b^T a`, (O, I). It is computed a few rows at a time, so that each tile is used while in the cache.
A block that is not a linear map, such as fused experts, runs again for each sample alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import InputError
from .modes import at_least_float32, evaluating, requiring_grad, same_but_for

TILE_ENTRIES = {"cpu": 1 << 18}  # a megabyte of float32: stays in the cache of a core
TILE_ENTRIES_ELSEWHERE = 1 << 25  # few launches, 128 MB
PROBE = 16  # tokens of a trial run
ROUNDING = 1e-2  # between two shapes of a batch, also in bfloat16, relative


@dataclass(frozen=True)
class Segment:
    """Where one sample is in a batch: the row, and the tokens of that row."""

    row: int
    tokens: slice


def segments_of(batch: Mapping[str, Tensor]) -> list[Segment]:
    """The samples of a batch: its rows without padding, or the samples in the rows of a padding-free batch.

    Args:
        batch: `attention_mask` (B, T), 0 on padding; or, without a mask, `position_ids` (B, T) that restart at 0 with
            every sample.

    Raises:
        InputError: the mask is no row of numbers for each row of the batch.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        if mask.dim() != 2:
            raise InputError(f"attention_mask must be (B, T), 0 on padding, got {tuple(mask.shape)}.")
        return [Segment(row, _run(tokens)) for row, tokens in enumerate(mask.bool().cpu().numpy())]
    if positions is None or positions.dim() != 2:
        return [Segment(row, slice(0, tokens.shape[0])) for row, tokens in enumerate(batch["input_ids"])]
    segments = []
    for row, own in enumerate(positions):
        starts = (own == 0).nonzero()[:, 0].tolist()
        found = [slice(*each) for each in zip(starts, [*starts[1:], len(own)], strict=True)]
        if len(positions) > 1:  # each row is one sample, and padding has position 0
            found = [each for each in found if each.stop - each.start > 1][:1] or found[:1]
        segments += [Segment(row, each) for each in found]
    return segments


def runs_of(counts: Tensor) -> list[Segment]:
    """Samples that follow each other in one row; `counts` (B,) is the number of tokens of each."""
    ends = counts.cumsum(0).tolist()
    return [Segment(0, slice(start, end)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def spans(b: Tensor, segments: Sequence[Segment]) -> list[Segment]:
    """The shortest run of tokens of each sample outside which its gradient is zero.

    Args:
        b: (B, T, O) loss gradient, zero after the last learnt token.
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
    """The positions from the first one in use to the last."""
    positions = used.nonzero()[0]
    return slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(0, 0)


def tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of `b^T a`, a tile at a time.

    Args:
        a: (T, I) input of the linear map.
        b: (T, O) gradient at its output.

    Yields:
        The slice of rows and their gradient, (rows, I). The caller may overwrite it; the next tile reuses its memory.
    """
    inputs, outputs = a.shape[1], b.shape[1]
    rows = max(1, TILE_ENTRIES.get(a.device.type, TILE_ENTRIES_ELSEWHERE) // inputs)
    buffer = a.new_empty(min(rows, outputs), inputs)
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        yield slice(start, stop), torch.mm(b[:, start:stop].T, a, out=buffer[: stop - start])


def gram_is_cheaper(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether two (T, T) Gram matrices take fewer FLOPs than the (O, I) gradient: T < I * O / (I + O)."""
    return tokens * (inputs + outputs) < inputs * outputs


def squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """The squared Frobenius norm `||b^T a||^2` as `sum((a a^T) * (b b^T))`, without the gradient; a float64 scalar."""
    return ((a @ a.T) * (b @ b.T)).sum(dtype=torch.float64)


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor among the arguments of a call."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


@torch.no_grad()
def is_token_by_token(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shape: torch.Size) -> bool:
    """Whether a block gives the same for tokens without the one before them; `shape` is that of the batch, (B, T)."""
    if shape[1] < 2:
        return True
    outputs = []
    for start in (0, 1):
        own = partial(_own_tokens, shape=shape, where=Segment(0, slice(start, min(PROBE, shape[1]))))
        try:
            with evaluating(block):
                output = block(*map(own, args), **{name: own(value) for name, value in kwargs.items()})
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a block that needs more than its tokens, each with an error of its own
            return False
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(at_least_float32(output.flatten(0, -2)))
    whole, part = outputs
    return len(whole) == len(part) + 1 and same_but_for(ROUNDING, whole[1:], part)


def block_gradients(
    block: nn.Module,
    parameters: Sequence[nn.Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    b: Tensor,
    where: Segment,
) -> tuple[Tensor | None, ...]:
    """One sample's gradients of parameters anywhere in a block, from running the block again on the sample's tokens.

    Args:
        block: a module that maps each token by itself to hidden states, (B, T, H) or (B * T, H), or to a tuple that
            begins with them.
        parameters: the parameters to differentiate.
        args, kwargs: the arguments of the block's call.
        b: (B, T, H) loss gradient at its output.
        where: the sample's tokens.

    Returns:
        The gradients; None for a parameter that none of these tokens uses.
    """
    own = partial(_own_tokens, shape=b.shape[:2], where=where)
    with torch.enable_grad(), requiring_grad(parameters, True):
        output = block(*map(own, args), **{name: own(value) for name, value in kwargs.items()})
        output = output[0] if isinstance(output, tuple) else output
        if not output.requires_grad:  # no token reached it
            return (None,) * len(parameters)
        return torch.autograd.grad(output, parameters, own(b).view_as(output), allow_unused=True)


def _own_tokens(value: Any, shape: torch.Size, where: Segment) -> Any:
    """One sample's tokens of a tensor (B, T, ...) or (B * T, ...); any other value unchanged."""
    if not isinstance(value, Tensor):
        return value
    if value.shape[:2] == shape:
        return value[where.row : where.row + 1, where.tokens].detach()
    if value.shape[:1] == (shape.numel(),):
        return value.unflatten(0, shape)[where.row, where.tokens].detach()
    return value
