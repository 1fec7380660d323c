"""The commands: resofilter demo | score | select | clean | env. Knows arguments and lines, and leaves the work alone.

Each command imports what it needs when it runs: `select` and `env` never import torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from .config import (
    CLEANING_MODES,
    ColumnMapping,
    InputError,
    Norm,
    Precision,
    Ranking,
    ResonanceConfig,
    TokenCleaning,
    Update,
    cleaning_of_mode,
    one_of,
)

DEMO_MODES = ("two-pass", "callback")
PACKAGES = ("resofilter_trainer", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "evaluate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Input that cannot work ends with one line and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries below, on their own arguments
    warnings.filterwarnings("ignore", message="Scores to be taken with care")  # the summary says it
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(argv)
    with exit_on_input_error(f"resofilter {args.command}"):
        if args.config:  # its values stand before the command line's, so that those win
            args = parser.parse_args([args.command, *_yaml_arguments(args), *argv[argv.index(args.command) + 1 :]])
        args.run(args)


@contextlib.contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Turn an InputError into one line on stderr and exit code 2, and an interrupt into 130."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run_score(args: argparse.Namespace) -> None:
    """Score a dataset and say what came out."""
    _require(args, "model", "dataset", "output")
    from accelerate import PartialState

    from .scores import SCORES_FILE, file_at
    from .scoring import score_dataset

    scores = score_dataset(
        args.model,
        _rows(args),
        args=_sft_config(args, bf16=False),
        config=_from(args, ResonanceConfig),
        output=args.output,
        precision=args.precision,
        tokens_per_batch=args.tokens_per_batch,
        **_row_options(args),
    )
    if PartialState().is_main_process:
        print(summary(scores))
        print(f"Scores: {file_at(args.output, SCORES_FILE)}")
        print(f"Next: resofilter select {args.output} --keep 0.5 --output kept")


def summary(scores: Any) -> str:
    """What a table of scores holds, in a few lines."""
    values = scores.column("score")[scores.scored]
    span = f"{values.min():.6g} to {values.max():.6g}, mean {values.mean():.6g}"
    lines = [f"{len(scores)} rows, {len(values)} scored: {span}"]
    for reason, count in Counter(why for why in scores.reasons if why is not None).most_common(5):
        lines.append(f"  {count} not scored: {reason}")
    limit = scores.provenance.preparation["max_length"]
    if limit is not None and (full := int((scores.column("length") == limit).sum())):
        lines.append(f"  {full} fill max_length {limit}: they are cut there, or exactly as long")
    trust = scores.provenance.trust
    lines.append(f"{'Trust' if trust.trusted else 'Warning'}: {trust}")
    return "\n".join(lines)


def run_select(args: argparse.Namespace) -> None:
    """Decide on scores that were saved, and write the decision and the rows that stay."""
    from .scores import ScoreTable, check_folder
    from .selection import DataSelector

    if args.output is None:
        raise InputError("--output is missing: a folder for the selection and the rows that stay.")
    if Path(args.output).suffix == ".parquet":
        raise InputError(f"--output {args.output} is a folder's place: the selection and the rows go there.")
    check_folder(Path(args.output))
    selector = DataSelector(keep=args.keep, drop=args.drop, threshold=args.threshold, by=args.by)
    scores = ScoreTable.join([ScoreTable.load(path) for path in args.scores])
    dataset = _scored_dataset(args, scores.provenance.source)
    _check_kept_folder(Path(args.output), args.dataset or scores.provenance.source.get("dataset"))
    if args.group_column and (dataset is None or args.group_column not in dataset.column_names):
        raise InputError(f"--group_column {args.group_column}: no such column, or no dataset; pass --dataset.")
    selection = selector.select(scores, groups=dataset[args.group_column][:] if args.group_column else None)
    if not selection.keep.any():
        raise InputError(f"There is no row that stays, of {len(selection)}. Choose another threshold or share.")
    rows = None if dataset is None else selection.apply(dataset)
    if rows is not None:
        _save_dataset(rows, Path(args.output) / "dataset")
    print(f"Selection: {selection.save(args.output)}")
    for reason, count in Counter(selection.reason).most_common(10):
        print(f"  {count:>8} {reason}")
    if rows is None:
        print("The scores name no dataset to filter. In Python: Selection.load(...).apply(dataset).")
    else:
        print(f"Rows that stay: {Path(args.output) / 'dataset'} (datasets.load_from_disk)")


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

    from .cleaned_dataset import described

    if args.mode == "self-evolving":
        summary, reasons = _self_evolve(args, cleaning)
    else:
        from .token_cleaning import clean_dataset

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

    from .self_evolving import self_evolve

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
        from .demo.in_training import run
    else:
        from .demo.run import run
    name = "seed" if args.mode == "two-pass" else args.mode
    run(Path(args.output or f"resofilter-demo/{name}-{args.seed}"), args.seed)


def _require(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing.")


def _rows(args: argparse.Namespace) -> Any:
    from .rows import load_rows

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
        report_to="none",
        **training,
    )


def _scored_dataset(args: argparse.Namespace, source: Any) -> Any:
    """The dataset that was scored: from --dataset, or as the scores remember it; None where they do not."""
    name = args.dataset or source.get("dataset")
    if name is None:
        return None
    from .rows import hash_rows, load_rows

    dataset = load_rows(name, args.split or source.get("split") or "train", source.get("name"))
    if source.get("content") not in (None, hash_rows(dataset)):
        raise InputError(f"'{name}' is not what was scored: rows differ, or their order. Score it again.")
    return dataset


def _check_kept_folder(output: Path, source: str | None) -> None:
    """Raise InputError where the rows that stay would replace anything but those of an earlier selection."""
    folder = output / "dataset"
    ours = (output / "selection.parquet").exists()
    if folder.exists() and (not ours or (source is not None and folder.resolve() == Path(source).resolve())):
        raise InputError(f"'{folder}' holds something that is no earlier selection. Choose another output.")


def _save_dataset(rows: Any, folder: Path) -> None:
    """Write beside the target, then rename: the dataset is whole or as it was."""
    from .scores import replacing

    with replacing(folder) as part:
        rows.save_to_disk(part)
        if folder.exists():
            shutil.rmtree(folder)


def _from(args: argparse.Namespace, kind: type) -> Any:
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def _yaml_arguments(args: argparse.Namespace) -> list[str]:
    """A YAML file's values as they would stand on the command line, to be checked like those."""
    import yaml

    try:
        values = yaml.safe_load(Path(args.config).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {args.config} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise InputError(f"--config {args.config} must hold a mapping, 'name: value' on each line.")
    arguments: list[str] = []
    known = {action.dest for action in args.parser._actions if action.option_strings} - {"help", "config"}
    for name, value in (values or {}).items():
        if name not in known:
            raise InputError(f"--config {args.config}: '{args.command}' has no argument '{name}'.")
        if isinstance(getattr(args, name), bool) and isinstance(value, bool):  # a flag
            arguments += [f"--{name}"] if value else []
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None or getattr(args, name) is not None:
            arguments.append(f"--{name}={'none' if value is None else value}")
    return arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="resofilter", description="Score, select, train.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, add, text in (
        ("demo", run_demo, _demo_arguments, "the whole method in some minutes, on data that it makes"),
        ("score", run_score, _score_arguments, "measure how far each row of a dataset would move W_up"),
        ("select", run_select, _select_arguments, "decide which rows stay, from scores"),
        ("clean", run_clean, _clean_arguments, "mask the tokens that a reference model has nothing to teach about"),
        ("env", run_env, lambda _: None, "print the versions, for a bug report"),
    ):
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run, parser=command)
        command.add_argument("--config", help="a YAML file with any of these arguments")
        add(command)
    return parser


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", help="folder for everything that it leaves; if none, one in resofilter-demo/")
    parser.add_argument("--mode", default="two-pass", help="two-pass: score, select, train; callback: in one run")
    parser.add_argument("--seed", type=int, default=0)


def _row_arguments(parser: argparse.ArgumentParser) -> None:
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


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    _row_arguments(parser)
    parser.add_argument("--output", help="folder for the scores")
    parser.add_argument("--tokens_per_batch", type=int, help="padding included; by default what suits the device")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="auto",
        help="of the forward: float32, bfloat16 (by autocast), or auto: bfloat16 where it is faster and ranks alike",
    )
    measure = parser.add_argument_group("measure")
    defaults = ResonanceConfig()
    measure.add_argument("--n_layers", type=int, default=defaults.n_layers)
    measure.add_argument("--update", default=defaults.update, help=" or ".join(get_args(Update)))
    measure.add_argument("--norm", default=defaults.norm, help=" or ".join(get_args(Norm)))
    measure.add_argument("--lr", type=float, default=defaults.lr)
    measure.add_argument("--eps", type=float, default=defaults.eps)
    measure.add_argument("--weight_decay", type=float, default=defaults.weight_decay)
    measure.add_argument("--up_projection", help="regex over module names, for a model family that is not known")


def _clean_arguments(parser: argparse.ArgumentParser) -> None:
    _row_arguments(parser)
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


def _select_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", nargs="+", help="folders or files of scores; several are parts of one dataset's")
    parser.add_argument("--output", help="folder for the selection and the rows that stay")
    parser.add_argument("--keep", type=float, help="share that stays; half, if there is no threshold")
    parser.add_argument("--drop", default="largest", help="which end goes: largest, smallest or both")
    parser.add_argument("--threshold", type=float, help="an absolute score instead of a share")
    parser.add_argument("--by", default="score", help="the column that is ranked: score, loss, num_tokens, layer_<i>")
    parser.add_argument("--group_column", help="a column of the dataset: the share holds within each of its groups")
    parser.add_argument("--dataset", help="the dataset that was scored, if it moved since")
    parser.add_argument("--split")


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


if __name__ == "__main__":
    main()
