"""One optimizer step on one weight, as a pure function. Knows nothing of models, layers or samples.

The first step of a fresh optimizer has a closed form, so no optimizer is built and no weight is touched:

    adamw   (w - w') / lr = g / (|g| + eps) + weight_decay * w      (derived from ResoFilter's released step)
    sgd     (w - w') / lr = g

A matrix of changes becomes one number, `mean_abs` or `l2`, from a sum over its entries. AdamW's entries lie close to
one, and what tells samples apart is the small distance to it, which a float32 sum of numbers near one loses. So what
is summed there is `1 - |change|` (or `1 - change**2`), and the number of entries puts it right at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..config import ResonanceConfig, Update


def adamw(gradient: Tensor, weight: Tensor, config: ResonanceConfig) -> Tensor:
    """`g / (|g| + eps) + weight_decay * w`, in place of `gradient`: a fresh AdamW's first step over lr."""
    size = gradient.abs().add_(config.eps)
    return gradient.div_(size).add_(weight, alpha=config.weight_decay)


def sgd(gradient: Tensor, weight: Tensor, config: ResonanceConfig) -> Tensor:
    """`g`: plain SGD's step over lr, without momentum or weight decay."""
    return gradient


UPDATES: dict[Update, Callable[[Tensor, Tensor, ResonanceConfig], Tensor]] = {"adamw": adamw, "sgd": sgd}


def tile_sum(gradient: Tensor, weight: Tensor, config: ResonanceConfig) -> Tensor:
    """What one tile of a weight adds to its matrix's sum, a float64 scalar for `size_of_change`.

    Args:
        gradient: (rows, columns), the sample's gradient of the tile; overwritten.
        weight: (rows, columns), in the gradient's dtype.
        config: update, norm, eps and weight_decay.
    """
    change = UPDATES[config.update](gradient, weight, config)
    size = change.abs_() if config.norm == "mean_abs" else change.square_()
    if config.update == "adamw":
        size = size.neg_().add_(1)
    return size.sum(-1).sum(dtype=torch.float64)


def unchanged_sum(entries: int, config: ResonanceConfig) -> float:
    """What `tile_sum` is for a weight of so many entries that the optimizer skips, as it has no gradient at all."""
    return float(entries) if config.update == "adamw" else 0.0


def size_of_change(sums: np.ndarray, entries: np.ndarray, config: ResonanceConfig) -> np.ndarray:
    """Each matrix's change as one number in the unit of the weights.

    Args:
        sums: (..., L) float64, `tile_sum` summed over the tiles of L matrices; for plain SGD's L2 norm, the squared
            norm of the gradient.
        entries: (L,) the number of weights in each matrix.
        config: update, norm and lr.
    """
    sums = entries - sums if config.update == "adamw" else sums
    return config.lr * (sums / entries if config.norm == "mean_abs" else np.sqrt(np.maximum(sums, 0.0)))
