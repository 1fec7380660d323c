"""`resofilter select`: decide from scores which rows to keep. Never imports torch."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..config import InputError, together
from .inputs import hub_options, require, scored_dataset
from .parser import CommandParser, hub_arguments, scored_dataset_arguments

if TYPE_CHECKING:
    from datasets import Dataset

    from ..scores.provenance import Provenance
    from ..scores.score_table import ScoreTable
    from ..selecting.selection import Selection

EXAMPLES = (
    "resofilter select scores/ --keep 0.5 --output kept/",
    "resofilter select scores/ --by loss,-num_tokens --combine pareto --group_column source --output kept/",
)
ENDS, COMBINATIONS = ("largest", "smallest", "both"), ("ranks", "topsis", "pareto", "residual")
FORMATS = ("jsonl", "parquet", "sharegpt", "alpaca")  # the names of those in `data.exporting`


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the selection."""
    several = "folders or files of scores, here or hf://datasets/owner/name; several are shards of one dataset's"
    parser.add_argument("scores", nargs="*", help=f"{several} (required)")
    parser.needed("--output", help="a folder for the selection and the kept rows")
    parser.add_argument("--overwrite", action="store_true", help="replace another selection in that folder")
    parser.add_argument("--keep", type=float, help="the share of the rows to keep; a half, without a threshold")
    parser.add_argument(
        "--drop",
        choices=ENDS,
        help="the end to drop; by default the signal's or criterion's own, or largest",
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        help="instead of a share: an absolute score, or a rule that finds one: otsu, iqr, knee",
    )
    parser.add_argument(
        "--by",
        help="the column to rank, by default score: loss, num_tokens, layer_<i>, a signal; several with commas, with a "
        "minus before one whose other end is dropped: score,-num_tokens or --by=-num_tokens",
    )
    parser.add_argument("--combine", choices=COMBINATIONS, default="ranks", help="how several columns become one")
    parser.add_argument("--length_out", action="store_true", help="rank by what the values say beyond num_tokens")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="WEIGHT", help="the weights of the columns in --by, which then vote"
    )
    parser.add_argument("--votes", metavar="PROBE", help="a probe's folder: its signals vote, by their AUROC")
    parser.add_argument(
        "--band", nargs=2, type=float, metavar=("LOW", "HIGH"), help="the ranks to keep, as shares of the rows: 0.1 0.7"
    )
    parser.add_argument(
        "--per_prompt", type=int, metavar="N", help="keep N rows of each prompt, of the lowest loss or of --by"
    )
    parser.add_argument("--stratify_by", help="a column of the scores: the share is kept in each stratum of its values")
    parser.add_argument("--strata", type=int, default=10, help="the number of strata")
    parser.add_argument(
        "--group_column",
        help="a column of the dataset: the share is kept in each of its groups; with --per_prompt, the prompt",
    )
    parser.add_argument(
        "--checks", help="the folder of resofilter check, whose rows are dropped before the score decides"
    )
    parser.add_argument(
        "--checked",
        nargs="+",
        metavar="CHECK",
        help="the checks whose rows are dropped; by default all but endings_differ and odd_script",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"also write the kept rows for other trainers, to exported/: {', '.join(FORMATS)}",
    )
    scored_dataset_arguments(parser)
    hub_arguments(parser, "the selection and the kept rows")


def run(args: argparse.Namespace) -> None:
    """Decide from saved scores, and write the selection and the kept rows."""
    from ..io.files import check_folder
    from ..io.hub import is_on_hub
    from ..scores.joined_file import open_scores
    from ..scores.score_table import ScoreTable
    from ..scores.shards import listed
    from ..selecting.kept_dataset import check_no_other, check_place, trained_on_another

    require(args, "scores", "output")
    output = Path(args.output)
    if output.suffix == ".parquet":
        raise InputError(f"--output {args.output} must be a folder, for the selection and the kept rows.")
    check_folder(output)
    pushed = hub_options(args)
    policies: list[Any] = []
    places = [partial(open_scores, each) for each in args.scores if not is_on_hub(each)]
    together(lambda: policies.append(_policy(args)), *places)
    (policy,) = policies
    large, made = _opened(args, policy)
    scores = None if large else _without_faults(args, ScoreTable.join([ScoreTable.load(path) for path in args.scores]))
    made = made if scores is None else scores.provenance
    dataset = scored_dataset(args, made.source)
    if args.format and dataset is None:
        raise InputError("--format needs the rows, and the scores name no dataset: pass --dataset.")
    for name in {args.dataset or made.source.get("dataset"), *(each.dataset for each in listed(made.source))}:
        check_place(output, name)
    if args.group_column and (dataset is None or args.group_column not in dataset.column_names):
        has = "pass --dataset" if dataset is None else f"the dataset has {', '.join(dataset.column_names)}"
        raise InputError(f"--group_column {args.group_column} is a column of the dataset: {has}.")
    groups = dataset[args.group_column][:] if args.group_column else None
    selection = _from_file(args.scores[0], output, policy) if scores is None else policy.select(scores, groups=groups)
    if not selection.keep.any():
        raise InputError(f"There is no row to keep, of {len(selection)}. Choose another threshold or share.")
    if not args.overwrite:
        check_no_other(output, selection)
    trained = trained_on_another(output, selection)
    saved = _save(selection, dataset, output, args.group_column, args.format or ())
    print(selection.summary(groups))
    print(f"Selection: {saved}")
    _tell_of_rows(args, dataset, made)
    if trained is not None:
        print(f"{trained} was trained on the selection that was here before: move it, or training writes over it.")
    if pushed is not None:
        options = {"check_rows": False, "group_column": args.group_column, **pushed}
        print(f"Pushed: {selection.push_to_hub(dataset, **options).repo_url}")
    if len(args.scores) == 1:
        print(f"Next: resofilter report {quote(args.scores[0])} --selection {quote(args.output)}")


def _tell_of_rows(args: argparse.Namespace, dataset: Any, made: Provenance) -> None:
    """Print where the kept rows are, and how to train on them."""
    from ..selecting.kept_dataset import DATASET, EXPORTED
    from ..selecting.training_lines import training_lines

    output = Path(args.output)
    if dataset is None:
        print("The scores name no dataset to filter. In Python: Selection.load(...).apply(dataset).")
    else:
        print(f"Kept rows: {output / DATASET} ({_how_to_open(dataset)})")
        for file in sorted((output / EXPORTED).glob("*")) if args.format else ():
            print(f"Exported: {file}")
        rows, names = output / DATASET, dataset.column_names
        lines = training_lines(made.model, rows, output, made.preparation, names, made.source)
        print("\n".join(["To train on them, in Python:", "", *lines, ""]))


def _opened(args: argparse.Namespace, policy: Any) -> tuple[bool, Provenance]:
    """Whether to select from the file, as it has many rows and the policy allows it; and what the scores are of."""
    from ..scores.joined_file import open_scores
    from ..selecting.data_selector import DataSelector
    from ..selecting.reasons import MANY

    file, made = open_scores(args.scores[0])
    alone = len(args.scores) == 1 and args.checks is None and args.checked is None and args.group_column is None
    return alone and file.rows > MANY and isinstance(policy, DataSelector) and policy.ranks_one_column, made


def _from_file(scores: str, output: Path, policy: Any) -> Selection:
    """The decision over a file of scores that is not loaded."""
    from ..selecting.selection import Selection
    from ..selecting.streamed import select_file

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".selecting-") as folder:
        return Selection.load(select_file(scores, folder, policy))


def _without_faults(args: argparse.Namespace, scores: ScoreTable) -> ScoreTable:
    """The scores without those of rows in which the checks have found something."""
    if args.checks is None:
        if args.checked is not None:
            raise InputError("--checked goes with --checks: the folder that resofilter check wrote.")
        return scores
    from ..data.text_checks import TextChecks

    names = None if args.checked is None else [name for each in args.checked for name in each.split(",") if name]
    return TextChecks.load(args.checks).drop(scores, names)


def _policy(args: argparse.Namespace) -> Any:
    from ..selecting.data_selector import DataSelector
    from ..selecting.policies import OnePerPrompt

    if args.per_prompt is not None:
        for name in ("keep", "threshold", "band", "stratify_by", "strata", "combine", "length_out", "weights", "votes"):
            if getattr(args, name) != args.parser.get_default(name):
                raise InputError(f"--per_prompt says which rows are kept: leave --{name} out.")
        return OnePerPrompt(by=_by(args, "loss"), drop=args.drop, keep=args.per_prompt)
    by = _by(args, "score")
    policy = DataSelector(
        keep=args.keep,
        drop=args.drop,
        threshold=args.threshold,
        by=by,
        combine=args.combine,
        stratify_by=args.stratify_by,
        strata=args.strata,
        length_out=args.length_out,
        band=args.band,
    )
    for name, used in (("strata", args.stratify_by is not None), ("combine", not isinstance(by, str))):
        if not used and getattr(args, name) != args.parser.get_default(name):
            needed = "--stratify_by" if name == "strata" else "several columns in --by"
            raise InputError(f"--{name} goes with {needed}.")
    return policy


def _by(args: argparse.Namespace, default: str) -> Any:
    """The column to rank by, several, or their votes."""
    if args.votes is not None:
        from ..selecting.votes import votes_of

        if args.by is not None or args.weights is not None:
            raise InputError("--votes has the columns and their weights: leave --by and --weights out.")
        return votes_of(args.votes)
    names = (default if args.by is None else args.by).split(",")
    if args.weights is None:
        return names[0] if len(names) == 1 else names
    if args.by is None or len(args.weights) != len(names) or len(set(names)) < len(names):
        weights, columns = (
            f"{count} {what}{'s' if count > 1 else ''}"
            for count, what in ((len(args.weights), "weight"), (len(names), "column"))
        )
        raise InputError(
            f"--weights has {weights} for {columns}: pass one for each in --by, such as --by loss,-rsr --weights 0.7 "
            "0.6."
        )
    return dict(zip(names, args.weights, strict=True))


def _how_to_open(dataset: Dataset) -> str:
    from ..data.exact_json import has_json

    varying = [name for name, feature in dataset.features.items() if has_json(feature)]
    if not varying:
        return "datasets.load_from_disk"
    return (
        f"datasets.load_from_disk, in datasets 4.7 or later, as values of {', '.join(varying)} differ in their keys or "
        "types; for others, add --format jsonl"
    )


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
