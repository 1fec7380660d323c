"""The change of W_up in a step of the run's own optimizer, from the weights before and after. Knows no batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import InputError, ResonanceConfig
from .effective import check_maps, effective_weight
from .modes import at_least_float32
from .resonance import layer_values
from .sharding import gathered, own_part, sum_over_shards
from .training_recorder import TrainingRecorder
from .up_projection import UpProjection, find_up_projections
from .updates import UPDATES


class StepRecorder:
    """Measures what the run's own optimizer does to W_up in one step, by comparing the weights before and after.

    With an adapter, the weight is the effective one: for LoRA, `W + scaling * B A`.

    Args:
        model: the model in training.
        config: the layers and the norm.

    Raises:
        InputError: the map of an adapted up-projection is not a matrix; or no up-projection is trained.
    """

    def __init__(self, model: nn.Module, config: ResonanceConfig) -> None:
        self._up_projections = find_up_projections(model, config.n_layers, config.up_projection)
        self._config = config
        self._before: list[Tensor] = []
        check_maps(self._up_projections)
        if not any(_is_trained(each) for each in self._up_projections):
            raise InputError(
                "update='optimizer' sees no change: no measured up-projection is trained, and none has a trained "
                "adapter. Use update='adamw', which needs the gradient only."
            )

    def before(self) -> None:
        """Store the weights before the step; of a sharded one that has no adapter, the shard of this process."""
        self._before = [_compared(each).clone() for each in self._up_projections]

    def after(self) -> np.ndarray:
        """(L,) the change of each measured layer since `before`, in the unit of the weights."""
        changes = [_compared(each) - old for each, old in zip(self._up_projections, self._before, strict=True)]
        self._before = []
        if any(isinstance(each.parameter, DTensor) for each in self._up_projections):
            return self._over_shards(changes)
        return np.array(layer_values(self._up_projections, changes, self._config))

    def _over_shards(self, changes: Sequence[Tensor]) -> np.ndarray:
        """What `layer_values` gives of the whole weights, from those parts of their changes that this process has."""
        layers = sorted({each.layer for each in self._up_projections})
        sums, entries = torch.zeros(2, len(layers), dtype=torch.float64), np.zeros(len(layers))
        for each, change in zip(self._up_projections, changes, strict=True):
            size = change.double().abs() if self._config.norm == "mean_abs" else change.double().square()
            sums[int(each.adapted), layers.index(each.layer)] += size.sum().cpu()
            entries[layers.index(each.layer)] += each.entries
        sharded = next(each.parameter for each in self._up_projections if isinstance(each.parameter, DTensor))
        total = (sum_over_shards(sums[0], sharded).cpu() + sums[1]).numpy()  # an adapted weight is whole everywhere
        return total / entries if self._config.norm == "mean_abs" else np.sqrt(total)


def recorders(model: nn.Module, config: ResonanceConfig, samples: int) -> tuple[TrainingRecorder, StepRecorder | None]:
    """The recorders of a run: of each sample's gradient, or for an update without a closed form of the weights.

    Args:
        model: the model in training.
        config: the step to measure, and how.
        samples: the number of samples of a step, over all processes.

    Raises:
        InputError: the update has no closed form, and a step has several samples.
    """
    if UPDATES[config.update].step is not None:
        return TrainingRecorder(model, config), None
    if samples != 1:
        raise InputError(
            f"update='optimizer' sees one change for a whole step, and yours has {samples} samples (batch x "
            "accumulation x processes). Use 1 sample, or update='adamw'."
        )
    return TrainingRecorder(model, None), StepRecorder(model, config)


def _is_trained(each: UpProjection) -> bool:
    """Whether the optimizer changes the weight or an adapter around it."""
    adapters = {*each.outer.parameters()} - {*each.owner.parameters()}
    return any(parameter.requires_grad for parameter in (each.parameter, *adapters))


def _compared(each: UpProjection) -> Tensor:
    """The effective weight; of a sharded one without an adapter the part that this process has."""
    if not each.adapted:
        return at_least_float32(own_part(each))
    with gathered(each.outer):
        return at_least_float32(effective_weight(each))
