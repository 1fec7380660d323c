"""Weights that people give to the messages of a chat, and the tokens that have them. Knows datasets, no model.

    {"role": "assistant", "content": "...", "weight": 0.5}  ->  0.5 for each learnt token of the message

A trainer learns a chat's assistant messages each as one run of tokens, so that the runs of a row are its messages in
order. What a flag `weight` of 0 and 1 says elsewhere (`data.chat`) is here a weight, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List
from trl import SFTConfig

from ..config import InputError
from ..model.losses import IGNORE
from .chat import KEYS, Message
from .columns import kind_of
from .preparation import PreparedRows
from .surveys import ROW_POSITION

FLAG, APART = "weight", "message_weight"  # the key in the user's messages, and where it is no flag
ONLY_ASSISTANT = "Weights of messages need assistant_only_loss=True, or completions of one message each"


def weights_apart(dataset: Dataset) -> Dataset:
    """The rows with the weights of their messages under a key that says nothing of what is learnt.

    Raises:
        InputError: no message has a weight, or one is not a number from 0 to 1.
    """
    found, some = dataset, False
    for name, feature in dataset.features.items():
        if kind_of(feature) not in ("messages", "any") or not _has_roles(dataset, name):
            continue
        some = _check_weights(dataset, name) or some
        item = getattr(feature, "feature", None)
        if isinstance(item, dict) and FLAG in item:
            renamed = {APART if key == FLAG else key: value for key, value in item.items()}
            features = Features({**found.features, name: List(renamed)})
            found = found.map(_apart, fn_kwargs={"name": name}, features=features, desc="Reading weights")
        elif isinstance(item, Json) or isinstance(feature, Json):
            found = found.map(_apart, fn_kwargs={"name": name}, features=found.features, desc="Reading weights")
    if not some:
        raise InputError(f"No message has a '{FLAG}', so there are no weights of messages to read.")
    return found


def _apart(row: dict[str, Any], name: str) -> dict[str, Any]:
    def moved(message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        return {APART if key == FLAG else key: value for key, value in message.items()}

    messages = row[name]
    return {name: [moved(each) for each in messages] if isinstance(messages, list) else messages}


def _has_roles(dataset: Dataset, name: str) -> bool:
    """Whether the items of a column are messages: some have a role, as the items of other lists have not."""
    items = (item for each in dataset[name] if isinstance(each, list) for item in each)
    return any(isinstance(item, Mapping) and not {*KEYS["role"]}.isdisjoint(item) for item in items)


def _check_weights(dataset: Dataset, name: str) -> bool:
    """Whether a message of a column has a weight. Raises InputError for a weight that is none."""
    some = False
    for number, messages in enumerate(dataset[name]):
        for place, message in enumerate(messages if isinstance(messages, list) else []):
            value = message.get(FLAG) if isinstance(message, Mapping) else None
            if value is None:
                continue
            some = True
            if not isinstance(value, int | float) or not (math.isfinite(value) and 0 <= value <= 1):
                raise InputError(
                    f"Message {place} of row {number} has {FLAG}={value!r}: give a number from 0 to 1. Divide "
                    "larger ones by the largest."
                )
    return some


def weights_of_tokens(rows: Dataset, prepared: PreparedRows, args: SFTConfig) -> np.ndarray:
    """The weight of each learnt token's message, 1 where it has none: (N,) float32, row after row.

    Args:
        rows: the rows under TRL's column names, of `weights_apart`, with a `ROW_POSITION` column.
        prepared: the same rows, or some of them, as tokens.
        args: what is learnt of a row.

    Raises:
        InputError: a message that is not learnt has a weight, or it is unknown which tokens are whose.
    """
    place_of = {position: place for place, position in enumerate(rows[ROW_POSITION])}
    found = [np.empty(0, np.float32)]
    for tokens in prepared.dataset:
        number = tokens[ROW_POSITION]
        weights = _learnt_weights(rows[place_of[number]], number, args)
        runs = _runs(tokens["labels"])
        cut = args.max_length is not None and len(tokens["labels"]) >= args.max_length and len(runs) <= len(weights)
        if len(runs) != len(weights) and not cut:
            raise InputError(
                f"Row {number} has {len(weights)} messages to learn and {len(runs)} parts that are learnt, so it is "
                "unknown which message's weight is whose: does the chat template mark each assistant message?"
            )
        of_runs = weights[len(weights) - len(runs) :] if args.truncation_mode == "keep_end" else weights[: len(runs)]
        found.append(np.repeat(np.array(of_runs, dtype=np.float32), runs))
    return np.concatenate(found)


def _learnt_weights(row: Mapping[str, Any], number: int, args: SFTConfig) -> list[float]:
    """The weights of a row's learnt messages, in their order. Raises InputError where another message has one."""
    before, learnt = _divided(row, args)
    assistant = bool(args.assistant_only_loss)
    others = [*before, *(each for each in learnt if assistant and each["role"] != "assistant")]
    for message in others:
        if message.get(APART):
            raise InputError(
                f"Row {number} has {FLAG}={message[APART]:g} on a message of the role '{message['role']}' that is not "
                "learnt: leave the weight out, or set it to 0."
            )
    own = [each for each in learnt if not assistant or each["role"] == "assistant"]
    return [1.0 if each.get(APART) is None else float(each[APART]) for each in own]


def _divided(row: Mapping[str, Any], args: SFTConfig) -> tuple[Sequence[Message], Sequence[Message]]:
    """The messages that only come before, and those of which some or all are learnt."""
    if isinstance(row.get("messages"), list) and args.assistant_only_loss:
        return [], row["messages"]
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list) or args.completion_only_loss is False:
        raise InputError(f"{ONLY_ASSISTANT}.")
    if len(completion) != 1 and not args.assistant_only_loss:
        raise InputError(f"{ONLY_ASSISTANT}: one has {len(completion)}.")
    return prompt, completion


def _runs(labels: Sequence[int]) -> list[int]:
    """The lengths of the runs of learnt tokens, without the first token, which nothing predicts."""
    learnt = np.array([False, *(label != IGNORE for label in labels[1:]), False])
    edges = np.flatnonzero(learnt[1:] != learnt[:-1])
    return [int(each) for each in edges[1::2] - edges[::2]]
