"""Chat rows as people have them, one at a time, as TRL reads them; or the reason why a row has no single meaning.

    a row has                                           it is read as
    `from` and `value`, or `role` and `content`         `role` and `content`
    roles human, gpt, bot, ... in any case              user, assistant, ...
    content of one part, `[{"type": "text", ...}]`      its text
    a column `system` (or `system_prompt`)              the first message, from the system
    a column `history` of `[question, answer]` pairs    earlier messages of the user and the assistant
    `tools`, `chat_template_kwargs`, `history`: ""      none; JSON text is parsed
    flags `weight`, `train`, `training`, `loss`         what the settings do anyway; or, if only the last message is
                                                        learnt, the messages before it as prompt, and it as completion
    a column `prompt` that repeats the first message    the messages alone

Anything else raises `Unreadable`, with a reason that says what to change. Knows dicts, not datasets or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]
Form = Literal["messages", "pair", "text"]

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatgpt", "bing", "bard", "claude", "model", "ai"), "assistant"),
}
KEYS = {"role": ("role", "from"), "content": ("content", "value")}
FLAGS = ("weight", "train", "training", "loss")
REWRITE = "Write it as messages with role and content."
BY_HAND = "Remove the flags, or pass input_ids and labels."


class Unreadable(ValueError):
    """A row that has no single meaning; the message is the reason."""


@dataclass(frozen=True)
class Learning:
    """What a trainer learns of a row.

    Attributes:
        assistant_only: whether it learns the assistant's messages only, `assistant_only_loss`.
        completion_only: whether it learns the completion only, `completion_only_loss`; None for pairs only.
    """

    assistant_only: bool = False
    completion_only: bool | None = None

    @classmethod
    def of(cls, args: Any) -> Learning:
        """What SFTTrainer learns with these arguments, an SFTConfig; None for its defaults."""
        return cls() if args is None else cls(bool(args.assistant_only_loss), args.completion_only_loss)


# ---- messages


def messages_of(value: Any, answered: bool = False) -> list[Message]:
    """Messages with `role` and `content`, as text; what else they hold stays.

    Args:
        value: a list of messages; None for none.
        answered: whether others follow; of a row's last message, the content may be missing.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unreadable(f"its messages are {_kind(value)}, not a list. {REWRITE}")
    last = len(value) - 1
    return [_message(each, number, number == last and not answered) for number, each in enumerate(value)]


def role_changes(value: Any) -> set[tuple[str, str]]:
    """The roles of messages that are read as another, each with that."""
    old = {str(_either(each, "role")) for each in value or [] if isinstance(each, Mapping)}
    return {(role, new) for role in old if (new := ROLES.get(role.strip().lower(), role)) != role}


def _message(message: Any, number: int, is_last: bool) -> Message:
    if message is None:
        raise Unreadable(f"message {number} is null")
    if not isinstance(message, Mapping):
        raise Unreadable(f"message {number} is {_kind(message)}. {REWRITE}")
    role = _role(message, number)
    content = _content(_either(message, "content", number), number)
    if content is None and not is_last and not message.get("tool_calls"):
        raise Unreadable(f"message {number} ({role}) has no content")
    others = {name: value for name, value in message.items() if name not in (*KEYS["role"], *KEYS["content"])}
    return {"role": role, "content": content, **others}


def _role(message: Mapping[str, Any], number: int) -> str:
    role = _either(message, "role", number)
    if not isinstance(role, str):
        raise Unreadable(f"message {number} has no role. Its keys are {', '.join(message)}. {REWRITE}")
    known = ROLES.get(role.strip().lower())
    if known is None and message.get("from") is not None:
        raise Unreadable(
            f"message {number} has the role '{role}', which has no single meaning. Rename it to one of system, user, "
            "assistant and tool; a call of a function belongs into tool_calls of an assistant message."
        )
    return role if known is None else known  # of `role`: the chat template may know it, see `preparation`


def _either(message: Mapping[str, Any], name: str, number: int | None = None) -> Any:
    """The value under TRL's key or under ShareGPT's."""
    values = [message[key] for key in KEYS[name] if message.get(key) is not None]
    if number is not None and len(values) == 2 and values[0] != values[1]:
        raise Unreadable(f"message {number} has different values in {' and '.join(KEYS[name])}. Remove one.")
    return values[0] if values else None


def _content(value: Any, number: int) -> str | None:
    if isinstance(value, list):
        parts = [part for part in value if part is not None]
        texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(parts) != 1 or not isinstance(texts[0] if texts else None, str):
            kinds = ", ".join(str(part.get("type")) if isinstance(part, Mapping) else _kind(part) for part in parts)
            raise Unreadable(f"message {number} has the parts: {kinds or 'none'}. Pass its content as one text.")
        value = texts[0]
    if not (value is None or isinstance(value, str)):
        raise Unreadable(f"the content of message {number} is {_kind(value)}, not text. Convert it to text.")
    return value


# ---- columns beside the messages


def with_system(messages: list[Message], system: Any, column: str) -> list[Message]:
    """The messages after a message from the system, unless they begin with it already."""
    text = text_of(system, column)
    if not (text or "").strip():
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        if (messages[0]["content"] or "").strip() == str(text).strip():
            return messages
        raise Unreadable(f"column '{column}' differs from its system message")
    return [{"role": "system", "content": text}, *messages]


def turns_of(history: Any) -> list[Message]:
    """Earlier questions and answers as messages: of `[question, answer]` pairs, messages, or JSON text of them."""
    history = _parsed(history, "history")
    if history is None:
        return []
    if isinstance(history, list) and all(isinstance(each, Mapping) for each in history):
        return messages_of(history, answered=True)
    messages = []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise Unreadable("column 'history' is not a list of [question, answer] pairs of text")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return messages


def tools_of(value: Any) -> Any:
    """The tools as TRL reads them: a list, JSON text of a list, or None."""
    tools = _parsed(value, "tools")
    if tools is None:
        return None
    if not (isinstance(tools, list) and all(isinstance(each, Mapping) for each in tools)):
        raise Unreadable(f"column 'tools' holds {_kind(tools)}, not a list of tools. Write a list of JSON objects.")
    return value


def template_settings_of(value: Any) -> dict[str, Any]:
    """The arguments of the chat template, `chat_template_kwargs`; empty for null or an empty text."""
    settings = _parsed(value, "chat_template_kwargs")
    if settings is not None and not isinstance(settings, Mapping):
        raise Unreadable(f"column 'chat_template_kwargs' holds {_kind(settings)}. Write a JSON object.")
    return dict(settings or {})


def text_of(value: Any, column: str) -> str | None:
    """A text, or the digits of a whole number, which lose nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not (value is None or isinstance(value, str)):
        raise Unreadable(f"column '{column}' holds {_kind(value)}, not text. Convert it to text.")
    return value


def repeats_first(prompt: Any, messages: Sequence[Message]) -> bool:
    """Whether a `prompt` beside messages says nothing else than they do: it is empty, or their beginning."""
    if isinstance(prompt, list):
        return messages_of(prompt) == list(messages[: len(prompt)])
    first = next((each["content"] for each in messages if each["role"] == "user"), None)
    text = text_of(prompt, "prompt")
    return not (text or "").strip() or str(text).strip() == (first or "").strip()


def _parsed(value: Any, column: str) -> Any:
    """A value, or what its JSON text says; None for an empty text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        hint = "Leave it empty for none, or remove the column."
        raise Unreadable(f"column '{column}' is no JSON ({error}). {hint}") from error


def _kind(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "a dict"}
    return names.get(type(value), type(value).__name__)


# ---- flags: which messages are learnt


def forms_of(messages: Sequence[Message], learning: Learning) -> tuple[Form, ...]:
    """The forms in which a trainer learns what the messages' flags say: as messages, or the last as a completion."""
    assistants = {number for number, each in enumerate(messages) if each["role"] == "assistant"}
    if learning.assistant_only and not assistants:
        raise Unreadable("no assistant message")
    learnt = flagged(messages)
    if learnt is None:
        return ("messages",)
    last = len(messages) - 1
    if not learnt:
        raise Unreadable("its flags say that no message is learnt")
    as_pair = learnt == {last} <= assistants and last > 0 and learning.completion_only is not False
    as_messages = learning.assistant_only and learnt == assistants
    if as_messages or as_pair:
        return (*(("messages",) if as_messages else ()), *(("pair",) if as_pair else ()))
    hint = "Pass assistant_only_loss=True." if learnt == assistants else BY_HAND
    raise Unreadable(f"its flags say that messages {_listed(learnt)} of {len(messages)} are learnt. {hint}")


def check_flags(prompt: Sequence[Message], completion: Sequence[Message], learning: Learning) -> None:
    """Raise Unreadable where the flags of a pair say otherwise than the settings do."""
    messages = [*prompt, *completion]
    learnt = flagged(messages)
    first = 0 if learning.completion_only is False else len(prompt)
    expected = set(range(first, len(messages)))
    if learning.assistant_only:
        expected &= {number for number, each in enumerate(messages) if each["role"] == "assistant"}
        if not expected:
            raise Unreadable("no assistant message")
    if learnt is not None and learnt != expected:
        raise Unreadable(f"its flags say that messages {_listed(learnt)} of {len(messages)} are learnt. {BY_HAND}")


def flagged(messages: Sequence[Message]) -> set[int] | None:
    """The messages that are learnt, by their flags; None where no flag says that one is not.

    Without a flag, an assistant's message is learnt and another is not.
    """
    flags = [_flag(each, number) for number, each in enumerate(messages)]
    if False not in flags:
        return None
    roles = [each["role"] == "assistant" for each in messages]
    return {number for number, flag in enumerate(flags) if (roles[number] if flag is None else flag)}


def _flag(message: Message, number: int) -> bool | None:
    values = {name: message[name] for name in FLAGS if message.get(name) is not None}
    for name, value in values.items():
        if value not in (0, 1):
            raise Unreadable(f"message {number} has {name}={value!r}: a trainer learns a message or not. {BY_HAND}")
    found = {bool(value) for value in values.values()}
    if len(found) == 2:
        raise Unreadable(f"message {number} has flags that contradict each other: {', '.join(values)}. {BY_HAND}")
    return found.pop() if found else None


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


# ---- as text


def said(value: Any) -> str:
    """A text as it is, or messages one after another, each with its role; a single message has none."""
    if not isinstance(value, list):
        return "" if value is None else str(value)
    messages = [(str(each.get("role", each.get("from", ""))), content_of(each)) for each in value]
    return messages[0][1] if len(messages) == 1 else "\n\n".join(f"{role}: {content}" for role, content in messages)


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list with text among images and the like."""
    value = message.get("content", message.get("value"))
    if isinstance(value, list):
        return "\n".join(str(each["text"]) for each in value if isinstance(each, Mapping) and "text" in each)
    return "" if value is None else str(value)
