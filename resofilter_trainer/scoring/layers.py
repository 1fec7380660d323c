"""How far every layer's W_up would move on some rows, and how the change is spread over a matrix (ResoFilter, fig. 2).

Slow and obvious: one row at a time, a backward through the whole model, every matrix of changes in full. For whole
datasets there is `score_dataset`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import ResonanceConfig, Warmup, whole_number
from ..config.keywords import RowOptions
from ..data.arguments import check_call
from ..data.loading import Opened, default_arguments, placed
from ..model.effective import check_maps, effective_weight, standing_in, unshared
from ..model.losses import token_losses
from ..model.modes import at_least_float32, requiring_grad
from ..model.quantised import check_plain
from ..model.up_projection import UpProjection, decoder_layers
from ..model.updates import closed_form
from ..scores.score_table import LAYER, LAYERS_FOLDER, ScoreTable
from .criterion import measure_rows
from .output import Measured, PassOutput, warn_of_doubts
from .run_pass import run_pass
from .warmup import kept_at

LIMIT = 500
QUANTILES = {"q25": 0.25, "q75": 0.75}
ENTRIES = 1 << 20  # the quantiles of a matrix are those of so many entries, evenly spread


def score_layers(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    config: ResonanceConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    limit: int = LIMIT,
    warmup: int | Warmup | None = None,
    warmup_dataset: Dataset | None = None,
    **row_options: Unpack[RowOptions],
) -> ScoreTable:
    """Measure every layer on a random subset of the rows.

    Args:
        model, dataset, processing_class, args, warmup, warmup_dataset, **row_options: as for `score_dataset`; the
            forward runs in float32, or in the weights' own dtype.
        config: the step to measure, and how; `n_layers` has no effect here.
        output: a folder; the table is written to `layers/scores.parquet` in it.
        limit: the number of rows to measure.

    Returns:
        A table with every row of the dataset, as from `score_dataset`; the score is the mean over all layers. Beside
        `layer_<i>` it has `layer_<i>_q25` and `layer_<i>_q75`: quantiles of the change of a matrix's entries.

    Raises:
        InputError: as for `score_dataset`; or the limit is below 1, or the model is quantised.
    """
    check_call(score_layers, row_options, model, processing_class, args, config)
    limit = whole_number("limit", limit, least=1)
    config, args = config or ResonanceConfig(), args or default_arguments()
    closed_form(config)  # refuses an update that has none
    folder = None if output is None else Path(output) / LAYERS_FOLDER
    settings = {**config.to_json(), "n_layers": "all", "limit": limit}

    label = "Measuring all layers"

    def place(model: PreTrainedModel, args: SFTConfig) -> PreTrainedModel:
        check_plain(model, label)  # a quantised model refuses to be moved
        return placed(model, args)

    def measure(model: PreTrainedModel, opened: Opened, target: PassOutput) -> Measured:
        prepared = opened.prepared
        rows = np.sort(np.random.default_rng(0).permutation(len(prepared.lengths))[:limit])
        with unshared(model, len(decoder_layers(model)[1]), config.up_projection) as found:
            check_maps(found)
            changes, parts = _Changes(found, config), target.parts(1)
            values = measure_rows(changes, model, prepared.select(rows), args, 1, label, parts)
        layers = sorted({each.layer for each in found})
        names = [f"{LAYER}{layer}{end}" for layer in layers for end in ("", *(f"_{name}" for name in QUANTILES))]
        columns = dict(zip(names, values[:, 1:].T, strict=True))
        score = np.mean([columns[f"{LAYER}{layer}"] for layer in layers], axis=0)
        columns = {"score": score, "loss": values[:, 0], **columns}
        return Measured(columns, rows=rows, others=f"not among the {len(rows)} random rows that were measured")

    scores = run_pass(
        model, dataset, processing_class, args, settings, folder, measure,
        place=place, gradients=True, precision="float32",
        warmup=kept_at(warmup, warmup_dataset, output), warmup_dataset=warmup_dataset, **row_options,
    )  # fmt: skip
    warn_of_doubts(scores, stacklevel=3)
    return scores


@dataclass(frozen=True)
class _Changes:
    """Measures one row: its loss, and of each layer the size of the change and its quantiles, (1, 1 + 3 L)."""

    up_projections: tuple[UpProjection, ...]
    config: ResonanceConfig

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if len(batch["input_ids"]) != 1:
            raise ValueError("one row at a time")
        with torch.enable_grad(), standing_in(self.up_projections) as parameters, requiring_grad(parameters, True):
            loss = token_losses(model, batch).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = list(zip(self.up_projections, gradients, strict=True))
        used = {each.module for each, gradient in found if gradient is not None}
        changes: dict[int, list[Tensor]] = {}
        for each, gradient in found:
            changes.setdefault(each.layer, []).append(self._change(each, gradient, each.module in used).flatten())
        values = [self._values(torch.cat(changes[layer])) for layer in sorted(changes)]
        return torch.cat([loss.detach().double().reshape(1), *values])[None]

    def _change(self, each: UpProjection, gradient: Tensor | None, used: bool) -> Tensor:
        """The size of what one step changes, entry by entry; zero where the loss does not depend on the module."""
        weight = at_least_float32(effective_weight(each))
        if not used:
            return torch.zeros_like(weight)
        own = torch.zeros_like(weight) if gradient is None else at_least_float32(each.up(gradient)).clone()
        return closed_form(self.config)(own, weight, self.config).abs_().mul_(self.config.lr)

    def _values(self, change: Tensor) -> Tensor:
        """The size of a change and its quantiles, (3,) float64."""
        size = change.mean(dtype=torch.float64) if self.config.norm == "mean_abs" else change.double().norm()
        some = change[:: -(-len(change) // ENTRIES)]
        levels = torch.tensor(list(QUANTILES.values()), dtype=some.dtype, device=some.device)
        return torch.cat([size[None], torch.quantile(some, levels).double()])
