"""Which column is which, and how one row is read under TRL's column names. Knows dicts and names, not datasets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..config import ColumnMapping, InputError
from .chat import (
    Form,
    Learning,
    Message,
    Unreadable,
    check_flags,
    forms_of,
    messages_of,
    repeats_first,
    role_changes,
    template_settings_of,
    text_of,
    tools_of,
    turns_of,
    with_system,
)

TOKENS = "input_ids"
RENDERED = {"tools": tools_of, "chat_template_kwargs": template_settings_of}  # what TRL gives to the chat template
MASKS = ("labels", "completion_mask", "assistant_masks")  # that TRL reads of rows that are tokens
SYSTEM, HISTORY = ("system", "system_prompt"), "history"
IMAGES = ("image", "images")  # that TRL reads
MEDIA = (*IMAGES, "video", "videos", "audio", "audios")
KNOWN_PAIRS = [
    (("instruction", "input"), "output"),
    (("instruction",), "output"),
    (("question",), "answer"),
    (("query",), "response"),
    (("problem",), "solution"),
]


@dataclass(frozen=True)
class Layout:
    """The columns of a dataset and what each is for.

    Attributes:
        kind: what a row is to TRL.
        columns: all columns of the dataset.
        mapping: the user's own mapping, which may be empty.
        text_field: the column in which TRL looks for text.
        turns: the column with messages, of the kind `"messages"`.
    """

    kind: Literal["tokens", "pair", "messages", "text"]
    columns: tuple[str, ...]
    mapping: ColumnMapping
    text_field: str = "text"
    turns: str | None = None

    @classmethod
    def of(cls, columns: Sequence[str], mapping: ColumnMapping, text_field: str = "text") -> Layout:
        """The layout of a dataset with these columns.

        Raises:
            InputError: a mapped column is missing, or nothing can be trained on.
        """
        missing = [column for column in mapping.columns if column not in columns]
        if missing:
            raise InputError(f"The dataset has no column '{missing[0]}'. It has: {', '.join(columns)}.")
        names, turns = set(columns), mapping.messages_column
        if mapping.columns:
            kind = "pair" if mapping.prompt_columns else "messages" if turns else "text"
        elif TOKENS in names or {"prompt", "completion"} <= names:
            kind = "tokens" if TOKENS in names else "pair"
        elif {"messages", "conversations"} <= names:
            raise InputError(
                "The dataset has 'messages' and 'conversations'. Say which to train on: "
                'messages_column="messages" or messages_column="conversations".'
            )
        elif names & {"messages", "conversations"}:
            kind, turns = "messages", "messages" if "messages" in names else "conversations"
        elif text_field in names and "prompt" not in names:
            kind = "text"
        else:
            listed, hint = ", ".join(columns), _hint(columns, text_field)
            raise InputError(f"No column of the dataset can be trained on. It has: {listed}. {hint}")
        return cls(kind, tuple(columns), mapping, text_field, turns)  # type: ignore[arg-type]

    @property
    def mapped(self) -> bool:
        """Whether the user says which column is which."""
        return bool(self.mapping.columns)

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns that TRL trains on, by its names."""
        named = {"tokens": (TOKENS,), "pair": ("prompt", "completion"), "messages": ("messages",)}
        return named.get(self.kind, (self.text_field,))

    @property
    def sources(self) -> tuple[str, ...]:
        """The columns that become these."""
        if self.mapped:
            return tuple(self.mapping.columns)
        return self.targets if self.turns is None else (self.turns,)

    @cached_property
    def rendered(self) -> tuple[str, ...]:
        """The columns that TRL gives to the chat template."""
        return tuple(name for name in RENDERED if self._beside(name) and self.kind != "tokens")

    @cached_property
    def before(self) -> tuple[str, ...]:
        """The columns with what comes before a row's first message: the system's message, earlier turns."""
        return tuple(name for name in (*SYSTEM, HISTORY) if self._beside(name) and self.kind in ("pair", "messages"))

    @property
    def repeated_prompt(self) -> bool:
        """Whether a column `prompt` stands beside messages that nobody has mapped."""
        return self.kind == "messages" and not self.mapped and "prompt" in self.columns

    @property
    def reads(self) -> list[str]:
        """The columns that `read_row` reads."""
        extra = ("prompt",) if self.repeated_prompt else ()
        return list(dict.fromkeys((*self.sources, *self.rendered, *self.before, *extra)))

    @property
    def left_out(self) -> set[str]:
        """The columns by which TRL would take a row for one of another kind; a mapping decides which kind it is."""
        if self.kind == "tokens":
            return set()
        others = {"prompt", "completion", "messages", "conversations", "chosen", "rejected"}
        if self.mapped:
            others |= {self.text_field, TOKENS, *MASKS, *IMAGES}
        return (others & set(self.columns)) - set(self.targets)

    @property
    def notes(self) -> set[str]:
        """What nobody has mapped and is left out."""
        others = set() if self.mapped else self.left_out - {*self.sources, "prompt"}
        return {f"column '{name}' stands beside {' and '.join(self.targets)} and was left out" for name in others}

    @property
    def passed(self) -> tuple[str, ...]:
        """The columns, under TRL's names, that its preparation reads."""
        if self.kind == "tokens":
            return (TOKENS, *MASKS, "prompt", "completion", "messages")
        if self.kind == "messages":
            return ("messages", "prompt", "completion", *self.rendered)  # a pair, if flags say so
        # TRL ends a text beside a pair, if there is one
        text = (self.text_field,) if self.kind == "pair" and not self.mapped else ()
        return (*self.targets, *self.rendered, *text)

    def _beside(self, name: str) -> bool:
        return name in self.columns and name not in self.sources


@dataclass(frozen=True)
class Read:
    """A row under TRL's names.

    Attributes:
        row: its columns.
        forms: the forms in which a trainer learns what is to be learnt; messages may be a pair as well. Text, alone or
            in a pair, is `"text"`.
        notes: what was read as something else.
    """

    row: dict[str, Any]
    forms: tuple[Form, ...]
    notes: frozenset[str] = field(default=frozenset())

    def in_form(self, form: Form) -> dict[str, Any]:
        """The row's columns, with messages as a pair if that is the form."""
        if form != "pair" or "messages" not in self.row:
            return self.row
        others = {name: value for name, value in self.row.items() if name != "messages"}
        return {"prompt": self.row["messages"][:-1], "completion": self.row["messages"][-1:], **others}


def read_row(row: Mapping[str, Any], layout: Layout, learning: Learning) -> Read:
    """A row under TRL's names.

    Args:
        row: its columns in the dataset, those of `layout.reads`.
        layout: which column is which; not of tokens, which need no reading.
        learning: what the trainer learns.

    Raises:
        Unreadable: the row has no single meaning.
        InputError: no row of the dataset has one, as a column stands where it has none.
    """
    readers = {"messages": _read_messages, "pair": _read_pair, "text": _read_text}
    read = readers[layout.kind](row, layout, learning)
    return Read(read.row | {name: RENDERED[name](row[name]) for name in layout.rendered}, read.forms, read.notes)


def _read_messages(row: Mapping[str, Any], layout: Layout, learning: Learning) -> Read:
    value = row[str(layout.turns)]
    messages = messages_of(value)
    if not messages:
        return Read({"messages": []}, ("messages",))
    notes = _notes(value)
    if layout.repeated_prompt:
        if not repeats_first(row["prompt"], messages):
            raise Unreadable(
                "column 'prompt' is not its first message. Remove it, or pass messages_column="
                f'"{layout.turns}" to train on the messages alone.'
            )
        notes.add("column 'prompt' repeats the messages and was left out")
    full = _after(row, layout, messages, notes)
    forms = forms_of(full, learning)
    return Read({"messages": full}, forms, frozenset(notes))


def _read_pair(row: Mapping[str, Any], layout: Layout, learning: Learning) -> Read:
    pair = row if not layout.mapped else prompt_and_completion(row, layout.mapping)
    prompt, completion = pair["prompt"], pair["completion"]
    if prompt is None or prompt == []:
        raise Unreadable("the prompt is null or has no message")
    if isinstance(prompt, str) and (completion is None or isinstance(completion, str)):
        _refuse_before(row, layout)
        return Read({"prompt": prompt, "completion": completion}, ("text",))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise Unreadable("one of prompt and completion is text, the other is not. Write both as messages, or as text.")
    asked, said = messages_of(prompt, answered=True), messages_of(completion)
    notes = _notes(prompt) | _notes(completion)
    asked = _after(row, layout, asked, notes)
    if said:
        check_flags(asked, said, learning)
    return Read({"prompt": asked, "completion": said}, ("pair",), frozenset(notes))


def _read_text(row: Mapping[str, Any], layout: Layout, learning: Learning) -> Read:
    column = layout.sources[0]
    return Read({layout.text_field: text_of(row[column], column)}, ("text",))


def prompt_and_completion(row: Mapping[str, Any], mapping: ColumnMapping) -> dict[str, Any]:
    """A row's mapped prompt columns joined, and its completion, as text or as messages; whole numbers as digits."""
    texts = [text_of(row[column], column) or "" for column in mapping.prompt_columns]
    prompt = "\n\n".join(text for text in texts if text.strip())
    completion = text_of(row[str(mapping.completion_column)], str(mapping.completion_column)) or ""
    if mapping.conversational:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
    return {"prompt": prompt if prompt[-1:].isspace() else prompt + mapping.separator, "completion": completion}


def _after(row: Mapping[str, Any], layout: Layout, messages: list[Message], notes: set[str]) -> list[Message]:
    """The messages after those that other columns hold; adds to the notes."""
    if HISTORY in layout.before and (earlier := turns_of(row[HISTORY])):
        if layout.kind == "messages":
            raise Unreadable("column 'history' stands beside messages. Add it to them, or remove it.")
        messages = [*earlier, *messages]
        notes.add("column 'history' became earlier messages")
    for column in layout.before:
        if column != HISTORY and (longer := with_system(messages, row[column], column)) is not messages:
            messages = longer
            notes.add(f"column '{column}' became the first message")
    return messages


def _refuse_before(row: Mapping[str, Any], layout: Layout) -> None:
    """Raise InputError where a system's message or earlier turns stand beside a prompt that is plain text."""
    for column in layout.before:
        value = row[column]
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            continue
        choice = f' join it to the prompt with prompt_column=["{column}", ...],' if column != HISTORY else ""
        raise InputError(
            f"Column '{column}' belongs before the prompt, which is plain text. Make messages of all with "
            f"conversational=True, prompt_column and completion_column,{choice} or remove the column."
        )


def _notes(messages: Any) -> set[str]:
    changes = sorted(role_changes(messages))
    notes = {f"role {old} was read as {new}" for old, new in changes}
    if any(isinstance(each, Mapping) and isinstance(each.get("content"), list) for each in messages or []):
        notes.add("content of one part was read as its text")
    return notes


def scored_columns(preparation: Mapping[str, Any]) -> ColumnMapping:
    """The column mapping of a table of scores, from the `preparation` of its provenance."""
    names = [each.name for each in dataclasses.fields(ColumnMapping)]
    return ColumnMapping(**{name: preparation[name] for name in names if preparation.get(name) not in (None, [])})


def _hint(columns: Sequence[str], text_field: str) -> str:
    for prompts, completion in KNOWN_PAIRS:
        if {*prompts, completion} <= set(columns):
            named = json.dumps(prompts[0] if len(prompts) == 1 else prompts)
            return f'Say which is which: prompt_column={named}, completion_column="{completion}".'
    if text_field in columns:
        return f"'prompt' has no 'completion' beside it: pass text_column=\"{text_field}\" to train on the text alone."
    return 'Say which is which: prompt_column="X", completion_column="Y"; messages_column="X"; or text_column="X".'
