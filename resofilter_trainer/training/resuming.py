"""What may differ between a checkpoint and the run that resumes from it. Knows settings by name, no Trainer.

A run may have another number of epochs or steps, and divide the rows of a step in another way among micro-batches and
processes. It may do something else about steps that stand out, as to get past one, and says so. All else must be the
same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import InputError
from ..io.made_from import check_made_from, differences
from ..scores.provenance import Provenance
from .plan import Batching

LENGTH = ("epochs", "max_steps")
DIVISION = ("per_process", "processes", "accumulation")
FACTS = ("repeats", "dispatched", "order_by_process", "loss_by_batch", "loss_by_process")  # what a division depends on
SKIPPING = ("on_spike", "skip_update")  # missing where nothing is done about steps that stand out
TOKEN_RULE = "token_rule"  # missing where tokens have no weights by a rule
SAME = "Resume with the numbers it was made with"

Settings = Mapping[str, Any]


def check_settings(there: Settings, here: Settings, what: str) -> None:
    """Raise InputError if a run cannot resume from a checkpoint.

    Args:
        there: the settings of the checkpoint's run.
        here: the settings of this run.
        what: the place and its content, for the message: `'checkpoint-8' holds a checkpoint`.
    """
    names = {*there, "warmup", TOKEN_RULE} - {*LENGTH, *DIVISION, *FACTS, *SKIPPING}
    check_made_from(there, here, what, "Resume with the settings it was made with.", names)
    if (there["max_steps"] is None) != (here["max_steps"] is None):
        raise InputError(
            f"{what} made with {_length(there)}, and this run has {_length(here)}: their epochs differ in length. "
            f"{SAME}, or with more of the same."
        )
    if _rows_per_step(there) != _rows_per_step(here):
        raise InputError(
            f"{what} made with {_division(there)} = {_rows_per_step(there)} rows in a step, and this run has "
            f"{_division(here)} = {_rows_per_step(here)}. Keep the product the same: per_device_train_batch_size, "
            "gradient_accumulation_steps and the number of processes may change."
        )
    why = _undivided(there, here)
    if why is not None:
        raise InputError(f"{what} made with {_division(there)}, and this run has {_division(here)}: {why}. {SAME}.")


def has_other_length(there: Settings, here: Settings) -> bool:
    """Whether a run has another number of epochs or steps than the checkpoint's."""
    return any(there[name] != here[name] for name in LENGTH)


def resumed(provenance: Provenance, there: Settings, here: Settings) -> Provenance:
    """The provenance of a resumed run, with its own numbers where they are others than the checkpoint's."""
    changed = {name: here[name] for name in (*LENGTH, *DIVISION) if here.get(name) != there.get(name)}
    if not changed and not other_skipping(there, here):
        return provenance
    kept = {name: value for name, value in there.items() if name not in SKIPPING}
    changed |= {name: here[name] for name in SKIPPING if name in here}
    return replace(provenance, preparation={**provenance.preparation, "run": {**kept, **changed}})


def other_skipping(there: Settings, here: Settings) -> list[str]:
    """What a run does about steps that stand out and the checkpoint's does not, as `name (there / here)`."""
    return differences(there, here, SKIPPING)


def _undivided(there: Settings, here: Settings) -> str | None:
    """Why the rows of a step cannot be divided in this other way; None where they can, or are divided as there."""
    mine, theirs = _batching(here), _batching(there)
    if mine == theirs:
        return None
    moved = mine.processes != theirs.processes
    several = max(mine.processes, theirs.processes) > 1
    cases = (
        (
            mine.drop_last and mine.per_micro_batch != theirs.per_micro_batch,
            "with dataloader_drop_last=True, other rows would fill no batch",
        ),
        (
            here["repeats"] and _padded(mine) != _padded(theirs),
            "where nothing is dropped, Accelerate repeats rows to end an epoch, and would repeat others",
        ),
        (
            moved and here["order_by_process"],
            "the order of the rows comes from each process's own random state (train_sampling_strategy="
            "'group_by_length', or use_seedable_sampler=False)",
        ),
        (TOKEN_RULE in here, "a token rule sees the tokens of one micro-batch at a time"),
        (here["loss_by_batch"], "the loss of a step is the mean of its micro-batches' own means"),
        (
            several and (here["loss_by_process"] or there.get("loss_by_process", False)),
            "with average_tokens_across_devices=False, the loss is a mean over each process's own tokens",
        ),
    )
    return next((why for refused, why in cases if refused), None)


def _batching(settings: Settings) -> Batching:
    own = {name: settings[name] for name in ("rows", *DIVISION, "drop_last")}
    return Batching(**own, dispatched=settings.get("dispatched", 0))


def _padded(batching: Batching) -> int:
    """The slots of an epoch on all rows, with those that Accelerate repeats."""
    whole = batching.processes if batching.dispatched else batching.per_micro_batch
    return batching.rows if batching.processes == 1 else -(-batching.rows // whole) * whole


def _rows_per_step(settings: Settings) -> int:
    batching = _batching(settings)
    return batching.per_micro_batch * batching.accumulation


def _division(settings: Settings) -> str:
    per_process, processes, accumulation = (settings[name] for name in DIVISION)
    return f"{per_process} rows per device x {accumulation} accumulated x {processes} process{'es' * (processes > 1)}"


def _length(settings: Settings) -> str:
    steps = settings["max_steps"]
    return f"num_train_epochs={settings['epochs']:g}" if steps is None else f"max_steps={steps}"
