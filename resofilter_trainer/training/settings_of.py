"""What a run is known by: the settings that must be the same for a checkpoint to be resumed. Knows no rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import Trainer

from ..config import ResonanceConfig
from ..data.fingerprints import run_settings
from .filtering import FilterConfig
from .plan import Batching
from .recording import Recording
from .rule_loss import RuleWeights


def settings_of(
    trainer: Trainer,
    filtering: FilterConfig,
    config: ResonanceConfig,
    batching: Batching,
    recording: Recording,
    rule: RuleWeights,
    **own: Any,
) -> dict[str, Any]:
    """The settings of a run.

    Args:
        trainer: the trainer.
        filtering, config, batching, recording, rule: the parts of the run.
        **own: what only this kind of run has.
    """
    return run_settings(
        trainer,
        **filtering.to_json(),
        **dataclasses.asdict(config),  # with lr and the like for every update, as earlier checkpoints have them
        **dataclasses.asdict(batching),
        **own,
        **recording.settings,
        **rule.settings,
    )
