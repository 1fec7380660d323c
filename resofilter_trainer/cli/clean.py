"""`resofilter clean`: mask the tokens that teach little, by a rule, or weigh them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from ..config import CLEANING_MODES, InputError, Ranking, TokenCleaning, cleaning_of_mode, whole_number
from ..config.compatibility import set_sequential
from .inputs import checked_dataset_of, require, row_options, sft_config
from .parser import CommandParser, process_arguments, row_arguments, seed_argument

SELF_EVOLVING = "self-evolving"
RULES = ("token_cleaning", "rho", "sstoken", "profit", "stm", "eaft", "conflict", "random", "all_but_first", "messages")
WEIGHING = ("eaft", "messages")  # rules that give weights
OF_RULES = ("threshold", "first", "gamma")  # settings of a rule
OF_TRAINING = ("parts", "lora_r", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
EXAMPLES = (
    "resofilter clean --model BASE --reference REFERENCE --dataset rows.jsonl --output cleaned/",
    "resofilter clean --model BASE --rule profit --dataset rows.jsonl --output cleaned/",
)


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of token cleaning."""
    row_arguments(parser)
    process_arguments(parser)
    defaults = TokenCleaning()
    parser.needed("--output", help="a folder for the cleaned dataset, the token scores and a summary")
    parser.add_argument("--reference", help="a model or a LoRA adapter, tuned from the same base model on good data")
    share = "the share of the tokens to keep; by default 0.6, or the bound of the paper of rule profit or stm"
    parser.add_argument("--keep_tokens", type=float, help=share)
    parser.add_argument("--rule", choices=RULES, help="which tokens are learnt; by default token_cleaning")
    parser.add_argument("--threshold", type=float, help="of rule profit: a probability; of rule stm: a perplexity")
    parser.add_argument("--first", type=int, help="the tokens of each row that rule all_but_first masks")
    gamma = "of rule sstoken: the weight of its loss part beside attention to the prompt; the paper's is 0.5, default 1"
    parser.add_argument("--gamma", type=float, help=gamma)
    parser.add_argument("--mode", choices=CLEANING_MODES, default="fixed", help="how the reference comes about")
    ranking = "tokens are ranked together, or by row; by default global, or sample in mode rho"
    parser.add_argument("--ranking", choices=get_args(Ranking), help=ranking)
    parser.add_argument("--group_by", help="a column, such as the source, to report the kept share of each group")
    parser.add_argument("--tokens_per_batch", type=int, default=defaults.tokens_per_batch, help="batch size in tokens")
    parser.add_argument("--bf16", action="store_true", help="forward with bfloat16 autocast, also in training")
    seed_argument(parser)
    training = parser.add_argument_group("self-evolving: one training per stage, as in the paper")
    training.add_argument("--parts", type=int, default=defaults.parts, help="the number of stages")
    training.add_argument("--lora_r", type=int, default=64, help="the rank of the adapters; 0 trains all weights")
    training.add_argument("--learning_rate", type=float, default=1e-4, help="of each training")
    training.add_argument("--per_device_train_batch_size", type=int, default=8, help="rows")
    training.add_argument("--gradient_accumulation_steps", type=int, default=6, help="batches")


def run(args: argparse.Namespace) -> None:
    """Mask or weigh tokens, and print what was kept."""
    require(args, "model", "dataset", "output")
    if args.rule == "token_cleaning" and (args.mode == "rho" or args.ranking == "sample"):
        raise InputError("--rule token_cleaning ranks all tokens together: for a ranking by row, pass --rule rho.")
    if args.rule == "rho":
        args.mode = _mode_of_rho(args.mode)
    if args.rule not in (None, "token_cleaning", "rho"):
        return _report(args, _by_rule(args), token_weights=args.rule in WEIGHING)
    for name in OF_RULES:
        if getattr(args, name) is not None:
            raise InputError(f"--{name} goes with --rule, and with one that has it: leave it out.")
    cleaning = cleaning_of_mode(
        args.mode,
        args.reference,
        args.ranking,
        keep=TokenCleaning().keep if args.keep_tokens is None else args.keep_tokens,
        parts=args.parts,
        group_by=args.group_by,
        tokens_per_batch=args.tokens_per_batch,
    )
    if args.reference is None and args.mode != SELF_EVOLVING:
        raise InputError(
            "--reference is missing: a model or LoRA adapter tuned on good data. Or use --mode self-evolving, or a "
            "--rule that needs none, such as profit."
        )
    changed = [name for name in OF_TRAINING if getattr(args, name) != args.parser.get_default(name)]
    if args.mode != SELF_EVOLVING and changed:
        raise InputError(f"--{changed[0]} is for --mode {SELF_EVOLVING}: leave it out with --mode {args.mode}.")
    whole_number("--lora_r", args.lora_r, least=0)
    _report(args, (_self_evolve if args.mode == SELF_EVOLVING else _clean)(args, cleaning))


def _mode_of_rho(mode: str) -> str:
    """The mode of rule rho. Raises InputError for self-evolving cleaning, which has its own ranking."""
    if mode == SELF_EVOLVING:
        raise InputError("--rule rho is of a fixed reference: with --mode self-evolving, pass --ranking sample.")
    return "rho"


def _by_rule(args: argparse.Namespace) -> Any:
    """Clean by a rule other than those of a mode."""
    for name in ("mode", "ranking", *OF_TRAINING):
        if getattr(args, name) != args.parser.get_default(name):
            raise InputError(f"--{name} is for --rule token_cleaning: leave it out with --rule {args.rule}.")
    from ..selecting.named_rules import token_rule
    from ..tokens.cleaning import clean_dataset

    settings = {"keep": args.keep_tokens, **{name: getattr(args, name) for name in OF_RULES}}
    settings["seed"] = args.seed if args.rule == "random" else None
    rule = token_rule(args.rule, **{name: value for name, value in settings.items() if value is not None})
    training = sft_config(args, bf16=args.bf16, seed=args.seed)
    rows, options = checked_dataset_of(args), row_options(args)
    options |= {"reference": args.reference, "group_by": args.group_by, "tokens_per_batch": args.tokens_per_batch}
    return clean_dataset(args.model, rows, rule=rule, args=training, output=args.output, **options)


def _report(args: argparse.Namespace, cleaned: Any, token_weights: bool = False) -> None:
    """Print what was kept, and how to train on it."""
    from accelerate import PartialState

    from ..selecting.training_lines import TOKENS, training_lines
    from ..selecting.weighted_rows import TOKEN_WEIGHTS
    from ..tokens.cleaned_dataset import described

    if PartialState().is_main_process:
        print(described(cleaned.summary, cleaned.reasons))
        print(f"Dataset to train on: {args.output} (datasets.load_from_disk)")
        if args.mode == SELF_EVOLVING:
            print(f"Model of the last stage: {Path(args.output) / f'stage-{args.parts - 1}' / 'model'}")
        else:
            place, preparation = Path(args.output), {"max_length": args.max_length}
            source = {"trust_remote_code": args.trust_remote_code}  # tokens need no chat template
            columns = [TOKENS, TOKEN_WEIGHTS] if token_weights else [TOKENS]
            lines = training_lines(args.model, place, place, preparation, columns, source)
            print("\n    ".join(["To train on it, in Python:", *lines]))


def _clean(args: argparse.Namespace, cleaning: TokenCleaning) -> Any:
    from ..tokens.cleaning import clean_dataset

    training = sft_config(args, bf16=args.bf16, seed=args.seed)
    rows, options = checked_dataset_of(args), row_options(args)
    return clean_dataset(args.model, rows, cleaning, args=training, output=args.output, **options)


def _self_evolve(args: argparse.Namespace, cleaning: TokenCleaning) -> Any:
    from peft import LoraConfig

    from ..training.self_evolving import self_evolve

    lora = LoraConfig(r=args.lora_r, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")
    training = sft_config(
        args,
        bf16=args.bf16,
        seed=args.seed,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        warmup_steps=0.03,
        num_train_epochs=1,
        save_strategy="no",
    )
    set_sequential(training)
    rows, options = checked_dataset_of(args), row_options(args)
    return self_evolve(args.model, rows, cleaning, training, peft_config=lora if args.lora_r else None, **options)
