"""What one optimizer step does to one weight, as a record. Knows nothing of models, layers or samples.

The first step of a fresh optimizer has a closed form, so no optimizer is built and no weight is touched:

    adamw   (w - w') / lr = g / (|g| + eps) + weight_decay * w      (derived from ResoFilter's released step)
    sgd     (w - w') / lr = g

A new update is a name in `config.UpdateName` and a record in `UPDATES`; the tests bind the record's two forms.

A matrix of changes becomes one number, `mean_abs` or `l2`, from a sum over its entries. The entries of an update that
saturates are close to 1, and samples differ in the small distance to 1, which a float32 sum of such numbers loses.
Therefore the sum is of `1 - |change|` (or `1 - change**2`), and at the end it is subtracted from the number of entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..config import OPTIMIZER, SATURATING, InputError, ResonanceConfig, UpdateName

Step = Callable[[Tensor, Tensor, ResonanceConfig], Tensor]
Optimizer = Callable[[Iterable[nn.Parameter], ResonanceConfig], torch.optim.Optimizer]
Form = TypeVar("Form")


@dataclass(frozen=True)
class Update:
    """One optimizer's first step, in two forms that give the same weights. A run's own optimizer has neither.

    Attributes:
        what: a description, for messages.
        step: the closed form, `(gradient, weight, config) -> change / lr`, which may overwrite the gradient.
        optimizer: the literal form, `(parameters, config) -> a fresh optimizer` whose `step()` makes that change.
        saturates: whether the entries of `change / lr` are close to 1 for gradients far above eps.
        is_gradient: whether `change / lr` is the gradient itself, so that its L2 norm needs no gradient matrix.
    """

    what: str
    step: Step | None = None
    optimizer: Optimizer | None = None
    saturates: bool = False
    is_gradient: bool = False


def adamw(gradient: Tensor, weight: Tensor, config: ResonanceConfig) -> Tensor:
    """`g / (|g| + eps) + weight_decay * w`, in place of `gradient`: a fresh AdamW's first step over lr."""
    size = gradient.abs().add_(config.eps)
    return gradient.div_(size).add_(weight, alpha=config.weight_decay)


def sgd(gradient: Tensor, weight: Tensor, config: ResonanceConfig) -> Tensor:
    """`g`: plain SGD's step over lr, without momentum or weight decay."""
    return gradient


UPDATES: dict[UpdateName, Update] = {
    "adamw": Update(
        what="the first step of a fresh AdamW",
        step=adamw,
        optimizer=lambda parameters, config: torch.optim.AdamW(
            parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay
        ),
        saturates=True,
    ),
    "sgd": Update(
        what="a step of plain SGD",
        step=sgd,
        optimizer=lambda parameters, config: torch.optim.SGD(parameters, lr=config.lr),
        is_gradient=True,
    ),
    "optimizer": Update(what="what a training run's own optimizer did"),
}


def check_updates(updates: Mapping[UpdateName, Update]) -> None:
    """Raise InputError for a name without a record, or a record that lacks a name or a form or contradicts config."""
    for name in sorted({*get_args(UpdateName)} ^ {*updates}):
        lacking = "config.UpdateName" if name in updates else "model.updates.UPDATES"
        raise InputError(f"update={name!r} is missing in {lacking}: an update has a name and a record.")
    for name, update in updates.items():
        for form in ("step", "optimizer"):
            if name != OPTIMIZER and getattr(update, form) is None:
                raise InputError(f"update={name!r} has no {form}: it needs both its closed and its literal form.")
        if update.saturates != (name in SATURATING):
            raise InputError(f"update={name!r} saturates in its record or in config.SATURATING only: say it in both.")


check_updates(UPDATES)


def closed_form(config: ResonanceConfig) -> Step:
    """The closed form of the update. Raises InputError for a run's own optimizer, which has none."""
    return _form_of(config, UPDATES[config.update].step)


def fresh_optimizer(parameters: Iterable[nn.Parameter], config: ResonanceConfig) -> torch.optim.Optimizer:
    """An optimizer whose first step is the update. Raises InputError for a run's own optimizer."""
    return _form_of(config, UPDATES[config.update].optimizer)(parameters, config)


def _form_of(config: ResonanceConfig, form: Form | None) -> Form:
    if form is None:
        others = " or ".join(f"update={name!r}" for name in UPDATES if name != OPTIMIZER)
        raise InputError(
            f"update={config.update!r} is {UPDATES[config.update].what}: only ResonanceCallback sees it. Use {others}."
        )
    return form


def tile_sum(gradient: Tensor, weight: Tensor, config: ResonanceConfig) -> Tensor:
    """What one tile of a weight adds to its matrix's sum, a float64 scalar for `size_of_change`.

    Args:
        gradient: (rows, columns), the sample's gradient of the tile; overwritten.
        weight: (rows, columns), in the gradient's dtype.
        config: update, norm, eps and weight_decay.
    """
    change = closed_form(config)(gradient, weight, config)
    size = change.abs_() if config.norm == "mean_abs" else change.square_()
    if UPDATES[config.update].saturates:
        size = size.neg_().add_(1)
    return size.sum(-1).sum(dtype=torch.float64)


def unchanged_sum(entries: int, config: ResonanceConfig) -> float:
    """What `tile_sum` is for a weight with this many entries that has no gradient, which every optimizer skips."""
    return float(entries) if UPDATES[config.update].saturates else 0.0


def size_of_change(sums: np.ndarray, entries: np.ndarray, config: ResonanceConfig) -> np.ndarray:
    """Each matrix's change as one number in the unit of the weights.

    Args:
        sums: (..., L) float64, `tile_sum` summed over the tiles of L matrices; where the change is the gradient, its
            squared norm for the L2 norm.
        entries: (L,) the number of weights in each matrix.
        config: update, norm and lr.
    """
    sums = entries - sums if UPDATES[config.update].saturates else sums
    return config.lr * (sums / entries if config.norm == "mean_abs" else np.sqrt(np.maximum(sums, 0.0)))
