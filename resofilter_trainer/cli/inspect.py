"""`resofilter inspect`: what a run's ledger, scores or a selection say of rows. Imports torch only to show texts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import InputError, at_most_one, whole_number
from .inputs import scored_dataset
from .naming import told
from .parser import CommandParser, scored_dataset_arguments

if TYPE_CHECKING:
    import pandas as pd

    from ..ledger.ledger import Ledger
    from ..ledger.spikes import Spike
    from ..scores.provenance import Provenance
    from . import decided

EXAMPLES = (
    "resofilter inspect run/ --spikes --dataset rows.jsonl",
    "resofilter inspect scores/ --selection kept/ --row 17",
)
MOST_TEXT = 200  # characters of a prompt or a completion
Content = dict[str, Any]
Texts = Sequence[tuple[str, str]]


class Setting(NamedTuple):
    """A number that some questions use.

    Attributes:
        usual: its default.
        questions: those that use it, None for the summary.
        help: what it is.
    """

    usual: float
    questions: tuple[str | None, ...]
    help: str


SETTINGS = {
    "shown": Setting(10, ("step", "spikes"), "the rows to show of a step; 3 of a spike at most"),
    "most": Setting(20, ("spikes", None), "the spikes to show"),
    "threshold": Setting(4.0, ("spikes", None), "robust standard deviations that make a spike"),
    "window": Setting(101, ("spikes", None), "the steps that a step is compared with"),
}


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the answers."""
    parser.add_argument("source", help="the output folder of a run, its ledger, scores, or a selection")
    parser.add_argument("--selection", help="with scores: the output of select, if it is in another folder")
    parser.add_argument("--step", type=int, help="show the rows of this step")
    parser.add_argument("--spikes", action="store_true", help="show the steps that stand out, and their rows")
    parser.add_argument("--row", type=int, help="show why this row was kept or dropped; of a run, its life")
    parser.add_argument("--dynamics", metavar="FOLDER", help="write scores with how each row was learnt to this folder")
    for name, setting in SETTINGS.items():
        kind, said = type(setting.usual), f"{setting.help} (default: {setting.usual})"
        parser.add_argument(f"--{name}", type=kind, help=said)
    parser.add_argument("--partial", action="store_true", help="read a ledger that lacks steps or processes")
    parser.add_argument("--json", help="a file for what is shown")
    scored_dataset_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print an answer, and write it if asked for."""
    from ..ledger.ledger import Ledger
    from . import decided

    asked = at_most_one(step=args.step, spikes=args.spikes or None, row=args.row, dynamics=args.dynamics)
    if args.split and not args.dataset:
        raise InputError("--split goes with --dataset.")
    if args.dataset and asked not in ("step", "spikes", "row"):
        raise InputError("--dataset has the texts of --step, --spikes and --row: pass one of them, or leave it out.")
    found = decided.decided_of(args.source, args.selection)
    if found is not None:
        content, lines = _of_decided(found, args, asked)
    elif args.selection is not None:
        if not Path(args.source).exists():
            raise InputError(f"'{args.source}' does not exist. Pass scores, which `resofilter score` writes.")
        raise InputError(f"--selection goes with scores, and '{args.source}' holds none that are not a run's.")
    else:
        args = with_settings(args, asked)
        whole_number("--shown", args.shown, least=1)
        ledger = Ledger.load(args.source, args.partial)
        content = ANSWERS[asked](ledger, args)
        if args.dataset:
            scores = ledger.scores()
            provenance = None if scores is None else scores.provenance
            texts, _ = texts_of(args, provenance)
            add_texts(content, texts)
            decided.warn_of_order(texts, provenance)
        lines = [*LINES[asked](content)]
        if asked is None:
            lines.append(f"Next: resofilter inspect {quote(args.source)} --spikes")
    print("\n".join(lines))
    if args.json:
        from ..io.files import replacing

        with replacing(Path(args.json)) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


def _of_decided(found: decided.Decided, args: argparse.Namespace, asked: str | None) -> tuple[Content, list[str]]:
    """The answer from scores or a selection, and its lines. Raises InputError for what only a ledger can answer."""
    from . import decided

    of_ledger = {"step": asked == "step", "spikes": asked == "spikes", "dynamics": asked == "dynamics"}
    of_ledger |= {"partial": args.partial, **{name: getattr(args, name) is not None for name in SETTINGS}}
    for name in (name for name, given in of_ledger.items() if given):
        raise InputError(
            f"--{name} needs the ledger of a run with ResonanceCallback(ledger=True), and '{args.source}' holds none: "
            "pass --row, or leave it out."
        )
    if asked is None:
        content = decided.summary(found)
        return content, [*decided.summary_lines(content, args)]
    content = decided.row(found, args.row)
    if "values" in content:
        content["values"] = {name: number(value) for name, value in content["values"].items()}
    try:
        texts, ids = texts_of(args, found.provenance)
    except InputError as error:
        if args.dataset:
            raise
        print(f"The row's text is not known: {told(str(error))}")
    else:
        add_texts(content, texts)
        warned = decided.warn_of_order(texts, found.provenance)
        content |= {} if ids is None or warned else {"id": ids[args.row]}
    return content, [*decided.row_lines(content, [*text_lines(content)], args)]


def with_settings(args: argparse.Namespace, asked: str | None) -> argparse.Namespace:
    """The arguments with settings that are not given. Raises InputError for one that the question does not use."""
    found = {**vars(args)}
    for name, setting in SETTINGS.items():
        if found[name] is None:
            found[name] = setting.usual
        elif asked not in setting.questions:
            names = [f"--{each}" if each else "the summary" for each in setting.questions]
            raise InputError(f"--{name} goes with {' or '.join(names)}.")
    return argparse.Namespace(**found)


# ---- answers


def summary(ledger: Ledger, args: argparse.Namespace) -> Content:
    """The run in numbers: its epochs, and how many steps stand out."""
    steps = ledger.steps()
    epochs = [
        {
            "epoch": int(epoch),
            "first": int(own["step"].min()),
            "last": int(own["step"].max()),
            "lines": int(own["lines"].sum()),
            "loss": number(own["loss"].mean()),
            "grad_norm": number(own["grad_norm"].median()),
        }
        for epoch, own in steps[steps["epoch"] >= 0].groupby("epoch")
    ]
    found, known = spikes(ledger, args)["spikes"], steps["left_out"][steps["lines"] > 0]
    return {
        "ledger": str(ledger.folder),
        "first": ledger.first,
        "last": ledger.last,
        "unfinished": ledger.unfinished,
        "processes": ledger.processes,
        "layers": ledger.layers,
        "lines": int(steps["lines"].sum()),
        "tokens": int(steps["tokens"].sum()),
        "epochs": epochs,
        "spikes": [each["step"] for each in found],
        "updates_left_out": None if known.isna().any() else int(known.sum()),
    }


def step(ledger: Ledger, args: argparse.Namespace) -> Content:
    """A step and its rows, those with the largest share of the loss first."""
    rows = ledger.step(args.step).sort_values("share_of_loss", ascending=False, kind="stable")
    line = ledger.steps(args.step, args.step).iloc[0]
    return {**record(line), "rows": records(rows.head(args.shown))}


def spikes(ledger: Ledger, args: argparse.Namespace) -> Content:
    """The steps that stand out, with the rows that explain them."""
    found = ledger.spikes(args.threshold, args.window, args.most)
    return {"threshold": args.threshold, "window": args.window, "spikes": [_spike(each, args.shown) for each in found]}


def _spike(spike: Spike, shown: int) -> Content:
    names = ("step", "epoch", "by", "score", "loss", "loss_level", "loss_score", "grad_norm", "grad_norm_level")
    values = {name: getattr(spike, name) for name in (*names, "grad_norm_score")}
    return {**{name: number(each) for name, each in values.items()}, "rows": records(spike.rows.head(min(shown, 3)))}


def row(ledger: Ledger, args: argparse.Namespace) -> Content:
    """Every visit of a row, and whether each epoch was to train on it."""
    visits = ledger.row(args.row)
    decisions = [{"epoch": epoch, "kept": kept, "reason": why} for epoch, kept, why in ledger.decisions(args.row)]
    return {"sample_id": args.row, "visits": records(visits), "decisions": decisions}


def dynamics(ledger: Ledger, args: argparse.Namespace) -> Content:
    """Write the scores with the criteria of learning dynamics."""
    from ..io.files import file_at
    from ..ledger.dynamics import DYNAMICS
    from ..scores.score_table import SCORES_FILE

    target = file_at(args.dynamics, SCORES_FILE)
    if target.resolve() == (ledger.folder.parent / SCORES_FILE).resolve():
        raise InputError(f"--dynamics {args.dynamics} would replace the run's own scores: choose another folder.")
    scores = ledger.dynamics()
    return {"scores": str(scores.save(target)), "rows": len(scores), "columns": [*DYNAMICS, "trajectory", "s2l"]}


# ---- as text


def summary_lines(content: Content) -> Iterator[str]:
    """The lines of a summary."""
    processes = f"{content['processes']} process{'es' if content['processes'] > 1 else ''}"
    yield f"Steps {content['first']:,} to {content['last']:,} by {processes}, in {content['ledger']}:"
    yield f"{content['lines']:,} lines with {content['tokens']:,} learnt tokens."
    if content["unfinished"]:
        yield f"Left out are {content['unfinished']:,} steps after them, which not all processes have written."
    for each in content["epochs"]:
        steps = f"epoch {each['epoch'] + 1}: steps {each['first']:,} to {each['last']:,}, {each['lines']:,} lines"
        yield f"  {steps}, mean loss {shown(each['loss'])}, median gradient norm {shown(each['grad_norm'])}"
    spikes = content["spikes"]
    yield f"Steps that stand out: {', '.join(map(str, spikes))}." if spikes else "No step stands out."
    if out := content["updates_left_out"]:
        yield "The update of 1 step was left out." if out == 1 else f"The updates of {out:,} steps were left out."


def step_lines(content: Content) -> Iterator[str]:
    """The lines of a step."""
    if not content["lines"]:
        yield f"Step {content['step']:,}: no row was trained"
        return
    yield (
        f"Step {content['step']:,}, epoch {content['epoch'] + 1}: loss {shown(content['loss'])}, gradient norm "
        f"{shown(content['grad_norm'])}, learning rate {shown(content['learning_rate'])}, {content['lines']:,} lines "
        f"with {content['tokens']:,} learnt tokens{', its update was left out' if content['left_out'] else ''}"
    )
    for each in content["rows"]:
        yield from row_lines(each)


def spike_lines(content: Content) -> Iterator[str]:
    """The lines of all spikes."""
    if not content["spikes"]:
        yield f"No step stands out by {content['threshold']:g} robust standard deviations or more."
    for each in content["spikes"]:
        yield f"Step {each['step']:,}, epoch {each['epoch'] + 1}, stands out by its {told_by(each['by'])}:"
        for name in ("loss", "grad_norm"):
            at, score = shown(each[f"{name}_level"]), shown(each[f"{name}_score"])
            yield f"  {told_by(name)} {shown(each[name])} at a level of {at}, {score} standard deviations"
        if any(line["left_out"] for line in each["rows"]):
            yield "  its update was left out"
        for line in each["rows"]:
            yield from row_lines(line)


def row_lines(line: Content) -> Iterator[str]:
    """The lines of one row of a step."""
    explains = f"explains {percent(line['explains'])}, " if "explains" in line else ""
    yield (
        f"  row {line['sample_id']}: {explains}loss {shown(line['loss'])}, {percent(line['share_of_loss'])} of the "
        f"step's loss, {percent(line['share_of_update'])} of its update, {line['num_tokens']:,} tokens"
    )
    yield from text_lines(line)


def life_lines(content: Content) -> Iterator[str]:
    """The lines of a row's life."""
    times = len(content["visits"])
    yield f"Row {content['sample_id']}, trained {times} time{'s' if times > 1 else ''}:"
    yield from text_lines(content)
    decided = {each["epoch"]: each for each in content["decisions"]}
    for epoch in sorted({*decided, *(visit["epoch"] for visit in content["visits"])}):
        why = decided.get(epoch)
        said = "" if why is None else ": kept" if why["kept"] else f": dropped ({why['reason']})"
        yield f"  epoch {epoch + 1}{said}"
        for visit in content["visits"]:
            if visit["epoch"] == epoch:
                yield (
                    f"    step {visit['step']:,}: loss {shown(visit['loss'])}, resonance {shown(visit['resonance'])}, "
                    f"learning rate {shown(visit['learning_rate'])}"
                    f"{', the update was left out' if visit['left_out'] else ''}"
                )


def text_lines(content: Content) -> Iterator[str]:
    """The text of a row, if it is there."""
    for name in ("prompt", "completion"):
        text = " ".join(content.get(name, "").split())
        if text:
            yield f"      {name}: {text if len(text) <= MOST_TEXT else f'{text[:MOST_TEXT]}…'}"


def dynamics_lines(content: Content) -> Iterator[str]:
    """The lines about written scores."""
    yield f"Scores: {content['scores']}, {content['rows']:,} rows with {', '.join(content['columns'])}"
    yield f"Next: resofilter select {quote(content['scores'])} --by mean_loss --keep 0.5 --output kept/"


# ---- texts


def texts_of(args: argparse.Namespace, provenance: Provenance | None) -> tuple[Texts | None, list[str] | None]:
    """The texts of the rows, and the user's own ids; None, and for texts a printed line, where they are not known.

    Raises:
        InputError: the dataset cannot be loaded, or is not what was scored.
    """
    from ..data.layout import scored_columns
    from ..data.row_report import column_of, default_id
    from ..data.row_texts import RowTexts

    dataset = scored_dataset(args, {} if provenance is None else provenance.source)
    if dataset is None:
        print("The row's text is not known: the scores name no dataset. Pass --dataset.")
        return None, None
    name = args.dataset or (provenance and provenance.source.get("dataset")) or "the dataset"
    if provenance is not None and len(dataset) != provenance.rows:
        raise InputError(f"'{name}' has {len(dataset)} rows, and the scores are of {provenance.rows}.")
    found = RowTexts(dataset, scored_columns({} if provenance is None else provenance.preparation))
    if not found.known:
        print(f"'{name}' has no texts to show, only {', '.join(dataset.column_names)}.")
    return found if found.known else None, column_of(dataset, default_id(dataset))


def add_texts(content: Content, texts: Texts | None) -> None:
    """Add prompt and completion wherever a row is named. Raises InputError for a row that the dataset lacks."""
    own = content.get("rows", [])
    for each in (content, *own, *(row for spike in content.get("spikes", []) for row in spike["rows"])):
        number_of_row = each.get("sample_id")
        if texts is None or number_of_row is None:
            continue
        if number_of_row >= len(texts):
            raise InputError(f"The run has row {number_of_row} and --dataset has {len(texts)} rows: it is another one.")
        each["prompt"], each["completion"] = texts[number_of_row]


# ---- values


def records(rows: pd.DataFrame) -> list[Content]:
    """Lines as plain values."""
    return [{str(name): number(value) for name, value in each.items()} for each in rows.to_dict("records")]


def record(line: pd.Series) -> Content:
    """A line of steps as plain values."""
    whole = ("step", "epoch", "lines", "tokens")
    found = {str(name): int(value) if name in whole else number(value) for name, value in line.items()}
    return {**found, "left_out": None if found["left_out"] is None else bool(found["left_out"])}


def number(value: Any) -> Any:
    """A value that JSON has: None for one that is not known, `inf` as text."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None if value != value else str(value)
    return None if str(value) == "<NA>" else value  # pandas's, of a nullable column


def shown(value: Any) -> str:
    """A number in few digits."""
    return "unknown" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def percent(value: Any) -> str:
    """A share in per cent."""
    return "an unknown share" if value is None else value if isinstance(value, str) else f"{value:.1%}"


def told_by(by: str) -> str:
    """What stands out, in words."""
    return by.replace("grad_norm", "gradient norm")


ANSWERS = {None: summary, "step": step, "spikes": spikes, "row": row, "dynamics": dynamics}
LINES = {None: summary_lines, "step": step_lines, "spikes": spike_lines, "row": life_lines, "dynamics": dynamics_lines}
