"""The user's rows under TRL's column names, and which of them are empty or repeated.

Knows datasets, not models: a row is a dict here, and its position in the dataset is its `sample_id`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from datasets import Dataset, Features, Json, Value

from ..config import ColumnMapping, InputError, check_kind, with_known_keywords
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
from .layout import MEDIA, RENDERED, TOKENS, Layout, read_row

if TYPE_CHECKING:
    from trl import SFTConfig


@dataclass(frozen=True)
class ReadRows:
    """A dataset under TRL's column names.

    Attributes:
        dataset: the rows that have a meaning; every other column of the user's stays.
        positions: (N,) their positions in the user's dataset.
        refused: why the others have none, by position.
        notes: what was read as something else, a line for each.
        passed: the columns that TRL's preparation reads.
    """

    dataset: Dataset
    positions: np.ndarray
    refused: dict[int, str]
    notes: list[str]
    passed: list[str]


@with_known_keywords
def map_columns(
    dataset: Dataset, mapping: ColumnMapping, text_field: str | None = None, args: SFTConfig | None = None
) -> Dataset:
    """The dataset under TRL's column names: `prompt` and `completion`, `messages`, or `text`.

    SFTTrainer trains on the result as `score_dataset` scores it. Mapped columns are renamed, chat rows are read as
    `data.chat` says, and every other column stays, unless TRL would take the rows for another kind because of it, such
    as `text` beside a mapped prompt. Whole numbers become their digits. Rows in TRL's own format stay as they are.

    Args:
        dataset: the user's rows.
        mapping: which column is which; an empty mapping needs TRL's own column names.
        text_field: the name of the column in which TRL looks for text; by default that of `args`.
        args: SFTTrainer's arguments, by which messages with flags are read; by default `SFTConfig`'s own values.

    Raises:
        InputError: this is no `Dataset` or it has no rows, a mapped column is missing or holds something else than
            text, no column is usable, or a row has no single meaning.
    """
    check_kind("mapping", mapping, ColumnMapping, "a ColumnMapping")
    if text_field is None:
        text_field = "text" if args is None else args.dataset_text_field
    read = read_rows(dataset, mapping, text_field, args)
    if read.refused:
        raise InputError(f"{told_of(read.refused, len(dataset))} Correct or remove them.")
    return read.dataset


def read_rows(
    dataset: Dataset, mapping: ColumnMapping, text_field: str = "text", args: SFTConfig | None = None
) -> ReadRows:
    """The rows under TRL's column names, without those that have no single meaning; arguments as for `map_columns`.

    Raises:
        InputError: as for `map_columns`, except for single rows.
    """
    dataset, learning = _unformatted(dataset), Learning.of(args)
    layout = Layout.of(dataset.column_names, mapping, text_field)
    check_types(dataset, layout)
    check_names(dataset, layout)
    kept, refused, notes, form = dataset, dict[int, str](), set[str](), None
    if layout.kind == "tokens":
        refused = refused_tokens(dataset)
    elif _needs_reading(dataset, layout):
        refused, notes, form = _survey(dataset, layout, learning)
    positions = np.setdiff1d(np.arange(len(dataset)), list(refused))
    if refused:
        kept = dataset.select(positions)
    renamed = _renamed(kept, layout) if form is None else _rewritten(kept, layout, learning, form)
    passed = [name for name in layout.passed if name in renamed.column_names]
    return ReadRows(renamed, positions, refused, sorted(notes | layout.notes), passed)


def told_of(refused: Mapping[int, str], rows: int, what: str = "cannot be read") -> str:
    """A line about rows that cannot be used: how many, which, and the first one's reason."""
    first = min(refused)
    listed = "" if len(refused) == 1 else f": rows {listed_rows(refused)}"
    return f"{len(refused)} of {rows} rows {what}{listed}. Row {first}: {refused[first]}."


def listed_rows(rows: Collection[int]) -> str:
    """The first of some rows, for a message."""
    return ", ".join(map(str, sorted(rows)[:5])) + (", ..." if len(rows) > 5 else "")


@with_known_keywords
def unpack(dataset: Dataset) -> Dataset:
    """Make a row of each sample in rows that TRL has packed: `input_ids`, and `labels` if there are any.

    Args:
        dataset: packed rows, with the lengths of each row's samples in `seq_lengths`. A sample that packing has cut in
            two stays two rows.

    Raises:
        InputError: the rows are not packed, or `seq_lengths` does not fit the tokens.
    """
    check_kind("dataset", dataset, Dataset, "a Dataset")
    if not {"seq_lengths", "input_ids"} <= set(dataset.column_names):
        raise InputError(f"The rows are not packed: no seq_lengths among {', '.join(dataset.column_names)}.")
    columns = [name for name in ("input_ids", "labels") if name in dataset.column_names]

    def split(packed: dict[str, list[Any]]) -> dict[str, list[Any]]:
        samples: dict[str, list[Any]] = {name: [] for name in columns}
        for row, lengths in enumerate(packed["seq_lengths"]):
            for name in columns:
                tokens, start = packed[name][row], 0
                if sum(lengths) != len(tokens):
                    raise InputError(f"A packed row has {len(tokens)} {name} and seq_lengths of {sum(lengths)}.")
                for length in lengths:
                    samples[name].append(tokens[start : start + length])
                    start += length
        return samples

    return dataset.map(split, batched=True, remove_columns=dataset.column_names)


def empty_rows(dataset: Dataset, text_field: str = "text") -> list[int]:
    """The rows with nothing to learn, under TRL's column names: an empty completion, answer or text."""
    return [row for row, example in enumerate(dataset) if _is_blank(_target(example, text_field))]


def duplicate_rows(dataset: Dataset, text_field: str = "text") -> dict[int, int]:
    """The rows whose prompt equals an earlier row's, each with that row (ResoFilter, released code: the first is kept).

    The prompt of messages is everything before the last answer; plain text is compared as a whole. Rows with other
    `tools` or `chat_template_kwargs` are not the same.
    """
    first: dict[str, int] = {}
    repeated = {}
    for row, example in enumerate(dataset):
        earlier = first.setdefault(repr(_query(example, text_field)), row)
        if earlier != row:
            repeated[row] = earlier
    return repeated


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


def _needs_reading(dataset: Dataset, layout: Layout) -> bool:
    """Whether rows may have to be changed or refused: there are messages, or columns to be joined or converted."""
    kinds = {kind_of(dataset.features[name]) for name in layout.sources}
    joined = layout.kind == "pair" and (layout.mapped or has_null(dataset, "prompt"))
    return bool(joined or layout.rendered or layout.before or kinds != {"text"})


def _survey(dataset: Dataset, layout: Layout, learning: Learning) -> tuple[dict[int, str], set[str], Form | None]:
    """Why rows are refused, what is noted of the others, and the form to rewrite these in; None if none changes."""
    refused, notes, forms = dict[int, str](), set[str](), dict[int, tuple[Form, ...]]()
    changed = layout.kind != "messages" and any(isinstance(dataset.features[name], Json) for name in layout.sources)
    batches = dataset.select_columns(layout.reads).iter(AT_ONCE)
    for number, row in enumerate(row for batch in batches for row in _rows(batch)):
        try:
            read = read_row(row, layout, learning)
        except Unreadable as error:
            refused[number] = str(error).rstrip(".")
            continue
        forms[number] = read.forms
        notes |= read.notes
        changed = changed or _differs(read.row, row, layout)
    form, others = _form_of(forms)
    refused |= dict.fromkeys(others, _why_apart(layout, form))
    if layout.kind == "messages" and form == "pair":
        notes.add("flags say that the last message is learnt, and those before it are its prompt")
        changed = True
    return refused, notes, form if changed else None


def _form_of(forms: Mapping[int, tuple[Form, ...]]) -> tuple[Form, list[int]]:
    """The form of most rows, as a dataset has one, and the rows that cannot have it."""
    counts = Counter(each[0] for each in forms.values() if len(each) == 1)
    form = max(get_args(Form), key=counts.__getitem__)
    return form, [row for row, each in forms.items() if form not in each]


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


def _target(example: Mapping[str, Any], text_field: str) -> Any:
    """What the row teaches: its completion, last message, or text."""
    for name in (TOKENS, "completion", "messages"):
        if name in example:
            return example[name]
    return example[text_field]


def _query(example: Mapping[str, Any], text_field: str) -> Any:
    """What the row asks: its prompt, the messages before the last, or the whole text; and its tools and the like."""
    if TOKENS in example:
        return example[TOKENS]
    given = [example[name] for name in RENDERED if example.get(name)]
    if "prompt" in example:
        return example["prompt"], *given
    if "messages" in example:
        return (example["messages"] or [])[:-1], *given
    return example[text_field], *given


def _is_blank(value: Any) -> bool:
    """Whether a value is None, white space, an empty list, or messages whose last has no content and no tool call."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        last = value[-1]
        says = last.get("content", last.get("value", last.get("text")))  # a message, ShareGPT's, or an item of one
        return not last.get("tool_calls") and _is_blank(says)
    return value is None or (isinstance(value, str) and not value.strip()) or value == []
