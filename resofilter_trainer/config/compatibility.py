"""The versions of other libraries: the oldest supported ones, and what is newer. Nothing else compares versions."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from .errors import InputError, VersionError

# The oldest supported version of each library that a model, its rows or its training need, as in pyproject.toml.
LEAST = {
    "accelerate": "1.12",
    "datasets": "4.7",
    "huggingface_hub": "0.34",
    "peft": "0.18",
    "torch": "2.7",
    "transformers": "4.57",
    "trl": "1.8",
}
# What newer versions have, and since when. A test asks to remove an entry once `LEAST` has reached it.
SINCE = {
    "warmup_steps below 1": ("transformers", "5.0"),  # before: warmup_ratio
    "shapes of mismatched_keys": ("transformers", "5.0"),  # before: names only
    "train_sampling_strategy": ("transformers", "5.2"),  # before: group_by_length, and no sequential order
    "loss_is_scaled_for_ga": ("transformers", "5.19"),
    "activation_checkpointing": ("transformers", "5.23"),  # before: gradient_checkpointing
    "one nll": ("trl", "1.15"),  # before: nll, and chunked_nll by default, which is the same in less memory
    "no peft_config after an adapter": ("peft", "0.19"),  # before, it outlives merging
    "positions after a prefix": ("peft", "0.19"),  # before, those that are passed are ignored
    "decoding after a filter": ("datasets", "4.8.3"),  # before, a filtered stream has its images as files
    "null among JSON": ("datasets", "5.0"),  # before, text of JSON beside a null becomes JSON of that text
    "log_probs": ("trl", "1.15"),  # the output of SFTTrainer's model has them; before, it has no losses of tokens
    "tiles of log_probs": ("trl", "1.16"),  # they are computed on a CPU as on a GPU, tile by tile of the vocabulary
}
EXTRAS = {  # the modules that come with each extra of pyproject.toml
    "report": ("altair", "matplotlib", "vl_convert"),
    "compare": ("evaluate",),
}


@functools.cache
def installed(package: str) -> Version | None:
    """The version of a package, without what a build from source adds to it; None where it is not installed."""
    try:
        return Version(Version(importlib.metadata.version(package)).base_version)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions() -> None:
    """Raise VersionError where a library is missing or older than supported."""
    for package, least in LEAST.items():
        found = installed(package)
        if found is None:
            raise VersionError(f"resofilter_trainer needs {package} {least} or later, which is not installed.")
        if found < Version(least):
            raise VersionError(
                f"resofilter_trainer needs {package} {least} or later, and {found} is installed. Upgrade it: "
                f"pip install '{package}>={least}'."
            )


def has(feature: str) -> bool:
    """Whether the installed version has something of `SINCE`."""
    package, version = SINCE[feature]
    found = installed(package)
    return found is not None and found >= Version(version)


def need(feature: str, what: str) -> None:
    """Raise VersionError where the installed version lacks something of `SINCE`.

    Args:
        feature: a name in `SINCE`.
        what: what needs it, the beginning of the message.
    """
    if not has(feature):
        package, version = SINCE[feature]
        raise VersionError(f"{what} needs {package} {version} or later, and {installed(package)} is installed.")


def need_extra(extra: str, what: str) -> None:
    """Raise InputError where a module of an extra is not installed.

    Args:
        extra: a name in `EXTRAS`.
        what: what needs it, the beginning of the message.
    """
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(
            f"{what} needs {' and '.join(missing)}, not installed: pip install 'resofilter_trainer[{extra}]'."
        )


def training_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SFTConfig under the names that the installed version knows.

    Args:
        settings: the arguments, under the names of the newest version; others are left as they are.

    Raises:
        VersionError: the installed version has no such argument, nor an older one that does the same.
    """
    found = dict(settings)
    if not has("activation_checkpointing"):
        for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
            if name in found:
                found[name.replace("activation", "gradient")] = found.pop(name)
    if not has("train_sampling_strategy") and "train_sampling_strategy" in found:
        strategy = found.pop("train_sampling_strategy")
        if strategy not in ("random", "group_by_length"):
            need("train_sampling_strategy", f"train_sampling_strategy='{strategy}'")
        found["group_by_length"] = strategy == "group_by_length"
    if not has("warmup_steps below 1") and 0 < (found.get("warmup_steps") or 0) < 1:
        found["warmup_ratio"] = found.pop("warmup_steps")
    return found


def set_warmup(args: Any, steps: float) -> None:
    """Let the learning rate of a training warm up for a number of steps, or below 1 for a share of them."""
    args.warmup_steps = 0
    for name, value in training_arguments({"warmup_steps": steps if 0 < steps < 1 else int(steps)}).items():
        setattr(args, name, value)


def settle_arguments(args: Any) -> None:
    """Rename a training's warm-up and order of rows, named as in the newest version, to what the installed one knows.

    A warm-up that is given as a ratio comes before one that is given as steps, as in the newest version.

    Raises:
        VersionError: the installed version has no such order of rows.
        InputError: the order of rows is given by both names.
    """
    set_warmup(args, getattr(args, "warmup_ratio", None) or args.warmup_steps)
    strategy = getattr(args, "train_sampling_strategy", None)
    if getattr(args, "group_by_length", False) and strategy not in (None, "group_by_length"):
        raise InputError("group_by_length=True is train_sampling_strategy='group_by_length' here: pass that.")
    if strategy in (None, "sequential") or has("train_sampling_strategy"):
        return
    for name, value in training_arguments({"train_sampling_strategy": strategy}).items():
        setattr(args, name, value)


def set_sequential(args: Any) -> None:
    """Let a training of `fine_tune` take its rows in their order; before transformers 5.2, no other trainer does."""
    args.train_sampling_strategy = "sequential"


def sampling_strategy(args: Any) -> str:
    """The order of the rows in a training, by its name in the newest version."""
    before = "group_by_length" if getattr(args, "group_by_length", False) else "random"
    return str(getattr(args, "train_sampling_strategy", before))


def loss_type(args: Any) -> str | None:
    """The loss of SFTTrainer, by its name in the newest version; None for another trainer's arguments."""
    given: str | None = getattr(args, "loss_type", None)
    return "nll" if given == "chunked_nll" and not has("one nll") else given


def names_of_mismatched(found: Mapping[str, Any]) -> list[str]:
    """The weights whose shape in the files is another, from the loading info of `from_pretrained`."""
    mismatched = found["mismatched_keys"]
    return [each[0] for each in mismatched] if has("shapes of mismatched_keys") else list(mismatched)


def forget_adapter(model: Any) -> None:
    """Remove what PEFT leaves on a model whose adapter was merged, which the next adapter takes for its own."""
    if not has("no peft_config after an adapter"):
        del model.peft_config


def loss_is_scaled_for_ga(trainer: Any) -> bool | None:
    """Whether a trainer says that its loss is divided by the items of the whole step; None where it says nothing."""
    return trainer.loss_is_scaled_for_ga if has("loss_is_scaled_for_ga") else None
