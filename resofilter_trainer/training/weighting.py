"""Rows whose loss counts for more or less in SFTTrainer's own loss. Knows TRL's outputs and batches, no scores.

    loss = sum over samples of w_s * sum over its tokens of -log p, over the number of tokens of the update

which is what SFTTrainer computes, but for w_s. With weights `n / kept` for a part of which `kept` of `n` rows stay, its
expected gradient is that of all rows (InfoBatch, Qin et al., arXiv 2303.04947).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from ..config import InputError
from ..model.gradients import Segment, segments_of
from ..selecting.selection import Selection
from . import trainer_access as access
from .sampler import ROW, IndexedRows, RowCollator

WEIGHT = "resofilter_weight"  # (B, T) in a batch: what each token's loss counts


class SampleWeights(TrainerCallback):
    """Lets each row's loss count as much as a selection says, in a training on the rows that stay.

    >>> selection = SoftPruning(keep=0.5).select(scores)
    >>> SFTTrainer(model, train_dataset=selection.apply(dataset), callbacks=[SampleWeights.of(selection)]).train()

    Args:
        weight: (N,) for every row of the trainer's dataset, as it is passed to the trainer.

    Raises:
        InputError: a weight is negative or not finite, here; or the trainer has another loss or dataset, when training
            begins.
    """

    def __init__(self, weight: Sequence[float] | np.ndarray) -> None:
        self.weight = np.asarray(weight, dtype=np.float64)
        if self.weight.ndim != 1 or not np.isfinite(self.weight).all() or (self.weight < 0).any():
            raise InputError("weight is one finite number of at least 0 for every row.")
        self._release: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, selection: Selection) -> SampleWeights:
        """The weights of the rows that stay; 1 where the selection has none."""
        return cls(np.ones(int(selection.keep.sum())) if selection.weight is None else selection.weight[selection.keep])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let batches say what their tokens count, and the model's outputs follow."""
        self._release()
        trainer, _ = access.calling_trainer()
        loader = kwargs["train_dataloader"]
        if sum(isinstance(each, SampleWeights) for each in trainer.callback_handler.callbacks) > 1:
            raise InputError("SampleWeights was added twice: multiply the weights, and add it once.")
        check_loss(trainer, loader)
        held = access.held_rows(trainer)
        if held.total != len(self.weight):
            raise InputError(
                f"There are {len(self.weight)} weights and the dataset has {held.total} rows: pass one for each."
            )
        base = getattr(loader, "base_dataloader", loader)
        dataset, collate = base.dataset, base.collate_fn
        base.__dict__["dataset"] = IndexedRows(dataset)  # a loader refuses it as a plain attribute
        base.collate_fn = _WeightCollator(RowCollator(collate), self.weight[held.sample_ids])
        weighted = WeightedLoss(cast(nn.Module, trainer.model))

        def release() -> None:
            base.__dict__["dataset"], base.collate_fn = dataset, collate
            weighted.detach()
            self._release = lambda: None

        self._release = release

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the trainer as it was found."""
        self._release()


class WeightedLoss:
    """Multiplies what the model's output says of each token by its weight, where a batch has weights.

    Args:
        model: as SFTTrainer has patched it; its output has `log_probs`, (B, T - 1).
    """

    def __init__(self, model: nn.Module) -> None:
        self._weight: Tensor | None = None
        before = model.register_forward_pre_hook(self._take, with_kwargs=True)
        self._handles = [before, model.register_forward_hook(self._weigh)]

    def detach(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()

    def _take(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._weight = kwargs.pop(WEIGHT, None)
        return args, kwargs

    def _weigh(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._weight is not None:
            output.log_probs = output.log_probs * self._weight[:, 1:]


class BatchWeights:
    """Puts the weights of rows into a run's batches; the model is hooked once there are any.

    Args:
        trainer, train_dataloader: of the run.
    """

    def __init__(self, trainer: Trainer, train_dataloader: Any) -> None:
        self._trainer, self._loader = trainer, train_dataloader
        self._weighted: WeightedLoss | None = None

    def put(self, batches: Sequence[Any], rows: Sequence[np.ndarray], weights: np.ndarray) -> None:
        """Let every row of some micro-batches count as much as its weight.

        Args:
            batches: micro-batches, changed in place.
            rows: their rows, an array for each.
            weights: what every row that can be trained on counts.
        """
        if self._weighted is None:
            check_loss(self._trainer, self._loader)
            self._weighted = WeightedLoss(cast(nn.Module, self._trainer.model))
        for batch, own_rows in zip(batches, rows, strict=True):
            segments = segments_of(batch)[: len(own_rows)]
            batch[WEIGHT] = token_weights(batch["labels"], segments, weights_of(own_rows, weights).tolist())

    def detach(self) -> None:
        """Leave the model as it was found."""
        if self._weighted is not None:
            self._weighted.detach()
        self._weighted = None


def weights_of(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What the rows of a batch count; 1 for a filler, which has no loss."""
    return np.where(rows < 0, 1.0, weights[rows])


def token_weights(labels: Tensor, segments: Sequence[Segment], weights: Sequence[float]) -> Tensor:
    """What each token counts, (B, T) float32: as much as its sample; 1 outside of all."""
    found = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    for where, weight in zip(segments, weights, strict=True):
        found[where.row, where.tokens] = weight
    return found


def check_loss(trainer: Trainer, train_dataloader: Any) -> None:
    """Raise InputError where a sample's loss cannot be weighed; it says what to change."""
    args = cast(Any, trainer.args)
    if not isinstance(trainer, SFTTrainer):
        raise InputError(f"Rows are weighed in SFTTrainer's loss, this is {type(trainer).__name__}.")
    dataset = train_dataloader.dataset
    refusals = [
        (isinstance(dataset, torch.utils.data.IterableDataset), "a streaming dataset", "Load it as a Dataset"),
        (access.is_packed(args, dataset), "packed rows", "Set packing=False"),
        (args.loss_type != "nll", f"loss_type='{args.loss_type}'", "Use 'nll'"),
        (trainer.compute_loss_func is not None, "compute_loss_func", "Weigh the rows there"),
        (bool(args.label_smoothing_factor), "label smoothing", "Leave it out"),
        (args.torch_compile, "torch_compile=True, which drops hooks", "Set torch_compile=False"),
        (access.learns_prompts(trainer.model), "prompt learning, which adds tokens", "Use LoRA, or train all weights"),
        (args.n_gpu > 1, "nn.DataParallel", "Use accelerate launch, or show one GPU by CUDA_VISIBLE_DEVICES"),
    ]
    for refused, what, remedy in refusals:
        if refused:
            raise InputError(f"Rows cannot be weighed with {what}. {remedy}.")


class _WeightCollator:
    """A collator whose batches say what their tokens count."""

    def __init__(self, inner: RowCollator, weight: np.ndarray) -> None:
        self.inner, self.weight = inner, weight

    def __call__(self, examples: list[Any]) -> Mapping[str, Any]:
        """Collate, in the main process or in a worker."""
        batch = self.inner(examples)
        rows = batch.pop(ROW).numpy()
        segments = segments_of(batch)[: len(rows)]
        batch[WEIGHT] = token_weights(batch["labels"], segments, weights_of(rows, self.weight).tolist())
        return batch
