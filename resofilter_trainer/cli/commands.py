"""What each command does: resofilter demo | score | select | clean | compare | report | env. Leaves the work alone.

Each imports what it needs when it runs: `select`, `compare --published` and `env` never import torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from ..config import (
    CRITERION_NAMES,
    RESONANCE,
    ColumnMapping,
    InputError,
    ResonanceConfig,
    TokenCleaning,
    cleaning_of_mode,
    one_of,
)
from ..scores.score_table import count_reasons

DEMO_MODES = ("two-pass", "callback")
PACKAGES = ("resofilter_trainer", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "evaluate")


def run_score(args: argparse.Namespace) -> None:
    """Score a dataset and say what came out."""
    _require(args, "model", "dataset", "output")
    from accelerate import PartialState

    from ..data.rows import load_stream
    from ..io.files import file_at
    from ..scores.score_table import SCORES_FILE
    from ..scoring.criterion import score_by
    from ..scoring.dataset import score_dataset
    from ..scoring.stream import score_stream

    one_of("--criterion", args.criterion, (RESONANCE, *CRITERION_NAMES))
    own = [each.name for each in dataclasses.fields(ResonanceConfig)]
    changed = [name for name in own if getattr(args, name) != args.parser.get_default(name)]
    if args.criterion != RESONANCE and changed:
        raise InputError(
            f"--{changed[0]} is of the step that resonance measures; --criterion {args.criterion} has none."
        )
    if args.layers and (args.criterion != RESONANCE or args.tokens_per_batch is not None):
        raise InputError("--layers all is of resonance, a row at a time: leave --criterion and --tokens_per_batch out.")
    if (args.streaming or args.sharded) and (args.criterion != RESONANCE or args.layers):
        raise InputError(
            "--streaming and --sharded are for the score by resonance: leave --criterion and --layers out."
        )
    if args.limit is not None and not args.layers:
        raise InputError("--limit goes with --layers all; scores are of all rows.")
    common: dict[str, Any] = {"output": args.output, **_row_options(args)}
    if args.tokens_per_batch is not None:
        common["tokens_per_batch"] = args.tokens_per_batch
    if args.layers:
        _score_layers(args, common)
        return
    if args.criterion == RESONANCE:
        common |= {"config": _from(args, ResonanceConfig), "precision": args.precision, "sharded": args.sharded}
        common["args"] = _sft_config(args, bf16=False)
        if args.streaming:
            stream = load_stream(args.dataset, args.split, args.dataset_config)
            scores = score_stream(args.model, stream, **common)
        else:
            scores = score_dataset(args.model, _rows(args), **common)
    else:
        training = _sft_config(args, bf16=args.precision == "bfloat16")
        scores = score_by(args.criterion, args.model, _rows(args), args=training, **common)
    if PartialState().is_main_process:
        print(summary(scores))
        print(f"Scores: {file_at(args.output, SCORES_FILE)}")
        print(f"Next: resofilter select {args.output} --keep 0.5 --output kept")


def _score_layers(args: argparse.Namespace, common: dict[str, Any]) -> None:
    """Measure every layer on some rows, for the report."""
    from accelerate import PartialState

    from ..scoring.layers import LIMIT, score_layers

    defaults = args.parser.get_default
    for name in ("n_layers", "precision"):
        if getattr(args, name) != defaults(name):
            raise InputError(f"--{name} goes without --layers all, which measures every layer in float32.")
    limit = LIMIT if args.limit is None else args.limit
    training = _sft_config(args, bf16=False)
    scores = score_layers(
        args.model, _rows(args), args=training, config=_from(args, ResonanceConfig), limit=limit, **common
    )
    if PartialState().is_main_process:
        print(f"{int(scores.scored.sum())} of {len(scores)} rows, every layer. Next: resofilter report {args.output}")


def summary(scores: Any) -> str:
    """What a table of scores holds, in a few lines."""
    values = scores.column("score")[scores.scored]
    span = f"{values.min():.6g} to {values.max():.6g}, mean {values.mean():.6g}"
    lines = [f"{len(scores)} rows, {len(values)} scored: {span}"]
    for reason, count in count_reasons((why for why in scores.reasons if why is not None), 5):
        lines.append(f"  {count} not scored: {reason}")
    limit = scores.provenance.preparation["max_length"]
    if limit is not None and (full := int((scores.column("length") == limit).sum())):
        lines.append(f"  {full} fill max_length {limit}: they are cut there, or exactly as long")
    trust = scores.provenance.trust
    if trust is not None:
        lines.append(f"{'Trust' if trust.trusted else 'Warning'}: {trust}")
    return "\n".join(lines)


def run_select(args: argparse.Namespace) -> None:
    """Decide on scores that were saved, and write the decision and the rows that stay."""
    from ..io.files import check_folder, folder_lock
    from ..scores.score_table import ScoreTable
    from ..selecting.data_selector import DataSelector
    from ..selecting.kept_dataset import DATASET, check_place, save_kept

    if args.output is None:
        raise InputError("--output is missing: a folder for the selection and the rows that stay.")
    if Path(args.output).suffix == ".parquet":
        raise InputError(f"--output {args.output} is a folder's place: the selection and the rows go there.")
    check_folder(Path(args.output))
    by = args.by.split(",")
    selector = DataSelector(
        keep=args.keep,
        drop=args.drop,
        threshold=args.threshold,
        by=by[0] if len(by) == 1 else by,
        combine=args.combine,
        stratify_by=args.stratify_by,
        strata=args.strata,
    )
    scores = ScoreTable.join([ScoreTable.load(path) for path in args.scores])
    dataset = _scored_dataset(args, scores.provenance.source)
    check_place(Path(args.output), args.dataset or scores.provenance.source.get("dataset"))
    if args.group_column and (dataset is None or args.group_column not in dataset.column_names):
        raise InputError(f"--group_column {args.group_column}: no such column, or no dataset; pass --dataset.")
    selection = selector.select(scores, groups=dataset[args.group_column][:] if args.group_column else None)
    if not selection.keep.any():
        raise InputError(f"There is no row that stays, of {len(selection)}. Choose another threshold or share.")
    rows = None if dataset is None else selection.apply(dataset)
    with folder_lock(Path(args.output)):
        if rows is None:
            saved = selection.save(args.output)
        else:
            saved = save_kept(rows, selection, Path(args.output), args.group_column)
    print(f"Selection: {saved}")
    for reason, count in count_reasons(selection.reason, 10):
        print(f"  {count:>8} {reason}")
    if rows is None:
        print("The scores name no dataset to filter. In Python: Selection.load(...).apply(dataset).")
    else:
        print(f"Rows that stay: {Path(args.output) / DATASET} (datasets.load_from_disk)")
    if len(args.scores) == 1:
        print(f"Next: resofilter report {args.scores[0]} --selection {args.output}")


def run_clean(args: argparse.Namespace) -> None:
    """Mask tokens by a base and a reference model, and say what was kept."""
    _require(args, "model", "dataset", "output")
    cleaning = cleaning_of_mode(
        args.mode,
        args.reference,
        args.ranking,
        keep=args.keep_tokens,
        parts=args.parts,
        group_by=args.group_by,
        tokens_per_batch=args.tokens_per_batch,
    )
    if args.reference is None and args.mode != "self-evolving":
        raise InputError(
            "--reference is missing: a model or LoRA adapter that was tuned on good data. Or --mode self-evolving."
        )
    if args.lora_r < 0:
        raise InputError(f"--lora_r must be at least 0, where 0 trains all weights, got {args.lora_r}.")
    from accelerate import PartialState

    from ..tokens.cleaned_dataset import described

    if args.mode == "self-evolving":
        summary, reasons = _self_evolve(args, cleaning)
    else:
        from ..tokens.cleaning import clean_dataset

        cleaned = clean_dataset(
            args.model,
            _rows(args),
            cleaning,
            args=_sft_config(args, bf16=args.bf16),
            output=args.output,
            **_row_options(args),
        )
        summary, reasons = cleaned.summary, cleaned.reasons
    if PartialState().is_main_process:
        print(described(summary, reasons))
        print(f"Rows to train on, as they are: {args.output} (datasets.load_from_disk)")
        if args.mode == "self-evolving":
            print(f"The model that learnt them: {Path(args.output) / f'stage-{args.parts - 1}' / 'model'}")


def _self_evolve(args: argparse.Namespace, cleaning: TokenCleaning) -> tuple[Any, Any]:
    from peft import LoraConfig

    from ..training.self_evolving import self_evolve

    lora = LoraConfig(r=args.lora_r, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
    training = _sft_config(
        args,
        bf16=args.bf16,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        warmup_steps=0.03,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
    )
    peft_config = lora if args.lora_r else None
    evolved = self_evolve(args.model, _rows(args), cleaning, training, peft_config=peft_config, **_row_options(args))
    return evolved.summary, evolved.reasons


def run_compare(args: argparse.Namespace) -> None:
    """Compare selectors on a model and data, or print the survey's tables, recomputed from its numbers."""
    if args.json and not args.published:
        raise InputError("--json goes with --published; a comparison writes comparison.json into its folder.")
    if args.published == (args.comparison is not None):
        raise InputError("Say what to compare: a YAML file, or --published for the survey's twelve selectors.")
    if args.published:
        import json

        from ..compare.published import published_ranks, published_table
        from ..io.files import replacing

        print(published_table())
        if args.json:
            with replacing(Path(args.json)) as part:
                part.write_text(json.dumps(published_ranks(), indent=2) + "\n")
            print(f"Ranks: {args.json}")
        return
    from ..compare.config import ComparisonConfig

    config = ComparisonConfig.load(args.comparison)
    if args.output is not None:
        config = dataclasses.replace(config, output=args.output)
    import datasets
    from transformers.utils import logging

    from ..compare.methods import METHODS
    from ..compare.report import PICTURE, write
    from ..compare.run import run
    from ..selecting.results import COMPARISON_FILE

    datasets.disable_progress_bars()  # of many small steps: a line for every training says more
    logging.disable_progress_bar()
    cells = run(config)
    print(write(config, cells, {each.name: METHODS[each.method].needs for each in config.selectors}))
    print(f"Table, cells and picture: {Path(config.output) / COMPARISON_FILE}, {Path(config.output) / PICTURE}")


def run_report(args: argparse.Namespace) -> None:
    """Write the page, and the pictures and the dropped rows beside it."""
    from ..report import read_contents, write_report

    contents = read_contents(args.source, args.selection, args.comparison)
    texts = groups = decode = None
    if contents.scores is not None:
        texts, groups = _texts_and_groups(args, contents.scores.provenance)
    if contents.cleaned is not None:
        from ..data.row_texts import decoder

        decode = decoder(contents.cleaned.scores.provenance.model)
    folder = Path(args.source).parent if Path(args.source).suffix == ".parquet" else Path(args.source)
    report = write_report(contents, args.output or folder, texts, groups, decode, args.title)
    if report.numbers is not None:
        for warning in report.numbers.warnings:
            print(f"Warning: {warning}")
    print(f"Report: {report.path}")
    if args.open:
        import webbrowser

        webbrowser.open(report.path.resolve().as_uri())


def _texts_and_groups(args: argparse.Namespace, provenance: Any) -> tuple[Any, Any]:
    """Each row as text and its group, as far as the dataset can be had."""
    source = provenance.source
    try:
        dataset = _scored_dataset(args, source)
    except InputError as error:
        if args.dataset or args.group_column:
            raise
        print(f"The report has no text: {error}")
        return None, None
    if dataset is None or len(dataset) != provenance.rows:
        if args.dataset:
            raise InputError(f"'{args.dataset}' has {len(dataset)} rows and the scores are of {provenance.rows}.")
        if args.group_column:
            raise InputError("--group_column is a column of the dataset: pass --dataset.")
        why = "the scores name no dataset" if dataset is None else f"the dataset has {len(dataset)} rows now"
        print(f"The report has no text: {why}. Pass --dataset.")
        return None, None
    from ..data.row_texts import RowTexts, scored_columns

    if args.group_column and args.group_column not in dataset.column_names:
        raise InputError(f"--group_column {args.group_column}: the dataset has {', '.join(dataset.column_names)}.")
    groups = [str(each) for each in dataset[args.group_column][:]] if args.group_column else None
    texts = RowTexts(dataset, scored_columns(provenance.preparation))
    return (texts if texts.known else None), groups


def run_env(args: argparse.Namespace) -> None:
    """Print what a bug report needs."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")


def run_demo(args: argparse.Namespace) -> None:
    """Run the embedded demo."""
    if args.seed < 0:
        raise InputError(f"--seed must be at least 0, got {args.seed}.")
    one_of("--mode", args.mode, DEMO_MODES)
    if args.mode == "callback":
        from ..demo.in_training import run
    else:
        from ..demo.run import run
    name = "seed" if args.mode == "two-pass" else args.mode
    run(Path(args.output or f"resofilter-demo/{name}-{args.seed}"), args.seed)


def _require(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing.")


def _rows(args: argparse.Namespace) -> Any:
    from ..data.rows import load_rows

    return load_rows(args.dataset, args.split, args.dataset_config)


def _row_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `score_dataset` and `clean_dataset` want to know of the rows."""
    return {
        "drop_duplicates": args.drop_duplicates,
        "drop_empty": args.drop_empty,
        "source": {"dataset": args.dataset, "split": args.split, "name": args.dataset_config},
        **dataclasses.asdict(_from(args, ColumnMapping)),
    }


def _sft_config(args: argparse.Namespace, **training: Any) -> Any:
    """TRL's arguments, as far as the commands have them."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=args.output,
        max_length=args.max_length,
        assistant_only_loss=args.assistant_only_loss,
        completion_only_loss=args.completion_only_loss,
        chat_template_path=args.chat_template_path,
        trust_remote_code=args.trust_remote_code,
        use_cpu=not torch.cuda.is_available(),
        ddp_timeout=args.timeout,
        report_to="none",
        **training,
    )


def _scored_dataset(args: argparse.Namespace, source: Any) -> Any:
    """The dataset that was scored: from --dataset, or as the scores remember it; None where they do not."""
    name = args.dataset or source.get("dataset")
    if name is None:
        return None
    from ..data.rows import hash_rows, load_rows

    dataset = load_rows(name, args.split or source.get("split") or "train", source.get("name"))
    if source.get("content") not in (None, hash_rows(dataset)):
        raise InputError(f"'{name}' is not what was scored: rows differ, or their order. Score it again.")
    return dataset


def _from(args: argparse.Namespace, kind: type) -> Any:
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})
