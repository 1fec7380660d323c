"""What commands make of their arguments: datasets, options, settings. Imports torch only when it is needed."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..config import ColumnMapping, InputError, together


def require(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError for the arguments that are missing."""
    options = {each.dest: each.option_strings for each in args.parser._actions}
    missing = [f"--{name}" if options[name] else name for name in names if getattr(args, name) in (None, [])]
    if missing:
        *first, last = missing
        raise InputError(f"{', '.join(first)} and {last} are missing." if first else f"{last} is missing.")


def settings_of(args: argparse.Namespace, kind: type) -> Any:
    """A dataclass of settings, each from the argument with its name."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def dataset_of(args: argparse.Namespace) -> Any:
    """The dataset that the arguments name."""
    from ..data.files import load_rows

    return load_rows(args.dataset, args.split, args.dataset_config)


def checked_dataset_of(args: argparse.Namespace) -> Any:
    """The dataset that the arguments name, once it is known that the models are there, too.

    Raises:
        InputError: a model, the dataset or one of its columns is missing: all that is missing is told at once. Of a
            dataset on the hub, columns are known when it is there, and it is downloaded last.
    """
    from ..data.files import check_place
    from ..data.models import check_name
    from ..data.reference_model import Reference
    from ..data.usable import check_columns

    training, rows = sft_config(args, bf16=False), []
    models = [each for name in ("model", "writer") if (each := getattr(args, name, None)) is not None]
    reference = getattr(args, "reference", None)

    def read() -> None:
        if not Path(args.dataset).exists():
            return check_place(args.dataset, args.split, args.dataset_config)
        rows.append(dataset_of(args))
        check_columns(rows[0], settings_of(args, ColumnMapping), training)

    checks: list[Callable[[], object]] = [partial(check_name, each, training) for each in models]
    checks += [] if reference is None else [partial(Reference.find, reference, training)]
    together(*checks, read)
    return rows[0] if rows else dataset_of(args)


def warmup_dataset_of(args: argparse.Namespace, split: str = "train") -> Any:
    """The dataset of `--warmup_dataset`, with the configuration of `--dataset` if both are the same; None without."""
    from ..data.files import load_rows

    if args.warmup_dataset is None:
        return None
    return load_rows(args.warmup_dataset, split, args.dataset_config if args.warmup_dataset == args.dataset else None)


def row_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of rows and columns, which `score_dataset` and `clean_dataset` share."""
    return {
        "drop_duplicates": args.drop_duplicates,
        "drop_empty": args.drop_empty,
        "source": {"dataset": args.dataset, "split": args.split, "name": args.dataset_config},
        **dataclasses.asdict(settings_of(args, ColumnMapping)),
    }


def hub_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """The repository to push to and the options of pushing; None where nothing is to be pushed.

    Raises:
        InputError: an argument is missing, or is for pushing, or nothing could be pushed.
    """
    if not args.push_to_hub:
        for name in ("hub_dataset_id", "hub_private_repo", "hub_revision"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} goes with --push_to_hub.")
        return None
    if args.hub_dataset_id is None:
        raise InputError("--push_to_hub needs the name of a repository: pass --hub_dataset_id owner/name.")
    if os.environ.get("RANK", "0") == "0":
        from ..io.hub import check_can_push

        check_can_push(args.hub_dataset_id)
    return {"repo_id": args.hub_dataset_id, "private": args.hub_private_repo, "revision": args.hub_revision}


def sft_config(args: argparse.Namespace, **training: Any) -> Any:
    """TRL's arguments, as far as commands have them; `training` are further fields of SFTConfig."""
    import torch
    from trl import SFTConfig

    from ..config.compatibility import training_arguments

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
        **training_arguments(training),
    )


def scored_dataset(args: argparse.Namespace, source: Any) -> Any:
    """The dataset that was scored, from --dataset or from the scores' own `source`; None if neither names one."""
    name = args.dataset or source.get("dataset")
    if name is None:
        return _joined_dataset(source)
    from ..data.files import is_saved, load_rows, only_split
    from ..scores.shards import difference, span_in

    recorded = source.get("split") or "train"
    own = None if "[" in recorded else only_split(name)  # version 0.1.0 read a single file under any split's name
    config = None if Path(name).is_file() or is_saved(name) else source.get("name")  # which 0.1.0 ignored there
    dataset = load_rows(name, args.split or own or recorded, config)
    span = span_in(source)
    if span is not None and len(dataset) != len(span):  # else it is the shard itself
        dataset = dataset.select(range(span.start, min(span.stop, len(dataset))))
    where = difference(source, dataset)
    if where is not None:
        what = f"'{name}' is not what was scored: its rows or their order differ."
        raise InputError(f"{what}{where or ' Score it again.'}")
    return dataset


def _joined_dataset(source: Any) -> Any:
    """The dataset whose shards were scored apart, read from the places that they name; None where one names none."""
    from ..data.files import load_together
    from ..scores.shards import difference, listed

    shards = listed(source)
    if not shards or any(each.dataset is None for each in shards):
        return None
    dataset = load_together(shards)
    where = difference(source, dataset)
    if where is not None:
        raise InputError(f"The shards are not what was scored.{where or ' Score them again.'}")
    return dataset
