"""How far every layer's W_up would move, and how the change is spread over a matrix; of some rows (ResoFilter, fig. 2).

Slow and obvious: a row at a time, a backward through the whole model, every matrix of changes formed. The score of
whole datasets is `scoring.py`'s.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, ResonanceConfig
from ..data.loading import check_arguments, default_arguments, open_pass, placed
from ..model.losses import token_losses
from ..model.modes import at_least_float32, requiring_grad
from ..model.quantised import check_plain
from ..model.up_projection import UpProjection, decoder_layers, find_up_projections
from ..model.updates import closed_form
from ..scores.score_table import LAYER, LAYERS_FOLDER, ScoreTable
from .criterion import measure_rows
from .output import PassOutput

LIMIT = 500
QUANTILES = {"q25": 0.25, "q75": 0.75}
ENTRIES = 1 << 20  # of a matrix, evenly spread, that its quantiles are taken of


def score_layers(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    config: ResonanceConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    limit: int = LIMIT,
    **row_options: Any,
) -> ScoreTable:
    """Measure every layer on a random subset of the rows.

    Args:
        model, dataset, processing_class, args, row_options: as for `score_dataset`; the forward is in float32, or in
            the weights' own dtype.
        config: which step is measured and how; `n_layers` counts for nothing here.
        output: a folder; the table is written to `layers/scores.parquet` in it.
        limit: how many rows.

    Returns:
        A line for every row, as of `score_dataset`; the score is the mean over all layers. Beside `layer_<i>` there are
        `layer_<i>_q25` and `layer_<i>_q75`: quantiles of the change of a matrix's entries.

    Raises:
        InputError: as `score_dataset`; or the limit is below 1, or the model is quantised.
    """
    if limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}.")
    config, args = config or ResonanceConfig(), args or default_arguments()
    closed_form(config)  # refuses an update that has none
    folder = None if output is None else Path(output) / LAYERS_FOLDER
    check_arguments(args, folder)
    settings = {**config.to_json(), "n_layers": "all", "limit": limit}
    model, opened = open_pass(model, dataset, processing_class, args, settings, precision="float32", **row_options)
    target = PassOutput(folder, opened)
    with target.held():
        earlier = target.earlier()
        if earlier is not None:
            return earlier
        check_plain(model, "Measuring all layers")
        model = placed(model, args)
        found = find_up_projections(model, len(decoder_layers(model)[1]), config.up_projection)
        prepared = opened.prepared
        places = np.sort(np.random.default_rng(0).permutation(len(prepared.lengths))[:limit])
        reasons = dict.fromkeys(prepared.sample_ids.tolist(), f"not among the {len(places)} rows of --limit")
        some = prepared.select(places)
        for row in some.sample_ids.tolist():
            del reasons[row]
        label = "Measuring all layers"
        values = measure_rows(_Changes(found, config), model, some, args, 1, label, target.parts(1))
        layers = sorted({each.layer for each in found})
        names = [f"{LAYER}{layer}{part}" for layer in layers for part in ("", *(f"_{name}" for name in QUANTILES))]
        columns = dict(zip(names, values[:, 1:].T, strict=True))
        score = np.mean([columns[f"{LAYER}{layer}"] for layer in layers], axis=0)
        opened = dataclasses.replace(opened, prepared=some, reasons={**reasons, **opened.reasons})
        return PassOutput(folder, opened).finish({"score": score, "loss": values[:, 0], **columns})


@dataclass(frozen=True)
class _Changes:
    """Of a batch of one row: its loss, and for each layer the size of the change and its quantiles, (1, 1 + 3 L)."""

    up_projections: tuple[UpProjection, ...]
    config: ResonanceConfig

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if len(batch["input_ids"]) != 1:
            raise ValueError("one row at a time")
        parameters = [each.parameter for each in self.up_projections]
        with torch.enable_grad(), requiring_grad(parameters, True):
            loss = token_losses(model, batch).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        changes: dict[int, list[Tensor]] = {}
        for each, gradient in zip(self.up_projections, gradients, strict=True):
            changes.setdefault(each.layer, []).append(self._change(each, gradient).flatten())
        values = [self._values(torch.cat(changes[layer])) for layer in sorted(changes)]
        return torch.cat([loss.detach().double().reshape(1), *values])[None]

    def _change(self, each: UpProjection, gradient: Tensor | None) -> Tensor:
        """What one step changes, its size, entry by entry; nothing where the loss does not depend on the weight."""
        weight = at_least_float32(each.plain_weight())
        if gradient is None:
            return torch.zeros_like(weight)
        own = at_least_float32(each.up(gradient)).clone()
        return closed_form(self.config)(own, weight, self.config).abs_().mul_(self.config.lr)

    def _values(self, change: Tensor) -> Tensor:
        """(3,) float64."""
        size = change.mean(dtype=torch.float64) if self.config.norm == "mean_abs" else change.double().norm()
        some = change[:: -(-len(change) // ENTRIES)]
        levels = torch.tensor(list(QUANTILES.values()), dtype=some.dtype, device=some.device)
        return torch.cat([size[None], torch.quantile(some, levels).double()])
