"""The probe from start to end. Knows the order of the steps, not how faults are made or what the numbers say.

draw rows -> plant faults -> wrong answers by a model -> one pass over all -> AUROC of each signal -> recommendation
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, Precision, Warmup, check_kind, warmup_settings
from ..config.keywords import RowOptions
from ..data.arguments import check_call
from ..data.fingerprints import PACKAGES, hash_tokenizer, identity
from ..data.loading import check_arguments, check_loss, default_arguments, load_model, placed
from ..io.digest import hash_rows
from ..io.files import read_json, replacing
from ..io.made_from import as_json, check_made_from
from ..model.signals import SIGNALS
from ..scores.doubts import remarks_of
from ..scoring.further_signals import Wanted
from ..scoring.passes import from_main, locked
from ..scoring.tuning import check_tunable
from .drawing import EVERY, ROWS, Drawn, check_counts, draw, kinds_of
from .faults import Planted
from .findings import (
    ALL,
    CONTRADICTED,
    LABELLED,
    SELF_MADE,
    alike_of,
    comparisons,
    missing_values,
    records_of,
)
from .measuring import SCORES, Measured, Measuring, rows_of, rows_to_tune_on, total_seconds
from .page import write_probe
from .recommendation import recommend
from .results import OF_ALL, OF_CONTRADICTED, OF_LABELS, OF_SELF_MADE, REMEDY, RESULT_FILE, ProbeResult
from .self_made import write

SETTINGS_FILE = "settings.json"
SELF_MADE_FILE = "self_made.json"
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
    signals: str | Sequence[str] = tuple(SIGNALS),
    reference: str | None = None,
    warmup: int | Warmup | None = None,
    warmup_dataset: Dataset | None = None,
    wrong_column: str | None = None,
    seed: int = 0,
    precision: Precision | None = None,
    tokens_per_batch: int | None = None,
    **row_options: Unpack[RowOptions],
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
        signals, reference: the signals to measure, as for `score_dataset`; by default those of the one pass. `"all"`
            takes four further forwards.
        warmup: measure everything again with a copy of the model after this warm-up, as for `score_dataset`; each
            signal has a second line then, `loss (warmed up)`.
        warmup_dataset: the rows to tune on, of the same format; by default rows of the dataset that were not drawn.
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
    planting = kinds_of(kinds, faults)
    if precision is None and args is None:
        precision = "auto"
    args, folder = args or default_arguments(), None if output is None else Path(output)
    check_arguments(args, folder)
    check_loss(args)
    wanted = Wanted.of(signals, reference, args, sharded=False)
    warm = warmup_settings(warmup, from_dataset=warmup_dataset is not None)
    if warm is not None:
        wanted.check_warmup()
    self_made = wrong_column is None if self_made is None else self_made
    if writer is not None and not self_made:
        raise InputError("A writer writes the answers of self_made=True: leave writer= out, or pass self_made=True.")
    drawn = draw(dataset, args, rows, planting, faults_per_kind, wrong_column, seed, **row_options)
    tune_on = None if warm is None else rows_to_tune_on(warm, warmup_dataset, drawn, args, **row_options)
    if not (drawn.planted or wrong_column or self_made or drawn.contradict):
        raise InputError(f"No fault can be planted in these rows. {_why(drawn.left_out)}{REMEDY_KINDS}")
    model, tokenizer = load_model(model, processing_class, args)
    if warm is not None:
        check_tunable(model, warm, args)
    author = None if not self_made else (model, tokenizer) if writer is None else load_model(writer, None, args)
    made_from = {
        **_identity(model, tokenizer),
        "rows": drawn.digest(),
        "signals": list(wanted.names),
        "reference": reference,
        **({} if warm is None else {f"warmup_{name}": value for name, value in warm.to_json().items()}),
        **(
            {}
            if warmup_dataset is None
            else {"warmup_dataset": hash_rows(warmup_dataset, _noted(folder, "warmup_dataset"))}
        ),
        "writer": None if author is None else _identity(*author),
        "seed": seed,
        "faults_per_kind": faults_per_kind,
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
        measuring = Measuring(args, signals, reference, precision, tokens_per_batch)
        passes = [measuring.measure(model, tokenizer, drawn, folder)]
        if warm is not None:
            passes.append(measuring.measure(model, tokenizer, drawn, folder, warm, tune_on))
        result = _result(drawn, passes, warm, about)
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


def _noted(folder: Path | None, name: str) -> str | None:
    """What a probe that is in the folder already was made from, by name; None where nothing tells."""
    with contextlib.suppress(FileNotFoundError, InputError):  # a damaged file is refused later
        there = {} if folder is None else read_json(folder / SETTINGS_FILE, REMEDY)
        value = there.get(name) if isinstance(there, dict) else None
        return value if isinstance(value, str) else None
    return None


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


def _result(drawn: Drawn, passes: Sequence[Measured], warm: Warmup | None, about: Mapping[str, Any]) -> ProbeResult:
    rows, notes = rows_of(drawn, passes)
    scores = passes[0].scores
    compared, too_few, said = comparisons(rows)
    if not compared:
        why = _why({**drawn.left_out, **too_few})
        raise InputError(f"No fault could be measured in these rows. {why}Pass more rows. {REMEDY_KINDS}")
    records = records_of(rows, compared)
    stands_for = {LABELLED: OF_LABELS, CONTRADICTED: OF_CONTRADICTED, SELF_MADE: OF_SELF_MADE, ALL: OF_ALL}
    stands_for |= {name: fault.stands_for for name, fault in drawn.kinds.items()}
    used = [each.kind for each in compared] + [ALL]
    return ProbeResult(
        signals=records,
        recommendation=recommend(records, None if warm is None else warm.rows),
        kinds={kind: stands_for[kind] for kind in used},
        left_out={**drawn.left_out, **too_few},
        notes=[*drawn.notes, *notes, *said, *missing_values(rows), *remarks_of(scores).values()],
        alike=alike_of(rows),
        cost={
            "rows": len(drawn.examples),
            "planted": len(drawn.planted),
            "tokens": int(np.nansum(scores.column("length"))),
            "seconds": total_seconds(passes),
        },
        provenance=as_json(about),
    )
