"""The probe from start to end. Knows the order of the steps, not how faults are made or what the numbers say.

draw rows -> plant faults -> wrong answers by a model -> one pass over all -> AUROC of each signal -> recommendation
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, Precision, ScoreWarning, check_kind
from ..data.arguments import check_call
from ..data.fingerprints import PACKAGES, hash_tokenizer, identity
from ..data.loading import check_arguments, check_loss, default_arguments, load_model, placed
from ..io.files import read_json, replacing
from ..io.made_from import as_json, check_made_from
from ..model.signals import chosen_signals
from ..scores.doubts import remarks_of
from ..scores.score_table import ScoreTable
from ..scoring.dataset import score_dataset
from ..scoring.passes import from_main, locked
from .drawing import EVERY, ROWS, Drawn, check_counts, draw, kinds_of
from .faults import Planted
from .findings import (
    ALL,
    LABELLED,
    LENGTH,
    SELF_MADE,
    UNPLANTED,
    Rows,
    alike_of,
    comparisons,
    missing_values,
    number_of,
    records_of,
)
from .page import write_probe
from .recommendation import recommend
from .results import OF_ALL, OF_LABELS, OF_SELF_MADE, REMEDY, RESULT_FILE, ProbeResult
from .self_made import write

SETTINGS_FILE = "settings.json"
SELF_MADE_FILE = "self_made.json"
SCORES = "scores"
SELF_MADE_COUNT = 60
REMEDY_KINDS = "Plant other kinds, or let a model write wrong answers, too."
TRAINING = ("max_length", "completion_only_loss", "assistant_only_loss", "chat_template_path")


def probe_dataset(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    rows: int = ROWS,
    faults_per_kind: int | None = None,
    kinds: str | Sequence[str] | None = EVERY,
    faults: Sequence[Callable[[dict[str, Any]], Mapping[str, Any] | None] | str] = (),
    self_made: bool | None = None,
    writer: str | PreTrainedModel | None = None,
    signals: str | Sequence[str] = EVERY,
    wrong_column: str | None = None,
    seed: int = 0,
    precision: Precision | None = None,
    tokens_per_batch: int | None = None,
    **row_options: Any,
) -> ProbeResult:
    """Find out which signal finds which fault in your rows with your model, without labels.

    Rows are drawn at random, and copies of them get faults of known kinds. One pass measures all signals of all these
    rows. For each signal and kind, the AUROC says how well the signal tells rows with the fault from the others.

    Args:
        model, dataset, processing_class, args, precision, tokens_per_batch: as for `score_dataset`.
        output: a folder for `probe.json`, `recommended.yaml` and `report.html`. If it already holds a probe of the same
            model, data and settings, this is returned. An interrupted probe resumes.
        rows: the number of rows to draw.
        faults_per_kind: the number of faults of each kind; by default about 320 of all kinds together.
        kinds: the kinds of faults, names of `probe.faults.FAULTS`, or `"all"`; None for none of them.
        faults: your own kinds: functions from a row, under TRL's names, to the row with a fault, or to None for a row
            that does not allow it; or where to find one, as text: `"file.py:function"`.
        self_made: whether a model writes wrong answers to the same prompts, the kind that is most like real errors; by
            default it does, unless there is a `wrong_column`.
        writer: the model that writes them, or its name; by default `model`.
        signals: the signals to measure, as for `score_dataset`.
        wrong_column: a column with your own labels of wrong rows, as true or false. The recommendation then rests on
            them.
        seed: the random seed; the same seed gives the same numbers.
        **row_options: as for `score_dataset`.

    Returns:
        The AUROC of each signal for each kind with its 95 % interval, and a recommendation.

    Raises:
        InputError: there are too few rows, no fault can be planted, a name of a kind or signal is not known, a label
            or a result of your function is none, or `output` holds something else or another run writes to it.
    """
    check_call(probe_dataset, row_options, model, processing_class, args)
    check_counts(rows, faults_per_kind, seed)
    check_kind("signals", signals, (str, Sequence), "names of signals")
    check_kind("wrong_column", wrong_column, (str, type(None)), "the name of a column")
    check_kind("writer", writer, (str, PreTrainedModel, type(None)), "a name, a folder as text, or a model")
    names, planting = chosen_signals(signals), kinds_of(kinds, faults)
    if precision is None and args is None:
        precision = "auto"
    args, folder = args or default_arguments(), None if output is None else Path(output)
    check_arguments(args, folder)
    check_loss(args)
    self_made = wrong_column is None if self_made is None else self_made
    if writer is not None and not self_made:
        raise InputError("A writer writes the answers of self_made=True: leave writer= out, or pass self_made=True.")
    drawn = draw(dataset, args, rows, planting, faults_per_kind, wrong_column, seed, **row_options)
    if not (drawn.planted or wrong_column or self_made):
        raise InputError(f"No fault can be planted in these rows. {_why(drawn.left_out)}{REMEDY_KINDS}")
    model, tokenizer = load_model(model, processing_class, args)
    author = None if not self_made else (model, tokenizer) if writer is None else load_model(writer, None, args)
    made_from = {
        **_identity(model, tokenizer),
        "rows": drawn.digest(),
        "signals": list(names),
        "writer": None if author is None else _identity(*author),
        "seed": seed,
        "precision": precision or ("bfloat16" if args.bf16 else "float32"),
        **{name: getattr(args, name) for name in TRAINING},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    source = (row_options.get("source") or {}).get("dataset") or "passed in Python"
    about = {"model": _name(model), "dataset": str(source), "wrong_column": wrong_column, **made_from}
    with locked(folder):
        earlier = from_main(lambda: _earlier(folder, made_from))
        if earlier is not None:
            return earlier
        if author is not None:
            drawn = _with_self_made(drawn, *author, args, folder, faults_per_kind or SELF_MADE_COUNT, seed)
        scores, seconds = _measured(model, tokenizer, drawn, args, folder, names, precision, tokens_per_batch)
        result = _result(drawn, scores, seconds, about)
        from_main(lambda: None if folder is None else write_probe(result, folder))
    return result


def _name(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def _why(left_out: Mapping[str, str]) -> str:
    return "".join(f"{kind}: {reason}. " for kind, reason in left_out.items())


def _identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of a model and its tokenizer."""
    found = identity(model)
    return {
        "weights": found["reference_weights"],
        "model_settings": found["reference_settings"],
        "tokenizer": hash_tokenizer(tokenizer),
        "template": str(getattr(tokenizer, "chat_template", None) or ""),
    }


def _earlier(folder: Path | None, made_from: Mapping[str, Any]) -> ProbeResult | None:
    """The probe that is in the folder already, if any; notes there what this one is made from.

    Raises:
        InputError: the folder holds a probe of something else, or a part of one.
    """
    if folder is None:
        return None
    path = folder / SETTINGS_FILE
    if path.exists():
        there = read_json(path, REMEDY)
        check_made_from(there, made_from, f"'{folder}' holds a probe", "Choose another folder, or remove that one.")
    elif (folder / RESULT_FILE).exists():
        raise InputError(f"'{folder}' holds a probe whose {SETTINGS_FILE} is missing. Choose another folder.")
    else:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(as_json(made_from), indent=1), encoding="utf-8")
    return ProbeResult.load(folder) if (folder / RESULT_FILE).exists() else None


def _with_self_made(
    drawn: Drawn,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    folder: Path | None,
    count: int,
    seed: int,
) -> Drawn:
    """With answers that a model writes; those of an interrupted probe are read."""

    def made() -> tuple[list[Planted], list[str]]:
        path = None if folder is None else folder / SELF_MADE_FILE
        if path is not None and path.exists():
            found = read_json(path, f"Remove it: its answers are written again. Then remove '{path.parent / SCORES}'.")
            return [Planted(**each) for each in found["planted"]], found["notes"]
        with_template = _with_template(tokenizer, args)
        planted, notes = write(placed(model, args), with_template, drawn.right, count, seed)
        if path is not None:
            with replacing(path) as temporary:
                content = {"planted": [dataclasses.asdict(each) for each in planted], "notes": notes}
                temporary.write_text(json.dumps(content), encoding="utf-8")
        return planted, notes

    planted, notes = from_main(made)
    return dataclasses.replace(drawn, planted=[*drawn.planted, *planted], notes=[*drawn.notes, *notes])


def _with_template(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that rows are scored with."""
    path = args.chat_template_path
    if path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    else:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    return tokenizer


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drawn: Drawn,
    args: SFTConfig,
    folder: Path | None,
    signals: Sequence[str],
    precision: Precision | None,
    tokens_per_batch: int | None,
) -> tuple[ScoreTable, float | None]:
    """The scores of all rows, and the seconds of the pass; None where an interrupted one was resumed."""
    output = None if folder is None else folder / SCORES
    fresh = from_main(lambda: output is None or not output.exists())
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)  # they become notes
        scores = score_dataset(
            model, drawn.together(), tokenizer, args, output=output, precision=precision,
            tokens_per_batch=tokens_per_batch, signals=list(signals), drop_empty=True,
        )  # fmt: skip
    return scores, time.perf_counter() - begun if fresh else None


def _result(drawn: Drawn, scores: ScoreTable, seconds: float | None, about: Mapping[str, Any]) -> ProbeResult:
    rows, notes = _rows(drawn, scores, seconds)
    compared, too_few, said = comparisons(rows)
    if not compared:
        why = _why({**drawn.left_out, **too_few})
        raise InputError(f"No fault could be measured in these rows. {why}Pass more rows. {REMEDY_KINDS}")
    records = records_of(rows, compared)
    stands_for = {LABELLED: OF_LABELS, SELF_MADE: OF_SELF_MADE, ALL: OF_ALL}
    stands_for |= {name: fault.stands_for for name, fault in drawn.kinds.items()}
    used = [each.kind for each in compared] + [ALL]
    return ProbeResult(
        signals=records,
        recommendation=recommend(records),
        kinds={kind: stands_for[kind] for kind in used},
        left_out={**drawn.left_out, **too_few},
        notes=[*drawn.notes, *notes, *said, *missing_values(rows), *remarks_of(scores).values()],
        alike=alike_of(rows),
        cost={
            "rows": len(drawn.examples),
            "planted": len(drawn.planted),
            "tokens": int(np.nansum(scores.column("length"))),
            "seconds": seconds,
        },
        provenance=as_json(about),
    )


def _rows(drawn: Drawn, scores: ScoreTable, seconds: float | None) -> tuple[Rows, list[str]]:
    """The measured rows as arrays, and notes on those that do not count."""
    count, total = len(drawn.examples), len(scores)
    number = {example.row: place for place, example in enumerate(drawn.examples)}
    source = np.array([*range(count), *(number[each.row] for each in drawn.planted)])
    prompts = number_of(example.prompt.strip() or example.row for example in drawn.examples)
    wrong = np.zeros(count, bool) if drawn.wrong is None else drawn.wrong
    names = [each for each in scores.table.column_names if scores.direction(each) is not None and each != LENGTH]
    lengths, notes = scores.column(LENGTH).astype(float), list[str]()
    unscored = int((~scores.scored).sum())
    if unscored:
        notes.append(f"{unscored} of {total} rows could not be scored, and do not count.")
    limit = scores.provenance.preparation["max_length"]
    truncated = np.arange(total) >= count if limit is not None else np.zeros(total, bool)
    truncated &= scores.column("length") >= (limit or 0)
    if truncated.any():
        lengths[truncated] = np.nan
        notes.append(
            f"{int(truncated.sum())} rows with a fault reach max_length={limit} tokens, where the fault may be cut "
            "off. They do not count."
        )
    rows = Rows(
        signals={**{name: scores.column(name).astype(float) for name in names}, LENGTH: lengths},
        directions={**{name: str(scores.direction(name)) for name in names}, LENGTH: "largest"},
        lengths=lengths,
        kind=np.array([UNPLANTED] * count + [each.kind for each in drawn.planted]),
        faulty=np.concatenate([wrong, [each.faulty for each in drawn.planted]]).astype(bool),
        stratum=np.array([""] * count + [each.stratum for each in drawn.planted]),
        source=source,
        prompt=prompts[source],
        labelled=drawn.wrong is not None,
        seconds=dict.fromkeys([*names, LENGTH], seconds),
    )
    return rows, notes
