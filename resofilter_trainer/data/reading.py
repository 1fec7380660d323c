"""Reads the rows of a dataset under TRL's column names, some at a time, so that processes can share the work.

found in some rows -> settled by all of them -> some rows under TRL's names
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from datasets import Dataset, Features, Json, Value

from ..config import ColumnMapping, InputError
from .chat import Form, Learning, Unreadable
from .columns import (
    AT_ONCE,
    check_names,
    check_types,
    has_null,
    kind_of,
    media_columns,
    messages_feature,
    refused_tokens,
)
from .exact_json import encoded
from .layout import MEDIA, Layout, read_row

if TYPE_CHECKING:
    from trl import SFTConfig


@dataclass(frozen=True)
class Found:
    """What is found in some rows.

    Attributes:
        refused: why rows have no single meaning, by position.
        notes: what was read as something else.
        forms: the positions of the rows that can have these forms and no other.
        changed: whether a row's values are others than those of its columns.
    """

    refused: dict[int, str]
    notes: set[str] = field(default_factory=set)
    forms: dict[tuple[Form, ...], np.ndarray] = field(default_factory=dict)
    changed: bool = False

    def moved(self, start: int) -> Found:
        """The same, of rows the first of which has the position `start` and not 0."""
        refused = {start + row: why for row, why in self.refused.items()}
        return Found(refused, self.notes, {each: start + rows for each, rows in self.forms.items()}, self.changed)


@dataclass(frozen=True)
class Meaning:
    """What all rows together mean.

    Attributes:
        refused: why rows have no meaning in this dataset, by position.
        notes: what was read as something else, a line for each.
        form: the form to rewrite the others in; None if none changes.
    """

    refused: dict[int, str]
    notes: list[str]
    form: Form | None


@dataclass(frozen=True)
class Reader:
    """Reads the rows of a dataset, some at a time: `found` in all of them, then `settled`, then `under_trls_names`.

    Attributes:
        dataset: the user's rows, without a format.
        layout: which column is which.
        learning: what the trainer learns.
        reads: whether rows may have to be changed or refused by what they say.
    """

    dataset: Dataset
    layout: Layout
    learning: Learning
    reads: bool

    @classmethod
    def of(cls, dataset: Dataset, mapping: ColumnMapping, text_field: str, args: SFTConfig | None) -> Reader:
        """Arguments and errors as for `read_rows`."""
        dataset = _unformatted(dataset)
        layout = Layout.of(dataset.column_names, mapping, text_field)
        check_types(dataset, layout)
        check_names(dataset, layout)
        reads = layout.kind != "tokens" and _needs_reading(dataset, layout)
        return cls(dataset, layout, Learning.of(args), reads)

    def over(self, dataset: Dataset) -> Reader:
        """The same reader of other rows, or of the same ones stored elsewhere."""
        return dataclasses.replace(self, dataset=dataset)

    def found(self) -> Found:
        """What is found in the rows."""
        if self.layout.kind == "tokens":
            return Found(refused_tokens(self.dataset))
        return _found(self.dataset, self.layout, self.learning) if self.reads else Found({})

    def settled(self, parts: Sequence[Found]) -> Meaning:
        """What the rows mean, by what is found in all of them."""
        refused = {row: why for each in parts for row, why in each.refused.items()}
        notes, form = {note for each in parts for note in each.notes} | self.layout.notes, None
        if self.reads:
            most, others = _form_of(parts)
            refused |= dict.fromkeys(others, _why_apart(self.layout, most))
            by_flags = self.layout.kind == "messages" and most == "pair"
            if by_flags:
                notes.add("flags say that the last message is learnt, and those before it are its prompt")
            form = most if by_flags or any(each.changed for each in parts) else None
        return Meaning(refused, sorted(notes), form)

    def under_trls_names(self, positions: np.ndarray, form: Form | None) -> Dataset:
        """Some rows, which are not refused, under TRL's column names; their other columns stay."""
        kept = self.dataset if len(positions) == len(self.dataset) else self.dataset.select(positions)
        return _renamed(kept, self.layout) if form is None else _rewritten(kept, self.layout, self.learning, form)


def _needs_reading(dataset: Dataset, layout: Layout) -> bool:
    """Whether rows may have to be changed or refused: there are messages, or columns to be joined or converted."""
    kinds = {kind_of(dataset.features[name]) for name in layout.sources}
    joined = layout.kind == "pair" and (layout.mapped or has_null(dataset, "prompt"))
    return bool(joined or layout.rendered or layout.before or kinds != {"text"})


def _found(dataset: Dataset, layout: Layout, learning: Learning) -> Found:
    """What is found in rows that have to be read."""
    refused, notes, forms = dict[int, str](), set[str](), dict[tuple[Form, ...], list[int]]()
    changed = layout.kind != "messages" and any(isinstance(dataset.features[name], Json) for name in layout.sources)
    batches = dataset.select_columns(layout.reads).iter(AT_ONCE)
    for number, row in enumerate(row for batch in batches for row in _rows(batch)):
        try:
            read = read_row(row, layout, learning)
        except Unreadable as error:
            refused[number] = str(error).rstrip(".")
            continue
        forms.setdefault(read.forms, []).append(number)
        notes |= read.notes
        changed = changed or _differs(read.row, row, layout)
    return Found(refused, notes, {each: np.array(rows) for each, rows in forms.items()}, changed)


def _form_of(parts: Sequence[Found]) -> tuple[Form, list[int]]:
    """The form of most rows, as a dataset has one, and the rows that cannot have it."""
    counts = Counter[Form]()
    for part in parts:
        counts.update({forms[0]: len(rows) for forms, rows in part.forms.items() if len(forms) == 1})
    form = max(get_args(Form), key=counts.__getitem__)
    others = [row for part in parts for forms, rows in part.forms.items() if form not in forms for row in rows.tolist()]
    return form, sorted(others)


def _why_apart(layout: Layout, form: Form) -> str:
    """Why a row cannot stand in a dataset whose rows have this form."""
    why = "flags say what is learnt of it, and not of most rows"
    if layout.kind == "pair":
        own, others = ("messages", "text") if form == "text" else ("text", "messages")
        why = f"its prompt and completion are {own}, and those of most rows {others}"
    return f"{why}: score such rows in a dataset of their own"


def _differs(read: Mapping[str, Any], row: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a row's values are others than those of the columns that became them."""
    if layout.kind == "pair" and layout.mapped:
        return True
    sources = dict(zip(layout.targets, layout.sources, strict=True))
    return any(value != row[sources.get(name, name)] for name, value in read.items())


def _renamed(dataset: Dataset, layout: Layout) -> Dataset:
    """The dataset with its columns renamed, and without those that mislead TRL."""
    gone = layout.left_out - set(layout.sources)
    gone |= set(dataset.column_names) & set(MEDIA) - set(media_columns(dataset)) if not layout.mapped else set()
    names = {old: new for old, new in zip(layout.sources, layout.targets, strict=False) if old != new}
    gone |= set(names.values()) & set(dataset.column_names)  # equal to what is renamed
    dataset = dataset.remove_columns(sorted(gone)) if gone else dataset
    return dataset.rename_columns(names) if names else dataset


def _rewritten(dataset: Dataset, layout: Layout, learning: Learning, form: Form) -> Dataset:
    """The dataset with the rows as they were read."""
    if len(dataset) == 0:
        return dataset
    features, names = dict(dataset.features), set(dataset.column_names)
    messages = form != "text"
    gone = {*layout.sources, *layout.left_out, *(layout.before if messages else ())} & names
    gone |= set() if layout.mapped else names & set(MEDIA) - set(media_columns(dataset))
    made = {name: features[name] for name in layout.rendered}
    if "chat_template_kwargs" in made:
        made["chat_template_kwargs"] = Json()  # which tells no argument from one that is None
    targets = ("prompt", "completion") if form == "pair" else layout.targets
    for name in targets:
        source = layout.turns or name
        own = layout.kind == "messages" or not layout.mapped
        made[name] = messages_feature(features.get(source) if own else None) if messages else Value("string")
    kept = {name: feature for name, feature in features.items() if name not in gone}
    return dataset.map(
        _read_batch,
        batched=True,
        batch_size=AT_ONCE,
        remove_columns=sorted(gone),
        features=Features(kept | made),
        fn_kwargs={"layout": layout, "learning": learning, "form": form, "features": made},
        desc="Reading rows",
    )


def _read_batch(
    batch: Mapping[str, Sequence[Any]], layout: Layout, learning: Learning, form: Form, features: Mapping[str, Any]
) -> dict[str, list[Any]]:
    needed = {name: batch[name] for name in layout.reads}
    read = [read_row(row, layout, learning).in_form(form) for row in _rows(needed)]
    return {name: [encoded(features[name], each[name]) for each in read] for name in read[0]}


def _rows(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _unformatted(dataset: Dataset) -> Dataset:
    """The dataset as plain Python values: the columns that its format shows. Raises InputError where it has none."""
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"A dataset is needed, got {type(dataset).__name__}. Pass one split of a DatasetDict, make a Dataset of a "
            "list with Dataset.from_list, and pass a stream to score_stream."
        )
    if len(dataset) == 0:
        raise InputError("The dataset has no rows.")
    shown = dataset.format
    if shown["type"] == "custom":
        raise InputError(
            "The dataset has a transform (with_transform), which may give other rows each time it is read: apply it "
            "with dataset.map first, or remove it with dataset.with_format(None)."
        )
    if not shown["output_all_columns"] and set(shown["columns"]) != set(dataset.column_names):
        dataset = dataset.with_format(None).select_columns(shown["columns"])
    return dataset if dataset.format["type"] is None else dataset.with_format(None)
