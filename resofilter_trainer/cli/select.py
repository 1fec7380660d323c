"""`resofilter select`: decide from scores which rows to keep. Never imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..config import InputError, one_of
from ..scores.score_table import count_reasons
from .inputs import scored_dataset
from .parser import CommandParser, scored_dataset_arguments

if TYPE_CHECKING:
    from datasets import Dataset

    from ..selecting.selection import Selection

EXAMPLE = "resofilter select scores/ --keep 0.5 --output kept/"


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the selection."""
    parser.add_argument("scores", nargs="+", help="folders or files of scores; several are shards of one dataset's")
    parser.add_argument("--output", help="a folder for the selection and the kept rows")
    parser.add_argument("--keep", type=float, help="the share of the rows to keep; a half, without a threshold")
    parser.add_argument(
        "--drop",
        help="the end to drop: largest, smallest or both; by default the signal's or criterion's own, or largest",
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        help="instead of a share: an absolute score, or a rule that finds one: otsu, iqr, knee",
    )
    parser.add_argument(
        "--by",
        default="score",
        help="the column to rank: score, loss, num_tokens, layer_<i>, a signal; several with commas, with a minus "
        "before one whose other end is dropped: score,-num_tokens or --by=-num_tokens",
    )
    parser.add_argument(
        "--combine", default="ranks", help="how several columns become one: ranks, topsis, pareto or residual"
    )
    parser.add_argument("--stratify_by", help="a column of the scores: the share is kept in each stratum of its values")
    parser.add_argument("--strata", type=int, default=10, help="the number of strata")
    parser.add_argument("--group_column", help="a column of the dataset: the share is kept in each of its groups")
    parser.add_argument(
        "--format",
        nargs="+",
        default=[],
        metavar="FORMAT",
        help="also write the kept rows for other trainers, to exported/: jsonl, parquet, sharegpt, alpaca",
    )
    scored_dataset_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Decide from saved scores, and write the selection and the kept rows."""
    from ..io.files import check_folder
    from ..scores.score_table import ScoreTable
    from ..selecting.kept_dataset import DATASET, EXPORTED, check_place

    if args.output is None:
        raise InputError("--output is missing: a folder for the selection and the kept rows.")
    output = Path(args.output)
    if output.suffix == ".parquet":
        raise InputError(f"--output {args.output} must be a folder, for the selection and the kept rows.")
    check_folder(output)
    policy = _policy(args)
    scores = ScoreTable.join([ScoreTable.load(path) for path in args.scores])
    dataset = scored_dataset(args, scores.provenance.source)
    _check_formats(args.format, dataset)
    check_place(output, args.dataset or scores.provenance.source.get("dataset"))
    if args.group_column and (dataset is None or args.group_column not in dataset.column_names):
        has = "pass --dataset" if dataset is None else f"the dataset has {', '.join(dataset.column_names)}"
        raise InputError(f"--group_column {args.group_column} is a column of the dataset: {has}.")
    selection = policy.select(scores, groups=dataset[args.group_column][:] if args.group_column else None)
    if not selection.keep.any():
        raise InputError(f"There is no row to keep, of {len(selection)}. Choose another threshold or share.")
    saved = _save(selection, dataset, output, args.group_column, args.format)
    print(f"Selection: {saved}")
    for reason, count in count_reasons(selection.reason, 10):
        print(f"  {count:>8} {reason}")
    if dataset is None:
        print("The scores name no dataset to filter. In Python: Selection.load(...).apply(dataset).")
    else:
        print(f"Kept rows: {output / DATASET} ({_how_to_open(dataset)})")
        for file in sorted((output / EXPORTED).glob("*")) if args.format else ():
            print(f"Exported: {file}")
    if len(args.scores) == 1:
        print(f"Next: resofilter report {quote(args.scores[0])} --selection {quote(args.output)}")


def _policy(args: argparse.Namespace) -> Any:
    from ..selecting.data_selector import DataSelector

    by = args.by.split(",")
    policy = DataSelector(
        keep=args.keep,
        drop=args.drop,
        threshold=args.threshold,
        by=by[0] if len(by) == 1 else by,
        combine=args.combine,
        stratify_by=args.stratify_by,
        strata=args.strata,
    )
    for name, used in (("strata", args.stratify_by is not None), ("combine", len(by) > 1)):
        if not used and getattr(args, name) != args.parser.get_default(name):
            needed = "--stratify_by" if name == "strata" else "several columns in --by"
            raise InputError(f"--{name} goes with {needed}.")
    return policy


def _how_to_open(dataset: Dataset) -> str:
    from ..data.exact_json import has_json

    varying = [name for name, feature in dataset.features.items() if has_json(feature)]
    if not varying:
        return "datasets.load_from_disk"
    return (
        f"datasets.load_from_disk, in datasets 4.7 or later, as values of {', '.join(varying)} differ in their keys or "
        "types; for others, add --format jsonl"
    )


def _check_formats(formats: Sequence[str], dataset: Any) -> None:
    """Raise InputError for a format that is not known, and where there are no rows to write."""
    if not formats:
        return
    from ..data.exporting import FILES

    for format in formats:
        one_of("--format", format, list(FILES))
    if dataset is None:
        raise InputError("--format needs the rows, and the scores name no dataset: pass --dataset.")


def _export(formats: Sequence[str], rows: Any, selection: Selection) -> Callable[[Path], None]:
    """What writes the kept rows in each format, with the columns that were scored."""
    from ..data.exporting import export_rows
    from ..data.layout import scored_columns
    from ..scores.provenance import Provenance

    columns = scored_columns(Provenance.from_json(selection.provenance).preparation)

    def export(folder: Path) -> None:
        for format in formats:
            export_rows(rows, folder, format, columns, selection.sample_ids)

    return export


def _save(selection: Selection, dataset: Any, output: Path, group_column: str | None, formats: Sequence[str]) -> Path:
    """Write the selection and, with a dataset, the kept rows; returns the selection's file."""
    from ..io.files import folder_lock
    from ..selecting.kept_dataset import save_kept

    rows = None if dataset is None else selection.apply(dataset, check_rows=False)  # `scored_dataset` has compared
    export = _export(formats, rows, selection) if formats else None
    with folder_lock(output):
        return save_kept(rows, selection, output, group_column, export)


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # the name of a rule, which the selector checks
