"""Passes with a forward of their own, which follow the scoring pass. Knows rows, batches and processes, no signal.

a row's tokens -> changed, such as without its prompt -> batches of similar lengths -> numbers of each row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..config import NotFiniteError
from ..data.preparation import PreparedRows
from ..model.head import PROBE, Way, find_way
from ..model.losses import IGNORE, TokenBatch
from ..model.modes import bfloat16_forward, evaluating, own_precision
from ..model.sharding import group_of
from .batches import padded_tokens, split_by_tokens
from .passes import Parts, measure_batches

COUNTS = "counts"  # of the learnt tokens of each row, beside the numbers that a forward gives
Measure = Callable[[nn.Module, TokenBatch, Way], Mapping[str, Tensor]]
Change = Callable[[list[int], list[int]], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Forward:
    """What a model sees of each row, and what is measured then.

    Attributes:
        label: the text of the progress bar.
        measure: a function of `criteria.forwards` or one like it, to numbers of shape (B,) by name.
        change: a function from a row's tokens and labels to those that the model sees; by default these are the row's.
    """

    label: str
    measure: Measure
    change: Change | None = None


@dataclass(frozen=True)
class FurtherPass:
    """How all forwards of a pass run.

    Attributes:
        prepared: the rows.
        args: as for `score_dataset`.
        budget: the tokens of a batch, padding included.
        autocast: whether the forward runs in bfloat16 autocast, as that of the scoring pass.
        parts: where to save results, and to resume from.
    """

    prepared: PreparedRows
    args: TrainingArguments
    budget: int
    autocast: bool = False
    parts: Parts | None = None

    def measure(self, model: nn.Module, name: str, forward: Forward) -> dict[str, np.ndarray]:
        """Each number of every row, (N,) float64 in the order of the prepared rows, and the row's learnt tokens.

        A row without a learnt token after the change has NaN. Every process takes a share of the rows and gets all
        numbers.

        Args:
            model: the model, on its device.
            name: the name of the forward, for the parts.
            forward: the forward.

        Raises:
            NotFiniteError: a number is not finite; the message names the row.
        """
        lengths, counts = self._sizes(forward)
        rows = np.flatnonzero(counts)
        found = self._measure(model, name, forward, rows, lengths[rows]) if len(rows) else {}
        spread = {key: np.full(len(counts), np.nan) for key in found}
        for key, values in found.items():
            spread[key][rows] = values
        return {**spread, COUNTS: counts}

    def _measure(
        self, model: nn.Module, name: str, forward: Forward, rows: np.ndarray, lengths: np.ndarray
    ) -> dict[str, np.ndarray]:
        device = next(model.parameters()).device
        places = split_by_tokens(lengths, self.budget)
        batches = [rows[some] for some in places]
        store = None
        if self.parts is not None:
            folder = self.parts.folder / f"{name}-{'bfloat16' if self.autocast else 'float32'}"
            store = dataclasses.replace(self.parts, folder=folder).store(self.prepared.sample_ids, batches)
        with (
            evaluating(model), torch.no_grad(), own_precision(model), bfloat16_forward(model, self.autocast)
        ):  # fmt: skip
            way = find_way(model, self._collated(batches[0][:1], forward, device)["input_ids"][:, :PROBE])

            def of_batch(number: int) -> dict[str, Any]:
                batch = self._collated(batches[number], forward, device)
                measured = forward.measure(model, batch, way)
                numbers = {key: value.double().cpu().numpy() for key, value in measured.items()}
                self._check_finite(numbers, batches[number], name)
                return numbers

            costs = padded_tokens(lengths, places)
            table = measure_batches(batches, costs, of_batch, self.args, forward.label, store, group_of(model))
        order = np.argsort(np.concatenate(places), kind="stable")
        return {key: table[key].to_numpy()[order] for key in table.column_names if key != "unit"}

    def _sizes(self, forward: Forward) -> tuple[np.ndarray, np.ndarray]:
        """The tokens and the learnt tokens of each row after the change, (N,) each."""
        if forward.change is None:
            return self.prepared.lengths, self.prepared.num_tokens
        lengths, counts = list[int](), list[int]()
        for row in self.prepared.dataset:
            changed = self._changed(row, forward)
            lengths.append(len(changed["input_ids"]))
            counts.append(sum(label != IGNORE for label in changed["labels"][1:]))
        return np.array(lengths), np.array(counts)

    def _changed(self, row: Any, forward: Forward) -> dict[str, list[int]]:
        ids, labels = row["input_ids"], row["labels"]
        if forward.change is not None:
            ids, labels = forward.change(ids, labels)
        return {"input_ids": ids, "labels": labels}

    def _collated(self, rows: np.ndarray, forward: Forward, device: torch.device) -> dict[str, Tensor]:
        examples = [self._changed(self.prepared.dataset[int(row)], forward) for row in rows]
        batch: dict[str, Tensor] = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _check_finite(self, numbers: Mapping[str, np.ndarray], rows: np.ndarray, name: str) -> None:
        broken = ~np.isfinite(np.stack([*numbers.values()])).all(0)
        if broken.any():
            row = self.prepared.sample_ids[rows[int(np.argmax(broken))]]
            raise NotFiniteError(
                f"Row {row} of the dataset has a number that is not finite ({name}): no scores were written. Are the "
                "weights sound? Try float32, or drop the row."
            )
