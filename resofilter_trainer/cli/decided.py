"""What scores and a selection say of a row: kept or dropped, why, and where its score lies. Imports torch for texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..config import InputError
from ..io.hub import at_hand, is_on_hub
from ..scores.full_step import full_step_of, percent
from ..scores.shards import span_in
from ..selecting.data_selector import unsigned

if TYPE_CHECKING:
    from ..scores.provenance import Provenance
    from ..scores.score_table import ScoreTable
    from ..selecting.selection import Selection

Content = dict[str, Any]
NO_NUMBER = ("sample_id", "prompt", "reason")  # columns of scores that say nothing of a row's place


class Decided(NamedTuple):
    """What a folder says of the rows of a dataset.

    Attributes:
        provenance: that of the scores.
        scores: a line for each row; None where there is only a selection.
        selection: the decision about each row; None where none was made.
        epochs: the selections of a run by their epochs, counted from 1.
    """

    provenance: Provenance
    scores: ScoreTable | None
    selection: Selection | None
    epochs: Mapping[int, Selection]


def decided_of(source: str, selection: str | None = None) -> Decided | None:
    """What the folder or file of scores, of a selection, or of a run without a ledger says; None for anything else.

    Args:
        source: the folder or file, also on the hub.
        selection: the output of `select`, if it is in another folder.

    Raises:
        InputError: a file is damaged or of another version, or the selection was made from other scores.
    """
    from ..ledger.schema import LEDGER
    from ..report import read_contents
    from ..scores.provenance import Provenance
    from ..scores.score_table import SCORES_FILE
    from ..selecting.results import NAME
    from ..selecting.selection import SELECTION_FILE, Selection

    place = at_hand(source, SCORES_FILE, SELECTION_FILE)
    folders = (place, place / NAME, place / "scores")
    if not is_on_hub(source) and (place.name == LEDGER or any((each / LEDGER).is_dir() for each in folders)):
        return None
    alone = place if place.name.startswith("selection") and place.is_file() else place / SELECTION_FILE
    if any((each / SCORES_FILE).is_file() for each in folders) or (place.suffix == ".parquet" and alone != place):
        found = read_contents(place, selection)
        if found.scores is None:
            return None
        epochs = {each.number: each.selection for each in found.epochs if each.selection is not None}
        return Decided(found.scores.provenance, found.scores, found.selection, epochs)
    if not alone.is_file():
        return None
    if selection is not None:
        raise InputError(f"'{source}' is a selection itself: pass the folder of its scores, or leave --selection out.")
    decided = Selection.load(alone)
    try:
        provenance = Provenance.from_json(decided.provenance)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"The selection at '{source}' does not say from which scores it was made. Pass their folder, and this one "
            "with --selection."
        ) from error
    return Decided(provenance, None, decided, {})


# ---- answers


def summary(found: Decided) -> Content:
    """The scores and the selection in a few lines each."""
    said = [each.summary().splitlines() for each in (found.scores, found.selection) if each is not None]
    return {"rows": found.provenance.rows, "summary": [line for lines in said for line in lines]}


def row(found: Decided, number: int) -> Content:
    """What was decided about a row, and the columns by which it was.

    Raises:
        InputError: there is no such row.
    """
    rows = found.provenance.rows
    if not 0 <= number < rows:
        raise InputError(f"There is no row {number}: the scores are of {rows} rows, which are counted from 0.")
    content: Content = {"sample_id": number, **_decision(found.selection, number)}
    span = span_in(found.provenance.source)
    if span is not None:
        content["row_of_dataset"] = span.start + number
    content["decisions"] = [{"epoch": each, **_decision(own, number)} for each, own in found.epochs.items()]
    if found.scores is None:
        return content
    names = [name for name in found.scores.table.column_names if name not in NO_NUMBER]
    content["not_scored"] = found.scores.table["reason"][number].as_py()
    content["values"] = {name: found.scores.table[name][number].as_py() for name in names}
    ranked, among_all = _ranked(found, names), _ranks_all(found)
    content["larger_than"] = {name: _place(found.scores, name, number) if among_all else None for name in ranked}
    content["scored"] = int(found.scores.scored.sum())
    content["of_full_step"] = _of_full_step(found.scores, number)
    return content


def _of_full_step(scores: ScoreTable, number: int) -> str | None:
    """A row's score as a share of the full step, with the digits that the scores need; None where there is no such."""
    full, values = full_step_of(scores.provenance.config), scores.column("score")
    if full is None or not np.isfinite(values[number]):
        return None
    return percent(float(values[number]), full, float(np.nanmax(values) - np.nanmin(values)))


def _decision(selection: Selection | None, number: int) -> Content:
    if selection is None:
        return {}
    weight = None if selection.weight is None else float(selection.weight[number])
    return {"kept": bool(selection.keep[number]), "reason": selection.reason[number], "weight": weight}


def _ranked(found: Decided, names: list[str]) -> list[str]:
    """The columns by which the selection ranked, as far as the scores have them; without one, the score."""
    by = {} if found.selection is None else found.selection.policy.get("by") or {}
    if isinstance(by, dict):  # votes
        ranked = [unsigned(name) for name, weight in by.items() if weight]
    else:
        ranked = [name.removeprefix("-") for name in ([by] if isinstance(by, str) else by)]
    return [name for name in ranked if name in names] or ["score"]


def _ranks_all(found: Decided) -> bool:
    """Whether rows are ranked by the columns as they are: not within strata, and not by what length leaves."""
    policy = {} if found.selection is None else found.selection.policy
    return not policy.get("stratify_by") and not policy.get("length_out")


def _place(scores: ScoreTable, name: str, number: int) -> float | None:
    """The share of the other scored rows that have a smaller value; None where the row or all others have none."""
    values = scores.column(name)
    others = int(np.isfinite(values).sum()) - 1
    return float((values < values[number]).sum() / others) if np.isfinite(values[number]) and others else None


def warn_of_order(texts: object, provenance: Provenance | None) -> bool:
    """Warn where texts may be other rows': nothing tells the order of a run's rows. Returns whether it warns.

    Args:
        texts: the texts of the dataset's rows; None where none is shown.
        provenance: that of the scores.
    """
    if texts is None or (provenance is not None and provenance.source.get("content") is not None):
        return False
    said = "The dataset's order was not compared with the run's: a text may be another row's."
    print(f"resofilter inspect: warning: {said}", file=sys.stderr)
    return True


# ---- as text


def summary_lines(content: Content, args: argparse.Namespace) -> Iterator[str]:
    """The lines of a summary."""
    yield from content["summary"]
    elsewhere = f" --selection {quote(args.selection)}" if args.selection else ""
    yield f"Next: resofilter inspect {quote(args.source)}{elsewhere} --row 0"


def row_lines(content: Content, texts: list[str], args: argparse.Namespace) -> Iterator[str]:
    """The lines of a row, with those of its text."""
    name = f"Row {content['sample_id']}" + (f" (id {content['id']})" if "id" in content else "")
    if "row_of_dataset" in content:
        name += f" of this shard (row {content['row_of_dataset']} of the dataset)"
    why, epochs = content.get("not_scored"), [each["epoch"] for each in content["decisions"]]
    last = f" in epoch {epochs[-1]}" if len(epochs) > 1 else ""
    yield f"{name}: {_said(content) + last if 'kept' in content else f'not scored ({why})' if why else 'scored'}"
    yield from texts
    for each in content["decisions"]:
        yield f"  epoch {each['epoch']}: {_said(each)}"
    if "values" not in content:
        yield f"For its scores: resofilter inspect SCORES --selection {quote(args.source)} --row {content['sample_id']}"
        return
    if why:
        return
    for column, share in content["larger_than"].items():
        place = "" if share is None else f", larger than {share:.1%} of all other scored rows"
        share_of_step = content["of_full_step"] if column == "score" else None
        value = f"{share_of_step} of a full step" if share_of_step else _number(content["values"][column])
        yield f"  {column} {value}{place}"
    others = [column for column in content["values"] if column not in content["larger_than"]]
    if others:
        yield "  " + ", ".join(f"{column} {_number(content['values'][column])}" for column in others)
    if "kept" not in content:
        yield f"Next: resofilter select {quote(args.source)} --keep 0.5 --output kept"


def _said(decision: Content) -> str:
    if not decision["kept"]:
        return f"dropped ({decision['reason']})"
    return "kept" if decision.get("weight") is None else f"kept, with weight {_number(decision['weight'])}"


def _number(value: Any) -> str:
    return "unknown" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
