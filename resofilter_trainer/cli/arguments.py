"""What each command can be told, as argparse has it. Knows the settings' defaults, and leaves the work alone."""

from __future__ import annotations

import argparse
from typing import get_args

from ..config import (
    CLEANING_MODES,
    CRITERION_NAMES,
    OPTIMIZER,
    Norm,
    Precision,
    Ranking,
    ResonanceConfig,
    TokenCleaning,
    UpdateName,
)


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the demo."""
    parser.add_argument("--output", help="folder for everything that it leaves; if none, one in resofilter-demo/")
    parser.add_argument("--mode", default="two-pass", help="two-pass: score, select, train; callback: in one run")
    parser.add_argument("--seed", type=int, default=0)


def row_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows, which columns, how they become tokens."""
    parser.add_argument("--model", help="a name on the hub, or a folder")
    parser.add_argument("--dataset", help="a name on the hub, a JSON, JSONL, CSV or Parquet file, or a folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--dataset_config", help="the configuration of a dataset on the hub")
    parser.add_argument("--drop_duplicates", action="store_true", help="leave out rows whose prompt repeats another's")
    parser.add_argument("--drop_empty", action="store_true", help="leave out rows with an empty completion")
    columns = parser.add_argument_group("columns")
    columns.add_argument("--prompt_column", nargs="+", help="one column, or several to be joined: instruction input")
    columns.add_argument("--completion_column")
    columns.add_argument("--messages_column")
    columns.add_argument("--text_column")
    columns.add_argument("--separator", default="\n", help="put between prompt and completion")
    columns.add_argument("--conversational", action="store_true", help="make messages of prompt and completion")
    tokens = parser.add_argument_group("tokens, as in SFTConfig")
    tokens.add_argument("--max_length", type=_length, default=1024, help="tokens of a row, or none")
    tokens.add_argument("--assistant_only_loss", action="store_true")
    tokens.add_argument("--completion_only_loss", type=_true_or_false)
    tokens.add_argument("--chat_template_path")
    tokens.add_argument("--trust_remote_code", action="store_true")


def process_arguments(parser: argparse.ArgumentParser) -> None:
    """By how many processes a pass is made."""
    parser.add_argument("--num_processes", type=int, help="of this machine; for several, see accelerate launch")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds of silence after which a process is lost")


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the scoring pass."""
    row_arguments(parser)
    process_arguments(parser)
    parser.add_argument("--output", help="folder for the scores")
    parser.add_argument("--sharded", action="store_true", help="spread the model's weights over the processes (FSDP2)")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream, never all of it")
    parser.add_argument(
        "--criterion", default="resonance", help=f"resonance, or another selector's: {', '.join(CRITERION_NAMES)}"
    )
    parser.add_argument("--tokens_per_batch", type=int, help="padding included; by default what suits the device")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="of the forward: float32, bfloat16 (by autocast), or auto: bfloat16 if faster and ranks alike (resonance)",
    )
    parser.add_argument("--layers", choices=["all"], help="measure every layer, on --limit rows, for the report")
    parser.add_argument("--limit", type=int, help="with --layers all: how many random rows; 500, if none")
    measure = parser.add_argument_group("measure")
    defaults = ResonanceConfig()
    measure.add_argument("--n_layers", type=int, default=defaults.n_layers)
    updates = [name for name in get_args(UpdateName) if name != OPTIMIZER]
    measure.add_argument("--update", default=defaults.update, help=" or ".join(updates))
    measure.add_argument("--norm", default=defaults.norm, help=" or ".join(get_args(Norm)))
    measure.add_argument("--lr", type=float, default=defaults.lr)
    measure.add_argument("--eps", type=float, default=defaults.eps)
    measure.add_argument("--weight_decay", type=float, default=defaults.weight_decay)
    measure.add_argument("--up_projection", help="regex over module names, for a model family that is not known")


def clean_arguments(parser: argparse.ArgumentParser) -> None:
    """Of token cleaning."""
    row_arguments(parser)
    process_arguments(parser)
    defaults = TokenCleaning()
    parser.add_argument("--output", help="folder for the cleaned dataset, the token scores and a summary")
    parser.add_argument("--reference", help="a model, or a LoRA adapter, tuned from the same base on good data")
    parser.add_argument("--keep_tokens", type=float, default=defaults.keep, help="share of the tokens that stays")
    parser.add_argument("--mode", default="fixed", help=" | ".join(CLEANING_MODES))
    parser.add_argument("--ranking", help=" or ".join(get_args(Ranking)) + "; global, with --mode rho sample")
    parser.add_argument("--group_by", help="a column, such as the source; what each group keeps is reported")
    parser.add_argument("--tokens_per_batch", type=int, default=defaults.tokens_per_batch, help="padding included")
    parser.add_argument("--bf16", action="store_true", help="a bfloat16 autocast forward, in measuring and training")
    training = parser.add_argument_group("self-evolving: one training for each part, as in the paper")
    training.add_argument("--parts", type=int, default=defaults.parts)
    training.add_argument("--lora_r", type=int, default=64, help="rank of the adapters; 0 trains all weights")
    training.add_argument("--learning_rate", type=float, default=1e-4)
    training.add_argument("--per_device_train_batch_size", type=int, default=8)
    training.add_argument("--gradient_accumulation_steps", type=int, default=6)


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the comparison."""
    parser.add_argument("comparison", nargs="?", help="a YAML file such as recipes/compare.yaml")
    parser.add_argument("--output", help="folder for everything, instead of the file's")
    parser.add_argument("--published", action="store_true", help="the survey's tables, from its own numbers")
    parser.add_argument("--json", help="with --published, a file for the ranks")


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the report."""
    parser.add_argument("source", help="a folder or file of scores, or the folder of a run, a cleaning or a comparison")
    parser.add_argument("--selection", help="what select wrote, where it lies elsewhere")
    parser.add_argument("--comparison", help="what compare wrote, where it lies elsewhere")
    parser.add_argument("--output", help="folder for report.html; the same folder, if none")
    parser.add_argument("--dataset", help="the dataset that was scored, if it moved since")
    parser.add_argument("--split")
    parser.add_argument("--group_column", help="a column of the dataset, such as its source")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--open", action="store_true", help="show it in the browser")


def select_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the selection."""
    parser.add_argument("scores", nargs="+", help="folders or files of scores; several are parts of one dataset's")
    parser.add_argument("--output", help="folder for the selection and the rows that stay")
    parser.add_argument("--keep", type=float, help="share that stays; half, if there is no threshold")
    parser.add_argument(
        "--drop", help="which end goes: largest, smallest or both; if none, the criterion's own, or largest"
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        help="instead of a share: an absolute score, or where the values say: otsu, iqr, knee",
    )
    parser.add_argument(
        "--by",
        default="score",
        help="the column that is ranked: score, loss, num_tokens, layer_<i>; several with commas, a minus before one "
        "whose other end goes: score,-num_tokens or --by=-num_tokens",
    )
    parser.add_argument(
        "--combine", default="ranks", help="how several columns become one: ranks, topsis, pareto or residual"
    )
    parser.add_argument("--stratify_by", help="a column of the scores: the share holds within each part of its values")
    parser.add_argument("--strata", type=int, default=10, help="how many parts")
    parser.add_argument("--group_column", help="a column of the dataset: the share holds within each of its groups")
    parser.add_argument("--dataset", help="the dataset that was scored, if it moved since")
    parser.add_argument("--split")


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # the name of a rule, which the selector checks


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"
