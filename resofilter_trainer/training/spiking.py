"""Tells a function of steps that stand out, and leaves out their update where asked. Knows the Trainer's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer

from ..config import InputError
from ..ledger.live import LAST, SpikingRow, SpikingStep, stands_out, usual
from . import trainer_access as access
from .log import RunLog
from .measurements import Trained
from .refused_uses import check_skipping
from .trainer_patches import UpdatePatch

OnSpike = Callable[[SpikingStep], Any]
STOP, SKIP = "stop", "skip"
NAMED = 5  # rows in a line of the console


class SpikeWatch:
    """Looks at every step before its update. All processes decide the same; the main one calls the function.

    Args:
        trainer: the trainer of the run.
        on_spike: the function; None to call none.
        skip_update: whether the update of every step that stands out is left out.
        log: where it is reported.

    Attributes:
        skips: whether the present step's update is left out.

    Raises:
        InputError: an update cannot be left out with this trainer.
    """

    def __init__(self, trainer: Trainer, on_spike: OnSpike | None, skip_update: bool, log: RunLog) -> None:
        self.on = on_spike is not None or skip_update
        self._trainer, self._on_spike, self._skip_update, self._log = trainer, on_spike, skip_update, log
        if skip_update:
            check_skipping(trainer)
        self._update = UpdatePatch(trainer)
        self._losses, self._norms = list[float](), list[float]()  # of the last steps
        self._left_out = 0  # updates so far
        self.skips = False
        self._told: str | None = None  # of the present step, to be reported at its end

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint says of it: whether there is a function, by its name, and whether updates are left out."""
        function = self._on_spike
        named = {} if function is None else {"on_spike": getattr(function, "__qualname__", type(function).__qualname__)}
        return {**named, "skip_update": True} if self._skip_update else named

    def begin(self, saved: Mapping[str, Any]) -> None:
        """Start, or resume with what `to_json` returned."""
        self._losses, self._norms = list(saved.get("losses", ())), list(saved.get("grad_norms", ()))
        self._left_out = saved.get("left_out", 0)

    def look(self, trained: Sequence[tuple[np.ndarray, Trained]], norm: Any, texts: Callable[[], Any]) -> None:
        """Decide on the step whose gradient is computed, and whose update comes next.

        Args:
            trained: what this process has trained on in the step: the rows' positions in the dataset, and the rest.
            norm: the norm of the gradient, of which the first process's counts; None where it is not known.
            texts: a function that returns the texts of the dataset's rows, or None.
        """
        self._update.unscaled = norm is not None
        own = sum(float((each.weight * each.loss)[each.weight != 0].sum()) for _, each in trained)
        loss, grad_norm = self._of_all(own, math.nan if norm is None else float(norm))
        if self._trainer.accelerator.scaler is not None and not math.isfinite(grad_norm):
            norm = None  # fp16 itself leaves out a step whose scaled gradient is beyond its largest number
        by = ["loss"] if stands_out(loss, self._losses) else []
        by += ["grad_norm"] if norm is not None and stands_out(grad_norm, self._norms, by_factor=True) else []
        if by:
            self._act(loss, grad_norm, " and ".join(by), trained, texts)
        self._losses, self._norms = [*self._losses, loss][-LAST:], [*self._norms, grad_norm][-LAST:]

    def _of_all(self, loss: float, grad_norm: float) -> tuple[float, float]:
        """The loss of the step, of which each process has a part, and the norm that the first process has."""
        both = torch.tensor([[loss, grad_norm]], dtype=torch.float64, device=self._trainer.args.device)
        found = self._trainer.accelerator.gather(both).cpu() if self._trainer.args.world_size > 1 else both.cpu()
        return float(found[:, 0].sum()), float(found[0, 1])

    def _act(
        self, loss: float, grad_norm: float, by: str, trained: Sequence[tuple[np.ndarray, Trained]], texts: Any
    ) -> None:
        """Ask the function, in the main process, and do what it answers, in all."""
        parts = gather_object(list(trained)) if self._trainer.args.world_size > 1 else trained
        number, answer = self._trainer.state.global_step + 1, None
        if self._trainer.args.process_index == 0:
            rows = rows_of(parts, usual(self._losses), None if self._on_spike is None else texts())
            step = SpikingStep(number, loss, grad_norm, usual(self._losses), usual(self._norms), by, rows)
            answer = None if self._on_spike is None else self._on_spike(step)
            named = ", ".join(str(each.sample_id) for each in rows[:NAMED])
            of_usual = f"loss {loss:.4g} (usually {step.usual_loss:.4g}), gradient norm {grad_norm:.4g}"
            of_usual += f" (usually {step.usual_grad_norm:.4g})"
            self._told = f"step {number} stands out: {of_usual}; rows {named}"
        if self._trainer.args.world_size > 1:
            answer, self._told = access.from_main((answer, self._told))
        if answer not in (None, STOP, SKIP):
            raise InputError(f"on_spike returned {answer!r}: return None, 'stop' or 'skip'.")
        if answer == STOP:
            self._trainer.control.should_training_stop = True
        if answer == SKIP or self._skip_update:
            check_skipping(self._trainer)
            self.skips, self._left_out = True, self._left_out + 1
            self._update.leave_out()

    def end_update(self) -> None:
        """The optimizer was asked for its step: let it make the next one."""
        self._update.restore()

    def end_step(self) -> None:
        """Report a step that stood out."""
        if self._told is not None:
            left_out = f"; its update is left out ({self._left_out:,} so far)" if self.skips else ""
            self._log.spike(self._told + left_out, self._left_out if self.skips else None)
        self.skips, self._told = False, None

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {"losses": self._losses, "grad_norms": self._norms, "left_out": self._left_out}


def rows_of(parts: Sequence[tuple[np.ndarray, Trained]], usual_loss: float, texts: Any) -> tuple[SpikingRow, ...]:
    """The rows of a step, those first that add most to its loss above the usual one; a loss that is no number first."""
    sample_id = np.concatenate([ids for ids, _ in parts])
    loss, num_tokens, weight = (
        np.concatenate([getattr(each, name) for _, each in parts]) for name in ("loss", "num_tokens", "weight")
    )
    layers = np.concatenate([each.layers for _, each in parts])
    learnt = weight != 0
    resonance = layers.mean(axis=1) if layers.shape[1] else np.full(len(layers), np.nan)
    of_loss, of_update = np.where(learnt, weight * loss, 0.0), np.where(learnt, weight * resonance, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_loss_share, of_update_share = of_loss / of_loss.sum(), of_update / of_update.sum()
    added = np.where(np.isfinite(loss), weight * (loss - usual_loss), np.inf)
    order = np.argsort(-added, kind="stable")
    return tuple(
        SpikingRow(
            sample_id=int(sample_id[row]),
            loss=float(loss[row]),
            num_tokens=int(num_tokens[row]),
            share_of_loss=float(of_loss_share[row]),
            share_of_update=float(of_update_share[row]),
            text=None if texts is None else texts[int(sample_id[row])],
        )
        for row in order
        if learnt[row]
    )
