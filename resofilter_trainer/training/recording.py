"""The ledger of one run: what each row was in each step, in every process. Knows the Trainer's steps, decides nothing.

begin -> before_step -> the step -> end_step -> ... -> flush
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash
from transformers import Trainer, TrainingArguments

from ..config import InputError
from ..io.files import remove_folder
from ..ledger.schema import LEDGER, PROCESS
from ..ledger.writing import LedgerWriter, keep_until
from ..selecting.results import NAME as STATE
from .measurements import Trained
from .spiking import SpikeWatch
from .trainer_patches import GradientNormPatch

SPIKES = "spikes"  # in a checkpoint, of the versions that look for steps that stand out
OF_RUN = (  # the trainer's settings that tell runs apart, beside what is measured and on which rows
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16"),
)
SampleIds = Callable[[np.ndarray], np.ndarray]


class Recording:
    """Writes the ledger of one run, each process its own parts.

    Args:
        trainer: the trainer of the run.
        on: whether there is a ledger; otherwise one that an earlier run left is removed.
        spikes: what looks for steps that stand out.
    """

    def __init__(self, trainer: Trainer, on: bool, spikes: SpikeWatch) -> None:
        self._trainer, self._on, self._spikes = trainer, on, spikes
        self._folder = Path(str(trainer.args.output_dir)) / STATE / LEDGER
        self._norm = GradientNormPatch(trainer)
        self._writer: LedgerWriter | None = None
        self._waiting = list[tuple[np.ndarray, Trained]]()  # the micro-batches of the present step that are added
        self._rate = math.nan  # the learning rate of the present step

    @property
    def skips(self) -> bool:
        """Whether the update of the present step is left out."""
        return self._spikes.skips

    @property
    def settings(self) -> dict[str, Any]:
        """What is done about steps that stand out (`resuming.SKIPPING`), where anything is."""
        return self._spikes.settings

    def begin(self, provenance: str, layers: Sequence[int], sample_ids: SampleIds) -> None:
        """Start, or resume after the trainer's step.

        Args:
            provenance: what a run that starts is known by, as text.
            layers: the indices of the measured layers.
            sample_ids: a function from rows to their positions in the user's dataset.
        """
        args, step = self._trainer.args, self._trainer.state.global_step
        saved = self._trainer.state.stateful_callbacks.get(STATE, {}) if step else {}
        self._run = saved.get(LEDGER) or _known_by(provenance, args)
        self._sample_ids, self._waiting = sample_ids, []
        self._spikes.begin(saved.get(SPIKES, {}))
        until = step if self._on else 0
        if args.should_save:
            self._keep_until(until)
        if self._on:
            self._writer = LedgerWriter(self._folder, self._run, args.process_index, args.world_size, layers)
            self._writer.begin(step)
        else:
            keep_until(self._folder / f"{PROCESS}{args.process_index}", until, self._run)
        if self._on or self._spikes.on:
            self._norm.install()

    def _keep_until(self, step: int) -> None:
        """Remove the later lines of processes that this run does not have."""
        if not step:
            remove_folder(self._folder)
        for folder in self._folder.glob(f"{PROCESS}*"):
            number = folder.name.removeprefix(PROCESS)
            if number.isdecimal() and int(number) >= self._trainer.args.world_size:
                keep_until(folder, step, self._run)

    def before_step(self, trained: Callable[[], Sequence[Trained]], texts: Callable[[], Any]) -> None:
        """Note the learning rate, which the Trainer changes before the step ends; look whether the step stands out.

        Args:
            trained: a function that returns what the rows of each micro-batch are in the step.
            texts: a function that returns the texts of the dataset's rows, or None.
        """
        if self._writer is not None:
            self._rate = float(cast(Any, self._trainer.optimizer).param_groups[0]["lr"])
        if self._spikes.on:
            found = [(self._sample_ids(each.rows), each) for each in trained()]
            self._spikes.look([*self._waiting, *found], self._norm.norm, texts)

    def after_step(self) -> None:
        """The optimizer was asked for its step."""
        self._spikes.end_update()

    def add(self, epoch: int, found: Trained) -> None:
        """Add what the rows of the next micro-batch were in the present step.

        Args:
            epoch: the true epoch, counted from 0.
            found: what they were.
        """
        sample_id = self._sample_ids(found.rows)
        if self._writer is not None:
            self._writer.add(
                found.layers,
                epoch=epoch,
                micro_batch=len(self._waiting),
                sample_id=sample_id,
                loss=found.loss,
                num_tokens=found.num_tokens,
                weight=found.weight,
            )
        self._waiting.append((sample_id, found))

    def end_step(self, left_out: bool) -> None:
        """End the step that the trainer has made.

        Args:
            left_out: whether its update is left out, by fp16 or because no token has a weight.
        """
        if self._writer is not None:
            norm = math.nan if self._norm.norm is None else self._norm.norm
            self._writer.end_step(self._trainer.state.global_step, self._rate, norm, left_out or self.skips)
        self._waiting, self._norm.norm = [], None
        self._spikes.end_step()

    def flush(self) -> None:
        """Write the lines of the steps that have ended: before a checkpoint, and in the end."""
        if self._writer is not None:
            self._writer.flush()

    def detach(self) -> None:
        """Leave the trainer as it was found."""
        self._norm.remove()
        self._spikes.end_update()

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint remembers of the ledger and of the steps' losses."""
        ledger = {LEDGER: self._run} if self._on else {}
        return {**ledger, SPIKES: self._spikes.to_json() if self._spikes.on else {}}


def _known_by(provenance: str, args: TrainingArguments) -> str:
    """What the parts of a run are known by: the same for the same training, wherever it is written."""
    settings = {name: str(getattr(args, name, None)) for name in OF_RUN}
    return xxhash.xxh3_64_hexdigest(json.dumps([provenance, settings]).encode())


def check_recording(before: bool, ledger: bool | None, on_spike: Any, skip_update: bool) -> None:
    """Raise InputError for arguments of the callback that cannot work, `before` where it measures before the run."""
    if ledger and before:
        raise InputError("A ledger is of what is measured while training: leave out ledger=True or when='before'.")
    if on_spike is not None and not callable(on_spike):
        raise InputError(f"on_spike must be a function of a step that stands out, got {on_spike!r}.")
    if before and (on_spike is not None or skip_update):
        raise InputError("on_spike and skip_update need what is measured while training: leave out when='before'.")
