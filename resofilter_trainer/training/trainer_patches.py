"""What a run changes in a Trainer and its loader, and undoes. Knows the Trainer's loop, no scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..model.losses import IGNORE
from .examples import Examples
from .sampler import IndexedRows, RowCollator, ShrinkingSampler
from .stream_rows import StreamCollator, StreamRows
from .trainer_access import scaled

REPLACED = ("get_batch_samples", "compute_loss", "training_step")


class _LeftOut(dict):
    """A micro-batch that no forward sees."""


class LoaderPatch:
    """Lets the batches of a loader say which rows they contain, and undoes it.

    Args:
        train_dataloader: the loader that the Trainer iterates.
        collator, dataset: functions that make the collator and the dataset to use from the loader's own.
    """

    def __init__(
        self,
        train_dataloader: Any,
        collator: Callable[[Any], Any] = RowCollator,
        dataset: Callable[[Any], Any] = IndexedRows,
    ) -> None:
        self._base = getattr(train_dataloader, "base_dataloader", train_dataloader)
        self._dataset, self._collate = self._base.dataset, self._base.collate_fn
        self._patched, self._indexed = collator(self._collate), dataset(self._dataset)

    def install(self) -> None:
        """Replace the loader's dataset and collator."""
        self._base.__dict__["dataset"] = self._indexed  # a loader refuses it as a plain attribute
        self._base.collate_fn = self._patched

    def remove(self) -> None:
        """Put the loader's own back."""
        self._base.__dict__["dataset"], self._base.collate_fn = self._dataset, self._collate


class TrainerPatch:
    """What a run changes in a trainer, and undoes.

    Args:
        trainer, train_dataloader: the trainer and the loader that it iterates.
        sampler: the sampler to use instead of the trainer's own.
        fetch: the function to use instead of `trainer.get_batch_samples`.
        examples: what the loader's examples are.
        around: a function that returns the context in which each loss is computed.

    Attributes:
        inner: the `get_batch_samples` that `install` has replaced.
    """

    def __init__(
        self,
        trainer: Trainer,
        train_dataloader: Any,
        sampler: ShrinkingSampler,
        fetch: Any,
        examples: Examples,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._trainer, self._loader, self._sampler, self._fetch = trainer, train_dataloader, sampler, fetch
        self._around = around
        self._examples, self._rows = examples, LoaderPatch(train_dataloader, examples.collator, examples.indexed)
        self._count, self._masked = 0, list[Any]()  # of this step: micro-batches, labels of masked ones

    def install(self) -> None:
        """Let batches say their rows, and the run fetch them."""
        self._rows.install()
        self._loader.set_sampler(self._examples.sampler(self._sampler))
        trainer = self._trainer
        for name in REPLACED:
            _restore(trainer, name)  # after an earlier run that an exception ended
        self.inner, self._compute_loss = trainer.get_batch_samples, trainer.compute_loss
        self._training_step = trainer.training_step
        for name, function in zip(REPLACED, (self._fetch, self._loss, self._step), strict=True):
            _replace(trainer, name, function)

    def remove(self) -> None:
        """Leave the trainer as it was found."""
        restored = [_restore(self._trainer, name) for name in REPLACED]
        if any(restored):
            self._rows.remove()
            self._loader.set_sampler(self._sampler.inner)

    @property
    def is_read(self) -> bool:
        """Whether the trainer's present training reads this loader."""
        return self._trainer.callback_handler.train_dataloader is self._loader

    def completed(self, batches: Sequence[Any], count: int, averaged: bool) -> list[Any]:
        """The micro-batches of a step, with others in addition that change neither its loss nor its gradient.

        Where the loss is a sum over the tokens of the step, the others have all labels masked. Where it is the mean of
        the micro-batches' own means, such a mean does not exist: the others are left out. They come first, since
        several processes add up their gradients in the last one.

        Args:
            batches: the micro-batches that there are.
            count: how many the Trainer asks for.
            averaged: whether the loss is the mean of the micro-batches' means.
        """
        missing = count - len(batches) if batches else 0
        self._count, self._masked = len(batches), []
        if averaged:
            return [*(_LeftOut(batches[-1]) for _ in range(missing)), *batches]
        masked = [_masked_copy(batches[-1]) for _ in range(missing)]
        self._masked = [each["labels"] for each in masked]
        return [*batches, *masked]

    def begin_step(self) -> None:
        """Tell the trainer how many micro-batches count: the divisor of a mean of means, and of a router's loss."""
        self._trainer.current_gradient_accumulation_steps = self._count

    def _loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss, and zero for a masked micro-batch, whose auxiliary loss would train, too."""
        labels = inputs.get("labels")
        with self._around() if self.is_read else nullcontext():
            found = self._compute_loss(model, inputs, *args, **kwargs)
        return found * 0 if any(labels is each for each in self._masked) else found

    def _step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's step, and none for a micro-batch that is left out."""
        if isinstance(inputs, _LeftOut):
            return torch.zeros((), device=self._trainer.args.device)
        return self._training_step(model, inputs, *args, **kwargs)


class StreamPatch:
    """What a run on a stream changes in a trainer, and undoes.

    Args:
        trainer, train_dataloader: the trainer and the loader that it iterates.
        id_column: the column with an id for each row; None to know rows by their order.
        fetch: the function to use instead of `trainer.get_batch_samples`.
        around: a function that returns the context in which each loss is computed.

    Attributes:
        rows: the rows of the stream, which the loader reads once this is installed.
        inner: the `get_batch_samples` that `install` has replaced.
    """

    def __init__(
        self,
        trainer: Trainer,
        train_dataloader: Any,
        id_column: str | None,
        fetch: Any,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._loss = LossPatch(trainer, train_dataloader, around)
        self._trainer, self._loader, self._fetch = trainer, train_dataloader, fetch
        self._base = getattr(train_dataloader, "base_dataloader", train_dataloader)
        self._shard = self._base.dataset if isinstance(self._base.dataset, IterableDatasetShard) else None
        self._stream = self._base.dataset if self._shard is None else self._shard.dataset
        self._collate = self._base.collate_fn
        self.rows = StreamRows(self._stream, id_column)

    def install(self) -> None:
        """Let batches say their rows, and the run fetch them."""
        _restore(self._trainer, "get_batch_samples")  # after an earlier run that an exception ended
        self.inner = self._trainer.get_batch_samples
        self._set(self.rows, StreamCollator(RowCollator(self._collate)))
        _replace(self._trainer, "get_batch_samples", self._fetch)
        self._loss.install()

    def remove(self) -> None:
        """Leave the trainer as it was found."""
        self._loss.remove()
        if _restore(self._trainer, "get_batch_samples"):
            self._set(self._stream, self._collate)

    @property
    def is_read(self) -> bool:
        """Whether the trainer's present training reads this loader."""
        return self._trainer.callback_handler.train_dataloader is self._loader

    def _set(self, stream: Any, collate: Any) -> None:
        if self._shard is None:
            self._base.__dict__["dataset"] = stream  # a loader refuses it as a plain attribute
        else:
            self._shard.dataset = stream
        self._base.collate_fn = collate


class BackwardPatch:
    """Shows every loss that a trainer backpropagates, just before it does, and undoes it.

    Args:
        trainer: the trainer.
        around: a function from the loss to the context in which it is backpropagated.
    """

    def __init__(self, trainer: Trainer, around: Callable[[torch.Tensor], AbstractContextManager[None]]) -> None:
        self._accelerator, self._around = trainer.accelerator, around

    def install(self) -> None:
        """Replace the accelerator's `backward`."""
        accelerator, around = self._accelerator, self._around
        _restore(accelerator, "backward")  # after an earlier run that an exception ended
        inner = accelerator.backward

        def backward(loss: torch.Tensor, **kwargs: Any) -> None:
            parts = accelerator.gradient_accumulation_steps if kwargs.get("scale_wrt_gas", True) else 1
            with around(scaled(accelerator, loss.detach() / parts)):
                inner(loss, **kwargs)

        _replace(accelerator, "backward", backward)

    def remove(self) -> None:
        """Put the accelerator's own back."""
        _restore(self._accelerator, "backward")


class LossPatch:
    """Puts a context around each loss that a trainer computes in the present training, and undoes it.

    Args:
        trainer, train_dataloader: the trainer and the loader that it iterates.
        around: a function that returns the context.
    """

    def __init__(
        self, trainer: Trainer, train_dataloader: Any, around: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._trainer, self._loader, self._around = trainer, train_dataloader, around

    def install(self) -> None:
        """Replace the trainer's `compute_loss`."""
        trainer, loader, around = self._trainer, self._loader, self._around
        _restore(trainer, "compute_loss")  # after an earlier run that an exception ended
        inner = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            present = trainer.callback_handler.train_dataloader is loader  # else an exception has ended that training
            with around() if present else nullcontext():
                return inner(*args, **kwargs)

        _replace(trainer, "compute_loss", compute_loss)

    def remove(self) -> None:
        """Put the trainer's own back."""
        _restore(self._trainer, "compute_loss")


class GradientNormPatch:
    """Keeps the norm of the gradient that the Trainer clips, and undoes it.

    Args:
        trainer: the trainer.

    Attributes:
        norm: the norm of the last gradient, before clipping: a number or a tensor; None where it was not computed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._accelerator = trainer.accelerator
        self.norm: Any = None

    def install(self) -> None:
        """Replace the accelerator's `clip_grad_norm_`."""
        _restore(self._accelerator, "clip_grad_norm_")  # after an earlier run that an exception ended
        inner = self._accelerator.clip_grad_norm_

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            self.norm = found.full_tensor() if isinstance(found, DTensor) else found  # of which processes have parts
            return found

        _replace(self._accelerator, "clip_grad_norm_", clip_grad_norm_)

    def remove(self) -> None:
        """Put the accelerator's own back."""
        _restore(self._accelerator, "clip_grad_norm_")


class UpdatePatch:
    """Leaves out a step of a trainer's optimizer, and undoes it: its weights and its state stay as they are.

    Args:
        trainer: the trainer.

    Attributes:
        unscaled: whether the gradient is divided by fp16's loss scale already, as clipping does.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self.unscaled = trainer, False

    def leave_out(self) -> None:
        """Let the optimizer do nothing when it is asked for its next step."""
        accelerator, optimizer = self._trainer.accelerator, self._trainer.optimizer

        def nothing(*args: Any, **kwargs: Any) -> None:
            self.restore()  # only this step is left out
            for each in (optimizer, getattr(optimizer, "optimizer", optimizer)):
                each._opt_called = True  # or torch warns that the first learning rate was not used
            if accelerator.scaler is not None:  # which expects that a gradient was checked, and then a new scale
                if not self.unscaled:
                    accelerator.unscale_gradients(optimizer)
                accelerator.scaler.update()
            if hasattr(optimizer, "_is_overflow"):  # of the step before, for which the learning rate stayed
                optimizer._is_overflow = False

        _replace(optimizer, "step", nothing)

    def restore(self) -> None:
        """Put the optimizer's own step back."""
        _restore(self._trainer.optimizer, "step")


class _Replaced:
    """A function in the place of a method, with the attribute of the object that it replaced."""

    def __init__(self, function: Any, replaced: Any) -> None:
        self._function, self.replaced = function, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def _replace(owner: Any, name: str, function: Any) -> None:
    setattr(owner, name, _Replaced(function, vars(owner).get(name)))


def _restore(owner: Any, name: str) -> bool:
    """Give an object its own method back; whether a run had replaced it."""
    there = vars(owner).get(name)
    if not isinstance(there, _Replaced):
        return False
    if there.replaced is None:
        delattr(owner, name)
    else:
        setattr(owner, name, there.replaced)
    return True


def _masked_copy(batch: Any) -> Any:
    """A copy of a micro-batch with all labels masked."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
