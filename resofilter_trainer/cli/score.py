"""`resofilter score`: measure every row of a dataset."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from shlex import quote
from typing import Any, get_args

import numpy as np

from ..config import (
    OPTIMIZER,
    RESONANCE,
    InputError,
    Norm,
    Precision,
    ResonanceConfig,
    ScoreWarning,
    UpdateName,
    Warmup,
    WarmupMethod,
    one_of,
    whole_number,
)
from ..scores.doubts import trust_lines
from ..scores.full_step import full_step_of, percent, span_of
from ..scores.score_table import WARMED_UP, count_reasons
from .inputs import dataset_of, require, row_options, settings_of, sft_config, warmup_dataset_of
from .launching import is_launched
from .naming import told
from .parser import CommandParser, process_arguments, row_arguments

CRITERIA = (  # the names of those in `criteria`, which needs torch
    *("loss", "perplexity", "entropy", "el2n", "grand", "ifd", "length", "response_ratio", "repetition", "rarity"),
    *("k_center", "donod"),
)
SIGNALS = (  # the names of those in `model.signals`, and below of those in `scoring.further_signals`
    *("resonance", "resonance_sgd", "resonance_l2", "loss", "loss_sum", "loss_median", "loss_max", "loss_top"),
    *("entropy", "conflict", "surprise", "rank", "rsr", "el2n", "grand_head", "embedding_chain", "layer_vote"),
    *("ifd", "verdict", "loss_alone", "jitter", "excess", "superfiltering"),
)
EXAMPLE = "resofilter score --model google/gemma-2-2b --dataset rows.jsonl --output scores/"
UPDATES = [name for name in get_args(UpdateName) if name != OPTIMIZER]  # without a run's own optimizer


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the scoring pass."""
    row_arguments(parser)
    process_arguments(parser)
    parser.add_argument("--output", help="a folder for the scores")
    parser.add_argument("--sharded", action="store_true", help="shard the model's weights over the processes (FSDP2)")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream")
    measures = f"resonance, or another criterion: {', '.join(CRITERIA)}"
    parser.add_argument("--criterion", default=RESONANCE, help=measures)
    signals = f"with resonance: all, or some of {', '.join(SIGNALS)}; each is a column to select by"
    parser.add_argument("--signals", nargs="+", metavar="NAME", help=signals)
    parser.add_argument(
        "--reference", help="the second model of the signals excess and superfiltering, or a LoRA adapter"
    )
    parser.add_argument("--tokens_per_batch", type=int, help="batch size in tokens; by default what suits the device")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="the forward's precision: float32, bfloat16, or auto: bfloat16 if faster and ranks alike (resonance)",
    )
    parser.add_argument("--layers", choices=["all"], help="measure every layer, on --limit rows, for the report")
    parser.add_argument("--limit", type=int, help="with --layers all: the number of random rows, by default 500")
    measure = parser.add_argument_group("measure")
    defaults = ResonanceConfig()
    measure.add_argument("--n_layers", type=int, default=defaults.n_layers, help="the number of last layers")
    measure.add_argument("--update", default=defaults.update, help=" or ".join(UPDATES))
    measure.add_argument("--norm", default=defaults.norm, help=" or ".join(get_args(Norm)))
    measure.add_argument("--lr", type=float, default=defaults.lr, help="the learning rate of the step")
    measure.add_argument("--eps", type=float, default=defaults.eps, help="AdamW's; a larger one spreads scores")
    measure.add_argument("--weight_decay", type=float, default=defaults.weight_decay, help="AdamW's")
    measure.add_argument("--up_projection", help="a regex over module names, for an unknown model family")
    warm = parser.add_argument_group("warm-up, of a copy of the model that then scores")
    warm.add_argument("--warmup", type=int, metavar="ROWS", help="tune on so many rows first, such as 640")
    warm.add_argument("--warmup_dataset", help="tune on these rows, by default all; else on rows of --dataset")
    warm.add_argument("--warmup_split", default="train", help="its split")
    own = Warmup()
    warm.add_argument("--warmup_method", default=own.method, help="full: all weights; or lora")
    warm.add_argument("--warmup_lr", type=float, help="the first step's; by default 1e-4, for lora 2e-4")
    warm.add_argument("--warmup_epochs", type=int, default=own.epochs, help="how often each row is learnt")
    warm.add_argument("--warmup_batch_size", type=int, default=own.batch_size, help="the rows of an optimizer step")
    warm.add_argument("--warmup_lora_rank", type=int, default=own.lora_rank, help="the rank of the LoRA adapter")
    warm.add_argument("--warmup_seed", type=int, default=own.seed, help="draws the rows and their order")
    warm.add_argument("--warmup_cache", help="a folder for the tuned weights; by default OUTPUT/warmup")


def run(args: argparse.Namespace) -> None:
    """Score a dataset and print a summary."""
    require(args, "model", "dataset", "output")
    one_of("--criterion", args.criterion, (RESONANCE, *CRITERIA))
    _check(args)
    one_of("--update", args.update, UPDATES)
    common: dict[str, Any] = {"output": args.output, **row_options(args)}
    common |= _warmup(args)
    if args.tokens_per_batch is not None:
        common["tokens_per_batch"] = args.tokens_per_batch
    measure = _score_layers if args.layers else _score_by_resonance if args.criterion == RESONANCE else _score_by
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)  # they are printed below
        scores = measure(args, common)
    from accelerate import PartialState

    from ..io.files import file_at
    from ..scores.score_table import SCORES_FILE

    if not PartialState().is_main_process:
        return
    if args.layers:
        lines = [f"{int(scores.scored.sum())} of {len(scores)} rows, every layer."]
        lines += [*_warmup_line(scores), *trust_lines(scores)]
        print(told("\n".join([*lines, f"Next: resofilter report {quote(args.output)}"])))
    else:
        print(summary(scores))
        print(f"Scores: {file_at(args.output, SCORES_FILE)}")
        print(f"Next: resofilter select {quote(args.output)} --keep 0.5 --output kept")


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for arguments that do not go together."""
    own = [each.name for each in dataclasses.fields(ResonanceConfig)]
    changed = [name for name in own if getattr(args, name) != args.parser.get_default(name)]
    if args.criterion != RESONANCE and changed:
        raise InputError(f"--{changed[0]} is a setting of resonance: leave it out with --criterion {args.criterion}.")
    if args.layers and (args.criterion != RESONANCE or args.tokens_per_batch is not None):
        raise InputError("--layers all measures resonance, row by row: leave --criterion and --tokens_per_batch out.")
    if (args.streaming or args.sharded) and (args.criterion != RESONANCE or args.layers):
        raise InputError("--streaming and --sharded are for resonance: leave --criterion and --layers out.")
    if args.signals and (args.criterion != RESONANCE or args.layers):
        raise InputError("--signals are measured beside resonance: leave --criterion and --layers out.")
    if args.reference and not args.signals:
        raise InputError("--reference is for signals: pass --signals excess, superfiltering or all.")
    if args.streaming and args.reference:
        raise InputError("--reference is for signals that a stream has not: leave --streaming or --reference out.")
    if args.sharded and args.num_processes is None and not is_launched():
        raise InputError("--sharded is for several processes: pass --num_processes, or use accelerate launch.")
    if args.limit is not None and not args.layers:
        raise InputError("--limit goes with --layers all: without it, every row is scored.")


def _warmup(args: argparse.Namespace) -> dict[str, Any]:
    """The warm-up that the arguments ask for; empty for none."""
    if args.warmup is None and args.warmup_dataset is None:
        own = [name for name in vars(args) if name.startswith("warmup_")]
        changed = [name for name in own if getattr(args, name) != args.parser.get_default(name)]
        if changed:
            raise InputError(f"--{changed[0]} is a setting of the warm-up: pass --warmup, the number of its rows.")
        return {}
    if args.warmup is not None:
        whole_number("--warmup", args.warmup, least=1)
    one_of("--warmup_method", args.warmup_method, get_args(WarmupMethod))
    if args.sharded:
        raise InputError("A warm-up trains a whole copy of the model in every process: leave --sharded out.")
    others = [each.name for each in dataclasses.fields(Warmup) if each.name != "rows"]
    settings = Warmup(rows=args.warmup, **{name: getattr(args, f"warmup_{name}") for name in others})
    unused = {} if args.warmup_dataset is not None else {"warmup_split": "--warmup_dataset"}
    unused |= {} if settings.method == "lora" else {"warmup_lora_rank": "--warmup_method lora"}
    for name, needed in unused.items():
        if getattr(args, name) != args.parser.get_default(name):
            raise InputError(f"--{name} goes with {needed}.")
    return {"warmup": settings, "warmup_dataset": warmup_dataset_of(args, args.warmup_split)}


def _score_by_resonance(args: argparse.Namespace, common: dict[str, Any]) -> Any:
    from ..data.files import load_stream
    from ..scoring.dataset import score_dataset
    from ..scoring.stream import score_stream

    measure = {"config": settings_of(args, ResonanceConfig), "precision": args.precision, "sharded": args.sharded}
    measure["signals"] = ",".join(each.strip(",") for each in args.signals) if args.signals else None
    training = sft_config(args, bf16=False)
    if args.streaming:
        stream = load_stream(args.dataset, args.split, args.dataset_config)
        return score_stream(args.model, stream, args=training, **measure, **common)
    return score_dataset(args.model, dataset_of(args), args=training, reference=args.reference, **measure, **common)


def _score_by(args: argparse.Namespace, common: dict[str, Any]) -> Any:
    """Scores by another criterion than resonance."""
    from ..scoring.criterion import score_by

    training = sft_config(args, bf16=args.precision == "bfloat16")
    return score_by(args.criterion, args.model, dataset_of(args), args=training, **common)


def _score_layers(args: argparse.Namespace, common: dict[str, Any]) -> Any:
    """Measure every layer on some rows, for the report."""
    from ..scoring.layers import LIMIT, score_layers

    for name in ("n_layers", "precision"):
        if getattr(args, name) != args.parser.get_default(name):
            raise InputError(f"--layers all measures every layer in float32: leave --{name} out.")
    limit = LIMIT if args.limit is None else args.limit
    training, config = sft_config(args, bf16=False), settings_of(args, ResonanceConfig)
    return score_layers(args.model, dataset_of(args), args=training, config=config, limit=limit, **common)


def summary(scores: Any) -> str:
    """A ScoreTable in a few lines."""
    values = scores.column("score")[scores.scored]
    full = full_step_of(scores.provenance.config)
    mean = f"{values.mean():.6g}" if full is None else percent(values.mean(), full, float(np.ptp(values)))
    lines = [f"{len(scores)} rows, {len(values)} scored: {span_of(values, full)}, mean {mean}"]
    for reason, count in count_reasons((why for why in scores.reasons if why is not None), 5):
        lines.append(f"  {count} not scored: {reason}")
    lines += _warmup_line(scores)
    limit = scores.provenance.preparation["max_length"]
    if limit is not None and (full := int((scores.column("length") == limit).sum())):
        lines.append(f"  {full} have max_length {limit} tokens: they were truncated, or are exactly that long")
    return told("\n".join([*lines, *trust_lines(scores)]))


def _warmup_line(scores: Any) -> list[str]:
    """What the warm-up has cost, if there was one, and how many of the scored rows it has learnt."""
    cost = scores.provenance.warmup
    if not cost:
        return []
    learnt = int((scores.column(WARMED_UP) == 1).sum())
    end = f"; {learnt} scored rows were learnt there, which biases their scores ({WARMED_UP})" if learnt else ""
    size = f"{cost['rows']} rows, {cost['tokens']} tokens, {cost['steps']} steps, {cost['seconds']:g} s"
    return [f"  scored by a copy of the model after a warm-up ({size}){end}"]
