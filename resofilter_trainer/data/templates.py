"""Whether a tokenizer's chat template can render the messages of a dataset. Knows datasets, tokenizers and roles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Json
from transformers import PreTrainedTokenizerBase

from ..config import InputError
from .columns import AT_ONCE, kind_of

USUAL = {"system", "user", "assistant", "tool"}  # whatever a template does with these is meant
TEMPLATES = {".jinja", ".jinja2", ".j2", ".txt"}  # what files with a template are called
MARK = "what this message says"


def message_columns(dataset: Dataset) -> list[str]:
    """The columns with messages that TRL gives to the chat template."""
    names = [name for name in ("prompt", "completion", "messages") if name in dataset.column_names]
    first = dataset[0] if names and "input_ids" not in dataset.column_names else {}
    return [name for name in names if isinstance(first.get(name), list)]


def check_template(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, template_path: str | None) -> None:
    """Raise InputError where a template's file is not there, or the rows hold messages and nothing renders them."""
    if template_path is not None and not Path(template_path).exists() and Path(template_path).suffix in TEMPLATES:
        raise InputError(f"There is no chat template at chat_template_path={template_path!r}.")
    if not tokenizer.chat_template and template_path is None and message_columns(dataset):
        raise InputError(
            "The rows hold messages, and the tokenizer has no chat template to render them. Pass the tokenizer of an "
            "instruct model of this family, set its chat_template, or pass chat_template_path in SFTConfig."
        )


def unrendered_roles(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The unusual roles among the messages that the chat template leaves out or refuses."""
    found = {role for name in message_columns(dataset) for role in _roles(dataset, name)} - USUAL
    return {role for role in found if not renders(tokenizer, role)}


def renders(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Whether the chat template renders a message of a role, before or after one of the user."""
    own = {"role": role, "content": MARK}
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for messages in ([user, own, answer], [own, user, answer], [user, answer, own]):
        try:
            if MARK in str(tokenizer.apply_chat_template(messages, tokenize=False)):
                return True
        except Exception:  # templates raise what they like
            continue
    return False


def rows_with(dataset: Dataset, roles: set[str]) -> dict[int, str]:
    """The rows with a message of one of the roles, each with the first such role."""
    found: dict[int, str] = {}
    columns = message_columns(dataset)
    for row, example in enumerate(dataset.select_columns(columns)):
        own = [each["role"] for name in columns for each in example[name] or []]
        first = next((role for role in own if role in roles), None)
        if first is not None:
            found[row] = first
    return found


def _roles(dataset: Dataset, name: str) -> Iterator[str]:
    """The roles of all messages of a column, each once a piece."""
    rows = dataset.select_columns([name])
    item: Any = getattr(rows.features[name], "feature", None)
    if kind_of(rows.features[name]) != "messages" or isinstance(item, Json) or not isinstance(item, dict):
        yield from {each["role"] for row in rows for each in row[name] or []}
        return
    for table in rows.with_format("arrow").iter(AT_ONCE):
        messages = table[name].combine_chunks().flatten()
        yield from (role for role in pa.array(messages.field("role")).unique().to_pylist() if role is not None)
