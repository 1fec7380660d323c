"""Where a checkpoint of the Trainer is, and what it lacks. Knows the names of the Trainer's files."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate.scheduler import AcceleratedScheduler
from transformers import Trainer

from .recording import SPIKES
from .resuming import Settings, other_skipping


def checkpoint_folder(checkpoint: str | None, trainer: Trainer) -> Path:
    """The folder of a checkpoint for what belongs to this package; by default of the checkpoint of the current step."""
    default = os.path.join(cast(str, trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}")
    return Path(checkpoint or default) / "resofilter"


def last_complete(output_dir: Path) -> str | None:
    """The last checkpoint in a folder that was written to its end; None without one.

    The Trainer writes `trainer_state.json` last, so a checkpoint is whole if that file is.
    """
    there = output_dir.glob("checkpoint-*/trainer_state.json")
    steps = {int(step): each for each in there if (step := each.parent.name.split("-")[1]).isdigit() and _is_json(each)}
    return str(steps[max(steps)].parent) if steps else None


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except ValueError:
        return False


def warn_of_missing_state(trainer: Trainer, checkpoint: Path) -> None:
    """Warn where a checkpoint lacks what the Trainer needs to resume exactly, as those of `save_only_model` do."""
    states = {"optimizer": "optimizer*", "scheduler": "scheduler*", "random state": "rng_state*"}
    if trainer.is_deepspeed_enabled:  # whose engine has the optimizer in files of its own, and perhaps the scheduler
        whole = not trainer.accelerator.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
        states["optimizer"] = f"global_step*/*{'model' if whole else 'optim'}_states.pt"  # ZeRO-0 has them in one file
        if isinstance(trainer.lr_scheduler, AcceleratedScheduler):
            states["scheduler"] = "global_step*/*model_states.pt"
    missing = [name for name, pattern in states.items() if not any(checkpoint.glob(pattern))]
    if missing and trainer.args.process_index == 0:
        warnings.warn(
            f"'{checkpoint}' lacks the {', '.join(missing)} (save_only_model=True?). The Trainer resumes with new "
            "ones, so the run ends with other weights than an uninterrupted one. Rows and scores are resumed.",
            stacklevel=2,
        )


def warn_of_other_skipping(trainer: Trainer, checkpoint: Path, saved: Mapping[str, Any], here: Settings) -> None:
    """Warn where a run does something else about steps that stand out than the checkpoint's, see `resuming`.

    Args:
        trainer: the trainer.
        checkpoint: its folder.
        saved: what the checkpoint remembers of its run. One that was made before steps were looked at has no choice.
        here: the settings of this run.
    """
    found = other_skipping(saved["settings"], here) if SPIKES in saved else []
    if found and trainer.args.process_index == 0:
        warnings.warn(
            f"'{checkpoint}' is of a run that differs in {'; '.join(found)} (there / here). Later steps that stand out "
            "are treated as they are here, so the run may end with other weights than an uninterrupted one.",
            stacklevel=2,
        )
