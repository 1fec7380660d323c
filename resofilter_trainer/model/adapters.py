"""Which adapters cannot be scored, and why. Knows PEFT's kinds, nothing of layers or scores.

A kind that is not refused here is tried: `effective.py` checks that the adapted map is one matrix. docs/adapters.md has
the table of all kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import InputError
from ..config.compatibility import need

ADDS_TOKENS = "it adds tokens that are in no row"
NEEDS_A_TASK = "it needs the task of each row (task_ids), which no batch has"
REFUSED = {
    "CPT": ADDS_TOKENS,
    "LILY": "its weights depend on the other rows of a batch",
    "MULTITASK_PROMPT_TUNING": f"{ADDS_TOKENS}, and {NEEDS_A_TASK}",
    "POLY": NEEDS_A_TASK,
    "PROMPT_TUNING": ADDS_TOKENS,
    "P_TUNING": ADDS_TOKENS,
    "XLORA": "it runs every batch twice, to weigh its adapters anew for each row",
    "aLoRA": "its weights change within a row, after the invocation tokens",
}
OF_THE_WHOLE_MODEL = {"XLORA"}  # and prompt learning; the other kinds are in layers
REMEDY = (
    "Use another kind, such as LoRA, or score with the adapter off, inside `with model.disable_adapter():` or, if "
    "transformers added it, after `model.disable_adapters()`"
)


def refuse_adapters(model: nn.Module) -> None:
    """Raise InputError for an active adapter that cannot be scored; it says why, and what to do."""
    for config in _active_configs(model):
        kind = _kind(config)
        if kind in REFUSED:
            raise InputError(f"A model with an adapter of kind {kind} cannot be scored: {REFUSED[kind]}. {REMEDY}.")


def keeps_a_prefix(model: nn.Module) -> bool:
    """Whether the model attends to learnt keys and values before each row, as in prefix tuning."""
    return any(config.is_prompt_learning and _kind(config) not in REFUSED for config in _active_configs(model))


def check_positions(model: nn.Module) -> None:
    """Raise VersionError where the positions of a batch that is padded on the left would be ignored."""
    if keeps_a_prefix(model):
        need("positions after a prefix", "Padding on the left with a prefix before each row")


def _kind(config: PeftConfig) -> str:
    if getattr(config, "alora_invocation_tokens", None):
        return "aLoRA"
    return str(getattr(config.peft_type, "value", config.peft_type))


def _active_configs(model: Any) -> Iterator[PeftConfig]:
    """The settings of the adapters that the forward uses, also of those without PEFT's model around them."""
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer) and not each.disable_adapters]
    names = {name for layer in layers for name in layer.active_adapters}
    if isinstance(model, PeftModel) and not model._adapters_disabled:
        whole = model.active_peft_config
        if whole.is_prompt_learning or _kind(whole) in OF_THE_WHOLE_MODEL:
            yield whole
            return
    yield from (configs[name] for name in sorted(names) if name in configs)
