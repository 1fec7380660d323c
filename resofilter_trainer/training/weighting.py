"""Rows whose loss is weighted in SFTTrainer's own loss. Knows TRL's outputs and batches, no scores.

    loss = sum over samples of w_s * sum over its tokens of -log p, over the number of tokens of the step

which is what SFTTrainer computes, apart from w_s. With weights `n / kept` for a group of `n` rows of which `kept` are
kept, its expected gradient is that of all rows (InfoBatch, Qin et al., arXiv 2303.04947).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import InputError, check_kind, with_known_keywords
from ..model.gradients import Segment, segments_of
from ..model.losses import learnt_positions
from ..selecting.selection import Selection
from ..selecting.weighted_rows import WEIGHT, column_of_weights, reminder_of
from . import trainer_access as access
from .refusals import check_checkpoint, check_sample_weights, check_weighable, refuse_both_weights
from .sampler import ROW, RowCollator
from .trainer_patches import LoaderPatch


@with_known_keywords
class SampleWeights(TrainerCallback):
    """Weights each row's loss by the weights of a selection, in a training on the rows that it keeps.

    >>> selection = SoftPruning(keep=0.5).select(scores)
    >>> SFTTrainer(model, train_dataset=selection.apply(dataset), callbacks=[SampleWeights.of(selection)]).train()

    Args:
        weight: (N,) the weight of every row of the dataset that is passed to the trainer.

    Raises:
        InputError: here, where a weight is negative or not finite; when training begins, where the trainer has another
            loss, another number of rows, or rows with other weights in their column `resofilter_weight`.
    """

    def __init__(self, weight: Sequence[float] | np.ndarray) -> None:
        numbers = np.asarray(weight)
        if numbers.dtype.kind not in "biuf":
            raise InputError(f"weight must be one number for every row, got {weight!r}.")
        self.weight = numbers.astype(np.float64)
        if self.weight.ndim != 1 or not np.isfinite(self.weight).all() or (self.weight < 0).any():
            raise InputError("weight must be one finite number of at least 0 for every row.")
        self._selection: Selection | None = None
        self._release: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, selection: Selection) -> SampleWeights:
        """The weights in the column that `selection.apply` adds to its rows; 1 where all rows count alike.

        The rows may be shuffled, sorted, filtered, split or joined with others that have the column.
        """
        check_kind("selection", selection, Selection, "a Selection")
        kept = np.ones(int(selection.keep.sum())) if selection.weight is None else selection.weight[selection.keep]
        weights = cls(kept)
        weights._selection = selection
        return weights

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the weights to the batches, and apply them to the model's outputs."""
        self._release()
        trainer, _ = access.calling_trainer()
        loader = kwargs["train_dataloader"]
        if sum(isinstance(each, SampleWeights) for each in trainer.callback_handler.callbacks) > 1:
            raise InputError("SampleWeights was added twice: multiply the weights, and add it once.")
        check_sample_weights(trainer, loader)
        check_checkpoint(trainer, type(self).__name__)
        refuse_both_weights(trainer)
        weight = self._of_rows(trainer)
        remove = weigh_batches(trainer, loader, lambda inner: _WeightCollator(RowCollator(inner), weight))
        reminder = reminder_of(trainer.train_dataset)
        due = reminder is not None and reminder.due
        if reminder is not None:
            reminder.due = False

        def release() -> None:
            remove()
            if reminder is not None:
                reminder.due = due
            self._release = lambda: None

        self._release = release

    def _of_rows(self, trainer: Trainer) -> np.ndarray:
        """The weight of every row of the trainer, in its order."""
        column, rows = column_of_weights(trainer.train_dataset), access.rows_of(trainer)
        if self._selection is not None and column is not None:
            return column
        if self._selection is not None and self._selection.has_weights:
            raise InputError(
                f"The trainer's rows have no column '{WEIGHT}', so which weight is whose is unknown. Keep the column "
                "that selection.apply adds; or, if these are the kept rows in their order, pass "
                "SampleWeights(selection.kept_weights())."
            )
        if self._selection is not None:
            return np.ones(len(rows.sample_ids))
        if rows.total != len(self.weight):
            raise InputError(
                f"There are {len(self.weight)} weights and the dataset has {rows.total} rows: pass one for each."
            )
        weight = self.weight[rows.sample_ids]
        if column is not None and len(other := np.flatnonzero(~np.isclose(column, weight))):
            raise InputError(
                f"Row {rows.sample_ids[other[0]]} has the weight {column[other[0]]:g} in its column '{WEIGHT}', and "
                f"{weight[other[0]]:g} in SampleWeights. Pass SampleWeights.of(selection), or remove the column."
            )
        return weight

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the trainer as it was found."""
        self._release()


def weigh_batches(
    trainer: Trainer, loader: Any, collator: Callable[[Any], Any], see: Callable[[Tensor, Tensor], None] | None = None
) -> Callable[[], None]:
    """Let a run's batches have weights, `WEIGHT` (B, T), and apply them to the model's outputs.

    Args:
        trainer, loader: the run's trainer and its loader.
        collator: a function from the loader's collator to one that adds the weights.
        see: as for `WeightedLoss`.

    Returns:
        A function that leaves both as they were found.
    """
    patch = LoaderPatch(loader, collator)
    patch.install()
    weighted = WeightedLoss(cast(nn.Module, trainer.model), see)

    def remove() -> None:
        patch.remove()
        weighted.detach()

    return remove


class WeightedLoss:
    """Multiplies the log-probability of each token by its weight, where a batch has weights.

    Args:
        model: the model as SFTTrainer has patched it: its output has `log_probs`, (B, T - 1).
        see: a function that is called in training, with the sum of a batch's weights of learnt tokens and their number.
    """

    def __init__(self, model: nn.Module, see: Callable[[Tensor, Tensor], None] | None = None) -> None:
        self._weight: Tensor | None = None
        self._see = see
        before = model.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True)  # before FSDP2 rounds it
        self._handles = [before, model.register_forward_hook(self._weigh)]

    def detach(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()

    def _take(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._weight = kwargs.pop(WEIGHT, None)
        if self._weight is not None and self._see is not None and model.training:
            learnt = learnt_positions(kwargs["labels"])
            self._see((self._weight[:, 1:] * learnt).sum(), learnt.sum())
        return args, kwargs

    def _weigh(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._weight is not None:
            output.log_probs = output.log_probs * self._weight[:, 1:]


class BatchWeights:
    """Adds the weights of rows to a run's batches; the model is hooked once there are any.

    Args:
        trainer, train_dataloader: the run's trainer and its loader.
    """

    def __init__(self, trainer: Trainer, train_dataloader: Any) -> None:
        self._trainer, self._loader = trainer, train_dataloader
        self._weighted: WeightedLoss | None = None

    def put(self, batches: Sequence[Any], rows: Sequence[np.ndarray], weights: np.ndarray) -> None:
        """Add the weights of their rows to some micro-batches.

        Args:
            batches: the micro-batches, changed in place.
            rows: the rows of each, an array for each micro-batch.
            weights: (N,) the weight of every row of the trainer.
        """
        if self._weighted is None:
            check_weighable(self._trainer, self._loader)
            self._weighted = WeightedLoss(cast(nn.Module, self._trainer.model))
        for batch, own_rows in zip(batches, rows, strict=True):
            segments = segments_of(batch)[: len(own_rows)]
            batch[WEIGHT] = token_weights(batch["labels"], segments, weights_of(own_rows, weights).tolist())

    def refusal(self, weights: np.ndarray | None) -> InputError | None:
        """Why rows cannot have these weights; None where they can, or all weigh the same."""
        if weights is None or self._weighted is not None:
            return None
        try:
            check_weighable(self._trainer, self._loader)
        except InputError as error:
            return error
        return None

    def detach(self) -> None:
        """Leave the model as it was found."""
        if self._weighted is not None:
            self._weighted.detach()
        self._weighted = None


def weights_of(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights of the rows of a batch; 1 for a filler, which has no loss."""
    return np.where(rows < 0, 1.0, weights[rows])


def token_weights(labels: Tensor, segments: Sequence[Segment], weights: Sequence[float]) -> Tensor:
    """The weight of each token, (B, T) float32: that of its sample; 1 outside of all samples."""
    found = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    for where, weight in zip(segments, weights, strict=True):
        found[where.row, where.tokens] = weight
    return found


class _WeightCollator:
    """A collator whose batches contain the weights of their tokens."""

    def __init__(self, inner: RowCollator, weight: np.ndarray) -> None:
        self.inner, self.weight = inner, weight

    def __call__(self, examples: list[Any]) -> Mapping[str, Any]:
        """Collate, in the main process or in a worker."""
        batch = self.inner(examples)
        rows = batch.pop(ROW).numpy()
        segments = segments_of(batch)[: len(rows)]
        batch[WEIGHT] = token_weights(batch["labels"], segments, weights_of(rows, self.weight).tolist())
        return batch
