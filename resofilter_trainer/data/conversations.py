"""A row's messages in the formats of other trainers, or the reason why a format cannot hold them. Knows dicts only.

    sharegpt    `conversations`, `system` and `tools`, as LLaMA-Factory reads them with `formatting: sharegpt`
    alpaca      `instruction`, `input`, `output`, `system` and `history`, as LLaMA-Factory reads them; axolotl reads the
                first three only

The facts are from LLaMA-Factory's data/README.md: a message from the system stands apart, questions and answers take
turns, and a call of a tool is JSON text of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .chat import FLAGS, Message, Unreadable, flagged

Row = dict[str, Any]

ROLES = {"user": "human", "assistant": "gpt", "tool": "observation"}
ASKS, ANSWERS = ("human", "observation"), ("gpt", "function_call")
READ = {"role", "content", "tool_calls", "tool_call_id", "name", *FLAGS}  # keys of a message


def sharegpt(messages: list[Message], tools: Any) -> Row:
    """Questions and answers in turn, the system's message and the tools apart.

    Args:
        messages: with role and content.
        tools: a list of tools, or None.

    Raises:
        Unreadable: the format cannot hold them unchanged.
    """
    system, turns = _apart(messages)
    made = [_turn(number, message) for number, message in enumerate(turns)]
    for number, turn in enumerate(made):
        if turn["from"] not in (ANSWERS if number % 2 else ASKS):
            raise Unreadable("questions (or results of tools) and answers do not take turns")
    return {"conversations": made, "system": system, "tools": _as_text(tools) if tools else ""}


def alpaca(messages: list[Message], tools: Any) -> Row:
    """The last question and answer, and the earlier ones as history; arguments and errors as for `sharegpt`."""
    if tools or any(message.get("tool_calls") for message in messages):
        raise Unreadable("it has tools")
    system, turns = _apart(messages)
    roles = [message["role"] for message in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise Unreadable(f"its messages are not pairs of user and assistant ({', '.join(roles)})")
    texts = [_text(message, number) for number, message in enumerate(turns)]
    *history, last = ([asked, said] for asked, said in zip(texts[::2], texts[1::2], strict=True))
    return {"instruction": last[0], "input": "", "output": last[1], "system": system, "history": history}


@dataclass(frozen=True)
class Format:
    """A format of conversations.

    Attributes:
        convert: makes a row's columns of its messages and tools.
        columns: the columns, each under the name that LLaMA-Factory's dataset_info.json has for it.
    """

    convert: Callable[[list[Message], Any], Row]
    columns: Mapping[str, str]


FORMATS = {
    "sharegpt": Format(sharegpt, {"messages": "conversations", "system": "system", "tools": "tools"}),
    "alpaca": Format(
        alpaca,
        {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "system": "system",
            "history": "history",
        },
    ),
}


def _apart(messages: list[Message]) -> tuple[str, list[Message]]:
    """The system's text, and the messages after it, which end with an answer and are all learnt alike."""
    if flagged(messages) is not None:
        raise Unreadable("its flags say that some messages are not learnt")
    for number, message in enumerate(messages):
        more = sorted(name for name, value in message.items() if value is not None and name not in READ)
        if more:
            raise Unreadable(f"message {number} has '{more[0]}'")
    has_system = bool(messages) and messages[0]["role"] == "system"
    system, turns = (_text(messages[0], 0), messages[1:]) if has_system else ("", messages)
    if not turns or turns[-1]["role"] != "assistant":
        raise Unreadable("its last message is not the assistant's")
    return system, turns


def _turn(number: int, message: Message) -> Row:
    role, calls = message["role"], message.get("tool_calls")
    if role not in ROLES:
        raise Unreadable(f"turn {number} has the role '{role}'")
    if not calls:
        return {"from": ROLES[role], "value": _text(message, number)}
    if message["content"]:
        raise Unreadable(f"turn {number} has text beside the call of a tool")
    named = [_call(each, number) for each in calls]
    return {"from": "function_call", "value": _as_text(named[0] if len(named) == 1 else named)}


def _call(call: Any, number: int) -> Row:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments") or {}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise Unreadable(f"turn {number} calls a tool with arguments that are no JSON") from error
    if not isinstance(function.get("name"), str):
        raise Unreadable(f"turn {number} calls a tool without a name")
    return {"name": function["name"], "arguments": parsed}


def _text(message: Message, number: int) -> str:
    if not isinstance(message["content"], str):
        raise Unreadable(f"turn {number} has no text")
    return message["content"]


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
