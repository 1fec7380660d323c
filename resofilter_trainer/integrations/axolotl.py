"""axolotl's plugin: `ResonanceCallback`, with its settings in axolotl's YAML. Knows axolotl's settings, no loop.

    plugins:
      - resofilter_trainer.integrations.axolotl.ResonancePlugin
    resofilter:
      keep: 0.5

axolotl goes on without a plugin whose import fails, so nothing that may be missing or too old is imported here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..config import InputError

if TYPE_CHECKING:
    from ..training.callback import ResonanceCallback

KEY = "resofilter"
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # 1e-8, which YAML reads as text
TWO_PASSES = "Score first (`resofilter score`), and train on the selection without the plugin"
# axolotl's settings with which the callback cannot work: when set, what they are, and what to change.
REFUSED = {
    "sample_packing": ("packs several rows into one", "Set `sample_packing: false`"),
    "streaming": ("streams the rows, which axolotl packs and pads in its own way", "Set `streaming: false`"),
    "pretraining_dataset": ("streams the rows, which axolotl packs and pads in its own way", "Use `datasets:` instead"),
    "rl": ("trains on pairs or rewards, not on rows with tokens to learn", "Leave the plugin out"),
    "reward_model": ("trains on pairs, not on rows with tokens to learn", "Leave the plugin out"),
    "process_reward_model": ("trains on steps, not on rows with tokens to learn", "Leave the plugin out"),
    "lora_mlp_kernel": ("calls no up-projection, so none can be measured", "Set `lora_mlp_kernel: false`"),
    "flash_attn_fuse_mlp": ("calls no up-projection, so none can be measured", "Set `flash_attn_fuse_mlp: false`"),
    "tiled_mlp": ("calls an up-projection several times for a row", "Set `tiled_mlp: false`"),
    "torch_compile": ("was never compared in axolotl's trainer", "Set `torch_compile: false`"),
    "use_eaft": ("weights every token of a row in its own way", "Set `use_eaft: false`"),
    "fp16": ("was never measured in axolotl's trainer", "Set `bf16: true`, or both `bf16: false` and `fp16: false`"),
    "deepspeed": ("was never run in axolotl's trainer", TWO_PASSES),
    "fsdp": ("shards weights and gradients", TWO_PASSES),
    "fsdp_config": ("shards weights and gradients", TWO_PASSES),
}
# Arguments of the callback that it cannot have here, and what to do.
IMPOSSIBLE = {
    "token_cleaning": (
        "needs a loss that is a mean over all tokens of a step, and axolotl averages micro-batches. Clean the dataset "
        "first (`resofilter clean`), and train on it"
    ),
    "token_rule": (
        "weighs the losses of tokens as SFTTrainer computes them, and axolotl has a trainer of its own. Clean the "
        "dataset first, by a rule that masks (`resofilter clean`), and train on it"
    ),
    "keep_tokens": "goes with token_rule=. Leave it out",
    "selector": "is an object of Python, which YAML cannot hold. Use keep= or threshold=",
    "dataset": "is for packed rows, which the plugin refuses. Leave it out",
    "id_column": "is for a stream, which the plugin refuses. Leave it out",
}
PARALLEL = ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size")  # when above 1
# Schedules of axolotl's own, which are made for the steps of an epoch on all rows.
PLAIN_SCHEDULE = "Use one of transformers, such as `lr_scheduler: cosine`"
SCHEDULES = {
    "cosine_min_lr_ratio": "Use `lr_scheduler: cosine_with_min_lr` with `lr_scheduler_kwargs: {min_lr_rate: 0.1}`",
    "cosine_constant_lr_ratio": PLAIN_SCHEDULE,
    "lr_quadratic_warmup": "Leave it out",
    "jagged_restart_steps": "Leave it out",
}
OWN_SCHEDULERS = ("one_cycle", "rex")


class ResonanceArgs(BaseModel):
    """The key that the plugin adds to axolotl's settings.

    Attributes:
        resofilter: the arguments of `ResonanceCallback`, by name.
    """

    resofilter: dict[str, Any] | None = None


class ResonancePlugin(BasePlugin):
    """Adds a `ResonanceCallback` to the trainer of a supervised fine-tuning.

    `sample_id`, in the scores and selections, counts the rows as axolotl has prepared them.

    Raises:
        InputError: when the YAML is read or the model loaded, where a setting cannot work; it says what to change.
    """

    def register(self, cfg: Any) -> None:
        """Check the settings as they are in the YAML."""
        _check_settings(cfg, callback_of(cfg.get(KEY)))

    def get_input_args(self) -> str:
        """The name of the model of the plugin's settings."""
        return f"{__name__}.{ResonanceArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """Check the settings as axolotl has completed them; turn off a kernel that only axolotl has turned on."""
        if not _is_asked_for(cfg):
            return
        if cfg.get("lora_mlp_kernel"):  # otherwise refused when the YAML was read
            cfg["lora_mlp_kernel"] = False
            warnings.warn(
                "lora_mlp_kernel, which axolotl turns on by default, is off: it calls no up-projection, so none could "
                "be measured. Set `lora_mlp_kernel: false` to silence this.",
                stacklevel=2,
            )
        _check_settings(cfg, callback_of(cfg.get(KEY)))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[ResonanceCallback]:
        """The callback, for a trainer that is ready."""
        if not _is_asked_for(cfg):
            return []
        callback = callback_of(cfg.get(KEY))
        if not _has_fixed_length(cfg, callback):
            trainer.args.max_steps = -1  # axolotl sets it to the steps of `num_epochs` epochs on all rows
        return [callback]


def callback_of(given: Any) -> ResonanceCallback:
    """The callback with the settings of the YAML.

    Args:
        given: the value of `resofilter:`; None for the defaults.

    Raises:
        InputError: a setting is unknown or not allowed.
    """
    from ..training.callback import ResonanceCallback  # raises where a library is too old

    try:
        settings = _settings(given)
        for name, why in IMPOSSIBLE.items():
            if settings.get(name) is not None:
                raise InputError(f"{name}= {why}.")
        return ResonanceCallback(**settings)
    except InputError as error:
        raise type(error)(f"`{KEY}:` in the YAML: {error}") from None


def _settings(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"There must be a setting on each of the next lines, such as `  keep: 0.5`, got {given!r}.")
    return {str(name): _value(value) for name, value in given.items()}


def _value(given: Any) -> Any:
    """A value of the YAML, with a number that YAML took for text as a number."""
    if isinstance(given, list):
        return [_value(each) for each in given]
    return float(given) if isinstance(given, str) and EXPONENT.fullmatch(given) else given


def _check_settings(cfg: Any, callback: ResonanceCallback) -> None:
    """Raise InputError for a setting of axolotl's with which the callback cannot work."""
    for name, (does, remedy) in REFUSED.items():
        if cfg.get(name):
            raise InputError(f"ResonancePlugin cannot work with {name}, which {does}. {remedy}.")
    for name in PARALLEL:
        if (cfg.get(name) or 1) > 1:
            raise InputError(f"ResonancePlugin cannot work with {name}, which divides a sample. Set `{name}: 1`.")
    if _has_fixed_length(cfg, callback):
        return
    schedules = {name: remedy for name, remedy in SCHEDULES.items() if cfg.get(name)}
    if cfg.get("lr_scheduler") in OWN_SCHEDULERS:
        schedules[f"lr_scheduler: {cfg['lr_scheduler']}"] = PLAIN_SCHEDULE
    for name, remedy in schedules.items():
        raise InputError(
            f"ResonancePlugin cannot shorten the schedule of `{name}` when there are fewer rows. {remedy}; or set "
            "`max_steps`, which keeps the length of the run."
        )


def _has_fixed_length(cfg: Any, callback: ResonanceCallback) -> bool:
    """Whether the run is as long as without the plugin, although there may be fewer rows."""
    return bool(cfg.get("max_steps")) or callback.filter.keep == 1


def _is_asked_for(cfg: Any) -> bool:
    """Whether this plugin is in these settings; axolotl keeps those of earlier ones in the same process."""
    return any(str(name).rpartition(".")[2] == ResonancePlugin.__name__ for name in cfg.get("plugins") or ())
