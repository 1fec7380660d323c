"""What a run measures of its samples, step by step and in every process. Knows micro-batches, decides nothing.

expect -> [forward, backward] x accumulation -> before_step -> the step -> after_step -> end_step -> gather
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer

from ..config import InputError, ResonanceConfig
from ..model.gradients import segments_of
from ..model.loss_check import TokenLoss, Verdict
from ..model.micro_batch import MicroBatch
from ..model.step_recorder import StepRecorder, recorders
from ..model.training_recorder import TrainingRecorder
from ..model.up_projection import find_up_projections
from . import trainer_access as access
from .examples import Examples
from .measurements import Measured, Measurements, Trained
from .plan import Batching
from .recording import Recording, SampleIds
from .trainer_patches import BackwardPatch
from .weighting import weights_of

REMEDY = (
    "Pass when='before', which measures the mean token loss in a pass of its own, or leave out what changes the loss "
    "(compute_loss, compute_loss_func, training_step, the model's own)."
)


class Watch:
    """Measures the samples of one run.

    Args:
        trainer: the trainer of the run.
        config: the step to measure, and how.
        batching: how examples become steps.
        examples: what the examples are.
        each_step: whether samples are measured while they are trained on; otherwise only `measurements` is used.
        drops: whether rows may be dropped.
        recording: the ledger of the run.

    Attributes:
        measurements: the last measurement of every row, of all processes up to the last `gather`.

    Raises:
        InputError: the model has no known up-projection, or the update cannot be measured at this number of samples.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: ResonanceConfig,
        batching: Batching,
        examples: Examples,
        each_step: bool,
        drops: bool,
        recording: Recording,
    ) -> None:
        self._trainer, self._recording, self._examples = trainer, recording, examples
        self._loss = access.token_loss(trainer)
        fillers = batching.processes > 1 and not batching.drop_last and not batching.repeats
        self._fills = fillers or (drops and batching.accumulation > 1)  # with batches without a learnt token
        self._scales = trainer.accelerator.scaler is not None  # the loss, as fp16 does
        self._scale: Any = 1.0  # of the present step's loss
        self._told = False  # that the loss weighs rows in its own way
        self._recorder: TrainingRecorder | None = None
        self._step_recorder: StepRecorder | None = None
        if each_step:
            samples = batching.per_micro_batch * batching.accumulation * examples.most
            self._recorder, self._step_recorder = recorders(cast(Any, trainer.model), config, samples)
            self._backward = BackwardPatch(trainer, self._recorder.backpropagating)
        found = find_up_projections(cast(Any, trainer.model), config.n_layers, config.up_projection)
        self.measurements = Measurements(examples.samples, sorted({each.layer for each in found}))
        self._expected: list[MicroBatch] = []
        self._rows: Sequence[np.ndarray] = []  # of each expected micro-batch
        self._moved: np.ndarray | None = None  # (L,) by the optimizer's last step
        self._verdicts: Sequence[Verdict] = []  # of each expected micro-batch, once their backward is over
        self._left_out = False  # whether the optimizer's last step was left out
        self._pending: list[Measured] = []  # of this process, since the last gather

    def attach(self, provenance: str, sample_ids: SampleIds) -> None:
        """Add the hooks to the model, and begin the ledger, with the arguments of `Recording.begin`."""
        self._recording.begin(provenance, self.measurements.layer_indices, sample_ids)
        if self._recorder is not None:
            self._recorder.attach(compiled=access.compiles(self._trainer))
            self._backward.install()

    def detach(self) -> None:
        """Leave the model as it was found."""
        self._recording.detach()
        if self._recorder is not None:
            self._recorder.detach()
            self._backward.remove()

    def expect(
        self, batches: Sequence[Any], rows: Sequence[np.ndarray], num_items: Any, weights: np.ndarray | None
    ) -> None:
        """Announce the micro-batches of the next step.

        Args:
            batches: the micro-batches.
            rows: the rows of each, an array for each micro-batch.
            num_items: the number of learnt tokens of the whole step, as the Trainer counts them.
            weights: (N,) the weight of every row's loss; None where all weigh the same.
        """
        if self._recorder is None:
            return
        self._rows, self._expected = rows, []
        if self._scales:
            self._scale = access.scaled(self._trainer.accelerator, torch.ones((), device=self._trainer.args.device))
        for batch, own_rows in zip(batches, rows, strict=True):
            weight = access.token_weight(self._trainer, num_items, batch, len(batches))
            weight = weight * self._scale if self._scales else weight
            if weights is not None:
                weight = weight * torch.tensor(weights_of(own_rows, weights), device=batch["labels"].device)
            segments = segments_of(batch)[: len(own_rows)]
            self._expected.append(MicroBatch(batch["input_ids"], batch["labels"], segments, weight, self._loss))
        self._recorder.expect(self._expected)

    def before_step(self, left_out: bool = False) -> None:
        """Check the loss of the step; remember the weights, where the optimizer's own step is measured.

        Args:
            left_out: whether the update of the step is left out, as no token has a weight.

        Raises:
            InputError: the loss that was backpropagated is no weighted sum of the rows' token losses.
        """
        self._judge()
        self._left_out = left_out
        self._recording.before_step(self._so_far, self._texts)
        if self._step_recorder is not None:
            self._step_recorder.before()

    def _judge(self) -> None:
        if self._recorder is not None:
            self._verdicts = self._recorder.verdicts()
            self._scale = float(self._scale)
        if not self._scales:
            self._check_losses()

    def _so_far(self) -> list[Trained]:
        """What the rows of each micro-batch are in the step, before its update."""
        found = [] if self._recorder is None else self._recorder.measured()
        return [self._trained(at, each.loss, each.num_tokens, each.layers) for at, each in enumerate(found)]

    def _check_losses(self) -> None:
        for rows, verdict in zip(self._rows, self._verdicts, strict=False):  # there are none of a step recorder
            self._check_loss(rows, verdict)

    def _check_loss(self, rows: np.ndarray, verdict: Verdict) -> None:
        if verdict.fault is not None:
            where = "" if verdict.sample is None else f" (seen in row {rows[verdict.sample]})"
            raise InputError(
                f"The loss that {self._name} backpropagates is not the one that is measured, the sum of the tokens' "
                f"cross entropies, weighted by row: {verdict.fault}{where}. {REMEDY}"
            )
        if self._told or not verdict.own.any():
            return
        first = int(verdict.own.argmax())
        weighs = (
            f"The loss of {self._name} weighs rows in its own way (row {rows[first]}: {verdict.ratio[first]:.4g} times "
            "the weight that a mean over all tokens of the step gives it)"
        )
        if self._fills:
            raise InputError(
                f"{weighs}. With gradient_accumulation_steps above 1 or several processes, an epoch may end with "
                "batches without a learnt token, of which such a loss may be NaN. Accumulate 1 batch in one process, "
                "pass keep=1.0, or leave the loss to the Trainer."
            )
        self._told = True
        warnings.warn(  # in every process: others may have no such row
            f"{weighs}: each row is measured by its own mean token loss all the same, with the weights found in the "
            "gradient.",
            stacklevel=2,
        )

    @property
    def _name(self) -> str:
        return type(self._trainer).__name__

    def after_step(self) -> None:
        """Compare the weights with the remembered ones. With a scaled loss, check it, as `before_step` otherwise does.

        Where a gradient is beyond float16's largest number, the step is left out, which a smaller scale shows (a fused
        optimizer leaves it out by itself, and Accelerate then takes it for made); there is nothing to check.
        """
        if self._scales and self._recorder is not None:
            now = access.scaled(self._trainer.accelerator, torch.ones((), device=self._trainer.args.device))
            self._left_out = self._left_out or float(now) < self._scale
            if not self._left_out:
                self._check_losses()
        self._recording.after_step()
        if self._step_recorder is not None:
            self._moved = self._step_recorder.after()

    def end_step(self, epoch: int, step: int) -> None:
        """Keep what was measured of the samples of a step.

        Args:
            epoch: the true epoch, counted from 0.
            step: the number of steps made, this one included.
        """
        self._take(epoch, step)
        self._recording.end_step(self._left_out)

    def _take(self, epoch: int, step: int) -> None:
        if self._recorder is None:
            return
        for at, found in enumerate(self._recorder.take()):
            rows, batch = self._rows[at], self._expected[at]
            length = np.array([each.tokens.stop - each.tokens.start for each in batch.segments])
            layers = found.layers if self._moved is None else self._moved[None]
            measured = Measured(epoch, step, rows, found.loss, found.num_tokens, length, layers)
            left_out = self._left_out or self._recording.skips
            finite = np.isfinite(layers).all(axis=1) & (self._moved is None or not left_out)
            if left_out:  # rows whose gradient is no number wait for their next step
                measured = measured.where(finite | (found.num_tokens == 0))
            self._pending.append(measured)
            layers = np.where(finite[:, None], layers, np.nan)
            self._recording.add(epoch, self._trained(at, found.loss, found.num_tokens, layers))
        self._rows, self._expected, self._verdicts = [], [], []

    def _trained(self, at: int, loss: np.ndarray, num_tokens: np.ndarray, layers: np.ndarray) -> Trained:
        """What the rows of an expected micro-batch are in the loss of the step, by its verdict if there is one.

        Args:
            at: the micro-batch.
            loss: (N,) the mean cross entropy of each row, used where nothing else is known.
            num_tokens, layers: what was counted and measured of the rows.
        """
        rows, verdict, learnt = self._rows[at], self._verdicts[at] if self._verdicts else None, num_tokens > 0
        if verdict is None:
            weight = torch.as_tensor(self._expected[at].token_weight).cpu().double().numpy()
            loss = loss if self._loss == TokenLoss() else np.full(len(rows), np.nan)
        else:
            own_weight = verdict.own if not self._left_out else np.zeros(len(rows), bool)
            weight = verdict.expected * np.where(own_weight, verdict.ratio, 1.0)
            loss = np.where(np.isfinite(verdict.sums), verdict.sums / np.maximum(num_tokens, 1), loss)
        weight = np.where(learnt, weight, 0.0) * num_tokens / self._scale / self._trainer.args.world_size
        loss, layers = np.where(learnt, loss, np.nan), np.where(learnt[:, None], layers, np.nan)
        own = rows >= 0
        return Trained(rows[own], loss[own], num_tokens[own], weight[own], layers[own])

    def end_rest(self, epoch: int, step: int) -> None:
        """Keep what was measured of samples at the end of a pass that fill no step, see `end_step`."""
        self._judge()
        self._left_out = self._scales  # whether their gradient is beyond float16's largest number shows in a later step
        self._take(epoch, step)

    def _texts(self) -> Any:
        from .report import texts_of  # charts take a second to import

        rows = self._examples.rows
        return texts_of(self._trainer, rows.sample_ids, rows.total, self._examples.texts)

    def gather(self) -> None:
        """Add what all processes have measured to the measurements of each, once all have written their ledgers."""
        self._recording.flush()
        pending, self._pending = self._pending, []
        if self._trainer.args.world_size > 1:
            pending = sorted(gather_object(pending), key=lambda each: each.step)
        for each in pending:
            self.measurements.add(each)
