"""`resofilter score`: measure every row of a dataset."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from shlex import quote
from typing import Any, get_args

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
from .inputs import checked_dataset_of, hub_options, require, row_options, settings_of, sft_config, warmup_dataset_of
from .launching import is_launched, say_stage
from .naming import told
from .parser import (
    CommandParser,
    hub_arguments,
    process_arguments,
    row_arguments,
    seed_argument,
    shard,
    true_or_false,
)

CRITERIA = (  # the names of those in `criteria`, which needs torch
    *("loss", "perplexity", "entropy", "el2n", "grand", "ifd", "length", "response_ratio", "repetition", "rarity"),
    *("k_center", "donod"),
)
SIGNALS = (  # the names of those in `model.signals`, and below of those in `scoring.further_signals`
    *("resonance", "resonance_sgd", "resonance_l2", "loss", "loss_sum", "loss_median", "loss_max", "loss_top"),
    *("entropy", "conflict", "surprise", "rank", "rsr", "el2n", "grand_head", "embedding_chain", "layer_vote"),
    *("ifd", "verdict", "loss_alone", "jitter", "excess", "superfiltering"),
)
EXAMPLES = (
    "resofilter score --model google/gemma-2-2b --dataset rows.jsonl --output scores/",
    "resofilter score --config run.yaml --prompt_column question --completion_column answer --signals all",
)
UPDATES = [name for name in get_args(UpdateName) if name != OPTIMIZER]  # without a run's own optimizer


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of the scoring pass."""
    row_arguments(parser)
    process_arguments(parser)
    parser.needed("--output", help="a folder for the scores")
    parser.add_argument("--sharded", action="store_true", help="shard weights over the processes (FSDP2)")
    parser.add_argument("--group_size", type=int, help="processes that hold sharded weights together, by default all")
    parser.add_argument(
        "--shard", type=shard, metavar="I/N", help="score the I-th of N shards of the rows, from 0: 3/64"
    )
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream")
    measures = f"{RESONANCE}, {', '.join(CRITERIA)}"
    parser.add_argument("--criterion", choices=(RESONANCE, *CRITERIA), metavar="NAME", default=RESONANCE, help=measures)
    signals = f"columns to select by: all, or some of {', '.join(SIGNALS)}"
    parser.add_argument("--signals", nargs="+", metavar="NAME", help=signals)
    parser.add_argument("--reference", help="a model or adapter, for excess and superfiltering")
    parser.add_argument("--tokens_per_batch", type=int, help="by default what suits the device")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="of the forward; auto: what is faster and ranks alike",
    )
    parser.add_argument("--bf16", nargs="?", const=True, type=true_or_false, help="short for --precision bfloat16")
    seed_argument(parser)
    parser.add_argument("--layers", choices=["all"], help="measure every layer, on --limit rows")
    parser.add_argument("--limit", type=int, help="the rows of --layers all, by default 500")
    measure = parser.add_argument_group("measure")
    defaults = ResonanceConfig()
    measure.add_argument("--n_layers", type=int, default=defaults.n_layers, help="the number of last layers")
    measure.add_argument("--update", choices=UPDATES, default=defaults.update, help="the optimizer of the step")
    measure.add_argument("--norm", choices=get_args(Norm), default=defaults.norm, help="the size of the step")
    measure.add_argument("--lr", type=float, default=defaults.lr, help="the learning rate of the step")
    measure.add_argument("--eps", type=float, default=defaults.eps, help="AdamW's; a larger one spreads scores")
    measure.add_argument("--weight_decay", type=float, default=defaults.weight_decay, help="AdamW's")
    measure.add_argument("--up_projection", help="a regex, for an unknown model family")
    warm = parser.add_argument_group("warm-up, of a copy of the model that then scores")
    warm.add_argument("--warmup", type=int, metavar="ROWS", help="tune on so many rows first: 640")
    warm.add_argument("--warmup_dataset", help="by default rows of --dataset")
    warm.add_argument("--warmup_split", default="train", help="its split")
    own = Warmup()
    warm.add_argument("--warmup_method", choices=get_args(WarmupMethod), default=own.method, help="the weights to tune")
    warm.add_argument("--warmup_lr", type=float, help="by default 1e-4, for lora 2e-4")
    warm.add_argument("--warmup_epochs", type=int, default=own.epochs, help="how often a row is learnt")
    warm.add_argument("--warmup_batch_size", type=int, default=own.batch_size, help="rows of a step")
    warm.add_argument("--warmup_lora_rank", type=int, default=own.lora_rank, help="the rank of the adapter")
    warm.add_argument("--warmup_seed", type=int, default=own.seed, help="draws the rows and their order")
    warm.add_argument("--warmup_cache", help="tuned weights; by default OUTPUT/warmup")
    hub_arguments(parser, "the scores")


def run(args: argparse.Namespace) -> None:
    """Score a dataset and print a summary."""
    require(args, "model", "dataset", "output")
    _check(args)
    pushed = hub_options(args)
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
    from ..scores.doubts import trust_lines
    from ..scores.score_table import SCORES_FILE, warmup_line

    if not PartialState().is_main_process:
        return
    if args.layers:
        lines = [f"{int(scores.scored.sum())} of {len(scores)} rows, every layer."]
        lines += [*warmup_line(scores), *trust_lines(scores)]
        print(told("\n".join([*lines, f"Next: resofilter report {quote(args.output)}"])))
    else:
        print(told(scores.summary()))
        print(f"Scores: {file_at(args.output, SCORES_FILE)}")
        if pushed is not None:
            print(f"Pushed: {scores.push_to_hub(**pushed).repo_url}")
        if args.shard is not None:
            print("Next, when all shards are scored: resofilter join SCORES ... --output joined")
        else:
            print(f"Next: resofilter select {quote(args.output)} --keep 0.5 --output kept")


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for arguments that do not go together; take `--bf16` for the precision that it is short for."""
    if args.bf16 is not None:
        if args.precision != args.parser.get_default("precision"):
            raise InputError(f"--bf16 is short for --precision bfloat16: leave it or --precision {args.precision} out.")
        args.precision = "bfloat16" if args.bf16 else "float32"
    check_values(args)
    own = [each.name for each in dataclasses.fields(ResonanceConfig)]
    changed = [name for name in own if getattr(args, name) != args.parser.get_default(name)]
    if args.criterion != RESONANCE and changed:
        raise InputError(f"--{changed[0]} is a setting of resonance: leave it out with --criterion {args.criterion}.")
    if args.layers and (args.criterion != RESONANCE or args.tokens_per_batch is not None):
        raise InputError("--layers all measures resonance, row by row: leave --criterion and --tokens_per_batch out.")
    needless = {"n_layers": "n_layers" in changed, "bf16" if args.bf16 else "precision": args.precision == "bfloat16"}
    for name, given in needless.items():
        if args.layers and given:
            raise InputError(f"--layers all measures every layer in float32: leave --{name} out.")
    if args.layers and args.push_to_hub:
        raise InputError("--layers all measures some rows, for a report here: leave --push_to_hub out.")
    if (args.streaming or args.sharded) and (args.criterion != RESONANCE or args.layers):
        raise InputError("--streaming and --sharded are for resonance: leave --criterion and --layers out.")
    if args.signals and (args.criterion != RESONANCE or args.layers):
        raise InputError("--signals are measured beside resonance: leave --criterion and --layers out.")
    if args.reference and not args.signals:
        raise InputError("--reference is for signals: pass --signals excess, superfiltering or all.")
    if args.streaming and args.shard is not None:
        raise InputError("--shard is of rows that are read at once: leave it or --streaming out.")
    warms_up = args.warmup is not None or args.warmup_dataset is not None
    if args.shard is not None and warms_up and (args.warmup_dataset is None or args.warmup_cache is None):
        raise InputError(
            "Scores of shards belong together if one warm-up has tuned for all: pass the same --warmup_dataset and "
            "--warmup_cache with every --shard."
        )
    if args.streaming and args.reference:
        raise InputError("--reference is for signals that a stream has not: leave --streaming or --reference out.")
    if args.sharded and args.num_processes is None and not is_launched():
        raise InputError("--sharded is for several processes: pass --num_processes, or use accelerate launch.")
    if args.group_size is not None and not args.sharded:
        raise InputError("--group_size is of processes that hold a sharded model: pass --sharded, too.")
    if args.limit is not None and not args.layers:
        raise InputError("--limit goes with --layers all: without it, every row is scored.")


def check_values(args: argparse.Namespace) -> None:
    """Raise InputError for a number or a signal that cannot be, before anything is read."""
    for name in ("tokens_per_batch", "limit", "max_length", "timeout", "group_size"):
        if getattr(args, name, None) is not None:
            whole_number(f"--{name}", getattr(args, name), least=1)
    for signal in _signals(args) or ():
        one_of("--signals", signal, (*SIGNALS, "all"))


def _signals(args: argparse.Namespace) -> list[str] | None:
    """The names in `--signals`, which have spaces or commas between them; None without any."""
    return [name.strip() for each in args.signals for name in each.strip(",").split(",")] if args.signals else None


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
    from ..scoring.further_signals import Wanted
    from ..scoring.stream import score_stream

    measure = {"config": settings_of(args, ResonanceConfig), "precision": args.precision, "sharded": args.sharded}
    if args.group_size is not None:
        measure["group_size"] = args.group_size
    signals = _signals(args)
    measure["signals"] = None if signals is None else ",".join(signals)
    training = sft_config(args, bf16=False, seed=args.seed)
    if args.streaming:
        say_stage(1, 1, f"scoring the stream {args.dataset} by {args.model}")
        stream = load_stream(args.dataset, args.split, args.dataset_config)
        return score_stream(args.model, stream, args=training, **measure, **common)
    Wanted.without_reference(measure["signals"], args.reference)  # raises before anything is looked for or read
    rows = _rows(args, "scoring", common)
    return score_dataset(args.model, rows, args=training, reference=args.reference, **measure, **common)


def _rows(args: argparse.Namespace, what: str, common: dict[str, Any]) -> Any:
    """The rows to score, with a line for each stage of the work. The place of a shard is added to their source."""
    say_stage(1, 2, f"reading {args.dataset}")
    rows = checked_dataset_of(args)
    if args.shard is not None:
        from ..data.files import shard_of
        from ..scores.shards import SHARD, shard_place

        common["source"] = {**common["source"], SHARD: shard_place(len(rows), *args.shard)}
        rows = shard_of(rows, *args.shard)
    say_stage(2, 2, f"{what} {len(rows):,} rows with {args.model}")
    return rows


def _score_by(args: argparse.Namespace, common: dict[str, Any]) -> Any:
    """Scores by another criterion than resonance."""
    from ..scoring.criterion import depends_on_all_rows, score_by

    if args.shard is not None and depends_on_all_rows(args.criterion):
        raise InputError(f"By {args.criterion}, a row's score depends on all rows of the dataset: leave --shard out.")
    training = sft_config(args, bf16=args.precision == "bfloat16", seed=args.seed)
    rows = _rows(args, f"measuring {args.criterion} of", common)
    return score_by(args.criterion, args.model, rows, args=training, **common)


def _score_layers(args: argparse.Namespace, common: dict[str, Any]) -> Any:
    """Measure every layer on some rows, for the report."""
    from ..scoring.layers import LIMIT, score_layers

    limit = LIMIT if args.limit is None else args.limit
    training, config = sft_config(args, bf16=False, seed=args.seed), settings_of(args, ResonanceConfig)
    rows = _rows(args, f"measuring every layer, on {limit:,} of", common)
    return score_layers(args.model, rows, args=training, config=config, limit=limit, **common)
