"""Tokens whose loss is weighted in SFTTrainer's own loss, by a column of the rows or by a rule. Knows batches.

    loss = sum over tokens of w_t * -log p_t, over the number of learnt tokens of the step

which is what SFTTrainer computes, apart from w_t: a token of the weight 0 still counts in that number, as in the code
of EAFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import InputError, with_known_keywords
from ..io.made_from import as_json, check_made_from
from ..model.gradients import segments_of
from ..model.losses import IGNORE
from ..selecting.token_rules import TokenInputs, TokenRule
from ..selecting.weighted_rows import TOKEN_WEIGHTS, WEIGHT
from . import trainer_access as access
from .refusals import check_checkpoint, check_sample_weights, has_column, refuse_both_weights
from .rule_loss import RuleWeights, rule_of_run
from .sampler import ROW, RowCollator
from .step_weights import StepWeights
from .trainer_patches import LossPatch
from .weighting import SampleWeights, weigh_batches

STATE = "resofilter_token_weights"  # in the state of a checkpoint; a class's name would let the Trainer make it anew
EARLIER_STATE = "TokenWeights"  # in checkpoints of earlier versions


@with_known_keywords
class TokenWeights(TrainerCallback):
    """Weights each token's loss: by the column `token_weights` of the rows, or by a rule, from the step's own forward.

    >>> cleaned = clean_dataset(model, rows, rule="eaft")
    >>> SFTTrainer(model, args, train_dataset=cleaned.dataset, callbacks=[TokenWeights()]).train()
    >>> SFTTrainer(model, args, train_dataset=rows, callbacks=[TokenWeights(rule="profit")]).train()

    With a rule there is no second pass: it reads what SFTTrainer computes anyway, of one micro-batch after the other. A
    share (`keep=`) is one of the tokens of each micro-batch, and at least one token. The backward takes the weights as
    constants. The update of a step whose tokens all have the weight 0 is left out, with a warning.

    Args:
        rule: as for `clean_dataset`, of rules that need nothing but `"entropy"` or `"top_entropy"`; by default, the
            column is read.
        keep: as for `clean_dataset`.

    Attributes:
        mean_weights: the mean weight of the learnt tokens of each step, of all processes. Not in it: steps without
            a learnt token and, with a rule, steps whose loss is NaN or infinite.

    Raises:
        InputError: here, where there is no such rule, or it needs what the forward does not compute; when training
            begins, where the trainer has another loss, or rows have no proper weights; at a batch, where a row has
            another number of weights than tokens, or the rule returns no weights.
    """

    def __init__(
        self, rule: str | TokenRule | Callable[[TokenInputs], Any] | None = None, keep: float | None = None
    ) -> None:
        if rule is None and keep is not None:
            raise InputError("keep= goes with rule=: a column has a weight for each token.")
        self.rule = None if rule is None else rule_of_run(rule, keep, "keep")
        self.mean_weights: list[float] = []
        self._step: RuleWeights | StepWeights | None = None
        self._release: Callable[[], None] = lambda: None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the weights act in the loss."""
        self._release()
        trainer, _ = access.calling_trainer()
        loader = kwargs["train_dataloader"]
        if sum(isinstance(each, TokenWeights | SampleWeights) for each in trainer.callback_handler.callbacks) > 1:
            raise InputError("TokenWeights goes with no other weights: multiply them in the column, and add it once.")
        check_checkpoint(trainer, type(self).__name__)
        self._check_resumed(state)
        self.mean_weights.clear()
        remove = self._by_column(trainer, loader) if self.rule is None else self._by_rule(trainer, loader, self.rule)

        def release() -> None:
            remove()
            self._end_update()
            self._step, self._release = None, lambda: None

        self._release = release

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out the update of a step whose tokens all have the weight 0."""
        if self._step is not None:
            self._step.leaves_out()
            self._step.leave_out()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimizer make its next step."""
        self._end_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the mean weight of the step."""
        if self._step is not None:
            self._step.end_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the trainer as it was found."""
        if isinstance(self._step, RuleWeights):
            self._step.tell_of_ends()
        self._release()

    def _end_update(self) -> None:
        if self._step is not None:
            self._step.end_update()

    def _check_resumed(self, state: TrainerState) -> None:
        """Refuse to resume a run that weighed tokens in another way, and note how this one does."""
        rule = None if self.rule is None else {"rule": self.rule.name, "settings": self.rule.settings}
        here = as_json({"weights": rule or f"the column '{TOKEN_WEIGHTS}'"})
        if state.global_step:
            what = f"The checkpoint of step {state.global_step} was"
            remedy = "Resume with the weights it was made with, or start again."
            states = state.stateful_callbacks
            check_made_from(states.get(STATE) or states.pop(EARLIER_STATE, {}), here, what, remedy)
        state.stateful_callbacks[STATE] = here

    def _by_column(self, trainer: Trainer, loader: Any) -> Callable[[], None]:
        refuse_both_weights(trainer)
        check_sample_weights(trainer, loader, "token")
        weights = RaggedWeights.of(trainer)
        self._step = StepWeights(trainer, f"The column '{TOKEN_WEIGHTS}'", self.mean_weights)
        return weigh_batches(
            trainer, loader, lambda inner: _TokenWeightCollator(RowCollator(inner), weights), self._step.add
        )

    def _by_rule(self, trainer: Trainer, loader: Any, rule: TokenRule) -> Callable[[], None]:
        self._step = weighing = RuleWeights(trainer, loader, rule, self.mean_weights)
        patch = LossPatch(trainer, loader, weighing.acting)
        patch.install()
        return patch.remove


class RaggedWeights:
    """The weights of the tokens of R rows.

    Args:
        offsets: (R + 1,) the start of each row, and the end.
        weight: (M,) float32, the weight of every token, prompts included.

    Raises:
        InputError: a weight is missing, negative or not finite.
    """

    def __init__(self, offsets: np.ndarray, weight: np.ndarray) -> None:
        self.offsets, self.weight = offsets, weight
        wrong = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
        if len(wrong):
            row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
            raise InputError(
                f"Row {row} has the weight {weight[wrong[0]]:g} in its column '{TOKEN_WEIGHTS}': weights are finite "
                "numbers of at least 0."
            )

    @classmethod
    def of(cls, trainer: Trainer) -> RaggedWeights:
        """The column of a trainer's rows, in its order. Raises InputError where there is none of this kind."""
        rows: Any = trainer.train_dataset
        if not has_column(trainer, TOKEN_WEIGHTS):
            raise InputError(
                f"The trainer's rows have no column '{TOKEN_WEIGHTS}'. Train on what clean_dataset(rule='eaft') "
                "returns or writes, or leave TokenWeights out."
            )
        column = rows.with_format("arrow").select_columns(TOKEN_WEIGHTS)[:].column(0)
        try:
            lists = column.cast(pa.large_list(pa.float32())).combine_chunks()
        except pa.ArrowException as error:
            raise InputError(f"The column '{TOKEN_WEIGHTS}' holds {column.type}, not lists of numbers.") from error
        if lists.null_count:
            raise InputError(f"{lists.null_count} rows have no list in their column '{TOKEN_WEIGHTS}'.")
        counts = lists.value_lengths().to_numpy()
        return cls(np.concatenate([[0], np.cumsum(counts)]), lists.flatten().to_numpy(zero_copy_only=False))

    def of_row(self, row: int, labels: Tensor) -> np.ndarray:
        """(n,) the weights of a row's tokens in a batch; 1 for padding.

        Args:
            row: the row.
            labels: (n,) its labels in the batch; padding may follow.

        Raises:
            InputError: there is another number of weights.
        """
        own = self.weight[self.offsets[row] : self.offsets[row + 1]]
        beyond = len(labels) - len(own)
        if beyond < 0 or (labels[len(own) :] != IGNORE).any():
            raise InputError(
                f"Row {row} has {len(own)} weights in its column '{TOKEN_WEIGHTS}' and {len(labels)} tokens in its "
                "batch: train on the rows as they were cleaned, with the same max_length."
            )
        return np.concatenate([own, np.ones(beyond, dtype=own.dtype)])


class _TokenWeightCollator:
    """A collator whose batches contain the weights of their tokens."""

    def __init__(self, inner: RowCollator, weights: RaggedWeights) -> None:
        self.inner, self.weights = inner, weights

    def __call__(self, examples: list[Any]) -> Mapping[str, Any]:
        """Collate, in the main process or in a worker."""
        batch = self.inner(examples)
        rows = batch.pop(ROW).tolist()
        labels = batch["labels"]
        found = torch.ones(labels.shape, dtype=torch.float32)
        for where, row in zip(segments_of(batch)[: len(rows)], rows, strict=True):
            if row >= 0:
                own = self.weights.of_row(row, labels[where.row, where.tokens])
                found[where.row, where.tokens] = torch.from_numpy(own)
        batch[WEIGHT] = found
        return batch
