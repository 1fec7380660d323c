"""`resofilter report`: one page about scores, a run, a cleaning, a comparison or a probe."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..config import ColumnMapping, InputError
from . import score
from .inputs import scored_dataset, settings_of
from .naming import in_shell, options_of, told
from .parser import CommandParser, column_arguments, scored_dataset_arguments

EXAMPLES = (
    "resofilter report scores/ --selection kept/ --open",
    "resofilter report out/ --dataset rows.jsonl --group_column source",
)

COLUMNS = tuple(each.name for each in dataclasses.fields(ColumnMapping))


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the report."""
    source = "a folder or file of scores, or the folder of a run, a cleaning, a comparison or a probe"
    parser.add_argument("source", help=source)
    parser.add_argument("--selection", help="the output of select, if it is in another folder")
    parser.add_argument("--comparison", help="the output of compare, if it is in another folder")
    parser.add_argument("--output", help="a folder for report.html; by default that of --selection or of the source")
    scored_dataset_arguments(parser)
    parser.add_argument("--group_column", help="a column of the dataset, such as its source")
    parser.add_argument(
        "--id_column", help="a column of the dataset with your own id of each row; by default id, if any"
    )
    parser.add_argument("--title", help="the title of the page")
    column_arguments(parser)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> None:
    """Write the page, with the pictures and the dropped rows beside it."""
    from ..probe.results import RESULT_FILE
    from ..report import read_contents, write_report

    if Path(args.source).name == RESULT_FILE:
        args.source = str(Path(args.source).parent)
    if (Path(args.source) / RESULT_FILE).is_file():
        _report_probe(args)
        return
    _folder(args)
    contents = read_contents(args.source, args.selection, args.comparison)
    texts = groups = ids = decode = None
    if contents.scores is not None:
        texts, groups, ids = _of_dataset(args, contents.scores.provenance)
    if contents.cleaned is not None:
        from ..data.row_texts import decoder

        decode = decoder(contents.cleaned.scores.provenance.model)
    report = write_report(contents, _folder(args), texts, groups, decode, args.title, ids)
    if report.numbers is not None:
        scoring = CommandParser()
        score.add_arguments(scoring)
        for warning in report.numbers.warnings:  # what to do about them is done by scoring again
            print(f"Warning: {in_shell(warning, options_of(scoring))}")
    _show(report.path, args.open)


def _folder(args: argparse.Namespace) -> Path:
    """The folder of the page: each selection has its own. Raises InputError where that would be on the hub."""
    from ..io.hub import is_on_hub

    if args.output is not None:
        return Path(args.output)
    place = args.selection or args.source
    if is_on_hub(place):
        raise InputError(f"'{place}' is on the hub, and the page is written to a folder here: pass --output.")
    return Path(place).parent if Path(place).suffix == ".parquet" else Path(place)


def _report_probe(args: argparse.Namespace) -> None:
    """Write the page of a probe."""
    from ..probe.page import write_page
    from ..probe.results import ProbeResult

    for name in ("selection", "comparison", "dataset", "split", "group_column", "id_column", "title", *COLUMNS):
        if getattr(args, name) != args.parser.get_default(name):
            raise InputError(f"'{args.source}' holds a probe, whose page has no --{name}: leave it out.")
    _show(write_page(ProbeResult.load(args.source), Path(args.output or args.source)), args.open)


def _show(page: Path, in_browser: bool) -> None:
    """Print where the page is, and open it if asked for."""
    print(f"Report: {page}")
    if in_browser:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _of_dataset(args: argparse.Namespace, provenance: Any) -> tuple[Any, Any, Any]:
    """Each row's text, group and id; None where the dataset cannot be loaded and no argument requires it."""
    named = {"--group_column": args.group_column, "--id_column": args.id_column}
    try:
        dataset = scored_dataset(args, provenance.source)
    except InputError as error:
        if args.dataset or args.split or any(named.values()):
            raise
        print(f"The report has no text: {told(str(error))}")
        return None, None, None
    if dataset is None or len(dataset) != provenance.rows:
        if args.dataset:
            raise InputError(f"'{args.dataset}' has {len(dataset)} rows and the scores are of {provenance.rows}.")
        for option in (option for option, name in named.items() if name):
            raise InputError(f"{option} is a column of the dataset: pass --dataset.")
        why = "the scores name no dataset" if dataset is None else f"the dataset has {len(dataset)} rows now"
        print(f"The report has no text: {why}. Pass --dataset.")
        return None, None, None
    from ..data.row_report import column_of, default_id

    for option, name in named.items():
        if name and name not in dataset.column_names:
            raise InputError(f"{option} {name}: the dataset has {', '.join(dataset.column_names)}.")
    groups = column_of(dataset, args.group_column)
    return _texts(args, dataset, provenance), groups, column_of(dataset, args.id_column or default_id(dataset))


def _texts(args: argparse.Namespace, dataset: Any, provenance: Any) -> Any:
    """Each row's text; None, and a printed line, where no column of the dataset has it."""
    from ..data.layout import scored_columns
    from ..data.row_texts import RowTexts

    mapping = settings_of(args, ColumnMapping)  # of a run, whose rows were mapped before
    texts = RowTexts(dataset, scored_columns(provenance.preparation) if mapping == ColumnMapping() else mapping)
    if not texts.known:
        print(
            f"The report has no text: say which columns have it, with --prompt_column and --completion_column or "
            f"--text_column. The dataset has: {', '.join(dataset.column_names)}."
        )
    return texts if texts.known else None
