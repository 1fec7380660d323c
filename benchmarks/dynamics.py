"""Does how rows are learnt find wrong rows, and is half of the rows by it worth its cost?

    python benchmarks/dynamics.py --demo --output runs/dynamics-demo
    python benchmarks/dynamics.py --model SmolLM2-135M-Instruct/ --rows noisy --output runs/dynamics
    python benchmarks/dynamics.py --model SmolLM2-135M-Instruct/ --rows noisy --output runs/dynamics \
        --selectors mean_loss loss_slope --seeds 0 1 2

    for each seed: one training on all rows with a ledger -> the AUROC of every criterion for wrong rows
    then by `resofilter compare`: half of the rows by each of `--selectors`, a random half, all rows -> exact match

`--demo` has the demo's problems, 40 % of them wrong, five seeds and halves by every criterion; `--model` trains in
bfloat16 on the rows of `real_models.py`. Both train for three epochs and resume where they were interrupted. An AUROC
above 0.5 means that wrong rows are at the end that goes by default; its 95 % interval is over seeds (Student's t), or
of a single seed over questions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_models_detection import aurocs
from real_models_rows import Rows, data_folder, training_rows
from real_models_training import ANSWER, KEEP, TRAINING

from resofilter_trainer import Ledger, ScoreTable
from resofilter_trainer.compare.cells import Cell, summarise
from resofilter_trainer.compare.config import DEMO, ComparisonConfig, SelectorConfig, slug
from resofilter_trainer.compare.data import make_data
from resofilter_trainer.compare.recorded import TRAINER
from resofilter_trainer.compare.run import run, save_settings
from resofilter_trainer.compare.selector_scores import SelectorScores
from resofilter_trainer.demo.run import HELD_OUT, ROWS, WRONG_SHARE
from resofilter_trainer.ledger.dynamics import RANKED
from resofilter_trainer.scores.statistics import interval
from resofilter_trainer.selecting.results import FULL, RANDOM

SHARED = Path(__file__).resolve().parents[2] / "shared"
CRITERIA = tuple(name for name in RANKED if name != "visits")  # all rows have as many visits
VIEWS = ("plain", "length out")
EPOCHS = 3
Found = dict[str, dict[str, list[float]]]  # by criterion and view: the AUROC and its bounds


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    config = demo_comparison(args) if args.demo else model_comparison(args)
    save_settings(Path(config.output), config)
    seeds = args.seeds if args.demo or args.selectors else args.seeds[:1]
    found, seconds = zip(*(detect(config, seed) for seed in seeds), strict=True)
    print(f"\n{config.model[0]}, AUROC for wrong rows by {len(seeds)} trainings with a ledger, {sum(seconds):.0f} s\n")
    print("\n".join(detection_table(found)), flush=True)
    if args.selectors:
        print("\n".join(["", *training_table(run(config))]))
    print(f"\n{time.perf_counter() - started:.0f} s, without what was done before")


def demo_comparison(args: argparse.Namespace) -> ComparisonConfig:
    """The demo's problems and base model."""
    rows = args.rows_limit or ROWS
    return _comparison(
        args,
        model=DEMO,
        demo={"rows": rows, "wrong_share": WRONG_SHARE, "held_out": min(HELD_OUT, rows)},
        max_new_tokens=56,
        training={"per_device_eval_batch_size": 200},
    )


def model_comparison(args: argparse.Namespace) -> ComparisonConfig:
    """A model on the rows of `real_models.py`, tested on SVAMP."""
    rows = training_rows(data_folder(args.shared))
    return _comparison(
        args,
        model=args.model,
        dataset=_file(args, args.rows, getattr(rows, args.rows)),
        wrong_column="wrong",
        test_dataset=_file(args, "test", rows.test),
        loss_dataset=_file(args, "held_out", rows.held_out),
        max_new_tokens=ANSWER,
        training={**TRAINING, "learning_rate": args.learning_rate, "bf16": True},
    )


def _comparison(args: argparse.Namespace, training: dict[str, Any], **settings: Any) -> ComparisonConfig:
    more = {
        "training": {**training, "num_train_epochs": EPOCHS},
        "selectors": [FULL, RANDOM, *({"dynamics": each} for each in args.selectors)],
    }
    return ComparisonConfig.of({"keep": [KEEP], "seeds": args.seeds, "output": str(args.output), **settings, **more})


def _file(args: argparse.Namespace, name: str, rows: Rows) -> str:
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[: args.rows_limit]))
    return str(path)


def detect(config: ComparisonConfig, seed: int) -> tuple[Found, float]:
    """The AUROCs of all criteria, and the seconds of the training whose ledger they are from."""
    data, model = make_data(config, seed), config.model[0]
    scored = SelectorScores(config, model, seed, data).of(SelectorConfig.of({"dynamics": "mean_loss"}))
    table = scored.table
    assert isinstance(table, ScoreTable)
    assert data.wrong is not None
    columns = {name: table.column(name) * (-1 if table.direction(name) == "smallest" else 1) for name in CRITERIA}
    ledger = Ledger.load(Path(config.output) / "scores" / slug(model) / f"dynamics-seed-{seed}" / TRAINER)
    columns |= first_visits(ledger, np.flatnonzero(table.scored), len(table))
    rows = [{"question": each, "wrong": wrong} for each, wrong in zip(data.rows["prompt"], data.wrong, strict=True)]
    return {name: aurocs(values, rows, table) for name, values in columns.items()}, scored.seconds


def first_visits(ledger: Ledger, trained: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """The loss and the resonance of each row when it was first trained.

    Args:
        ledger: the ledger of a training on some rows.
        trained: the positions of these rows in the dataset.
        rows: the number of rows of the dataset.
    """
    layers = [f"layer_{layer}" for layer in ledger.layers]
    lines = ledger.to_pandas(["epoch", "sample_id", "loss", *layers]).query("epoch == 0")
    found = {}
    for name, values in (("first loss", lines["loss"]), ("first resonance", lines[layers].mean(axis=1))):
        found[name] = np.full(rows, np.nan)
        found[name][trained[lines["sample_id"]]] = values
    return found


def detection_table(found: Sequence[Found]) -> list[str]:
    """A Markdown table, the best detectors first."""
    bounds = {
        name: [each[view] if len(found) == 1 else interval([own[name][view][0] for own in found]) for view in VIEWS]
        for name, each in found[0].items()
    }
    lines = ["| criterion | goes | AUROC | with length out |", "|---|---|---|---|"]
    for name, (plain, out) in sorted(bounds.items(), key=lambda each: -each[1][0][0]):
        end = RANKED[name].drop if name in RANKED else "largest"
        lines.append(f"| {name} | {end} | {_shown(plain)} | {_shown(out)} |")
    return lines


def training_table(cells: Sequence[Cell]) -> list[str]:
    """A Markdown table: means over seeds with 95 % intervals; selecting and training by the cost of all rows."""
    lines = summarise(cells)
    full = next(each["training_flops"] for each in lines if each["selector"] == FULL)
    found = ["| rows | seeds | wrong kept | exact match | over random half | over all rows | cost |", "|---" * 7 + "|"]
    for each in lines:
        failed = f" ({len(each['failures'])} diverged)" if each["failures"] else ""
        match = _shown([each["metric"], each["metric_low"], each["metric_high"]])
        differences = f"{_shown(each['over_random'], '+')} | {_shown(each['over_full'], '+')}"
        flops = each["selection_flops"] + each["training_flops"]
        found.append(
            f"| {each['selector']}{failed} | {each['seeds']} | {each['wrong_kept']:.3f} | {match} | {differences} "
            f"| {flops / full:.2f} |"
        )
    return found


def _shown(bounds: Sequence[float], sign: str = "") -> str:
    shown = [f"{each:{sign}.3f}" for each in bounds]
    if math.isnan(bounds[0]):
        return "-"
    return shown[0] if math.isnan(bounds[1]) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--demo", action="store_true", help="the demo's problems and base model")
    what.add_argument("--model", help="the folder of a model")
    parser.add_argument("--rows", choices=("as_is", "noisy"), default="noisy", help="what a model is trained on")
    parser.add_argument("--selectors", nargs="*", choices=CRITERIA, help="of halves (default: all of --demo)")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 to 4 of --demo, otherwise 0")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of a model")
    parser.add_argument("--rows_limit", type=int, help="only so many rows, to train and to test on")
    parser.add_argument("--output", type=Path, default=Path("dynamics"), help="a folder for everything")
    parser.add_argument("--shared", type=Path, default=SHARED, help="a folder with data/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.selectors = (CRITERIA if args.demo else ()) if args.selectors is None else args.selectors
    args.seeds = args.seeds or (range(5) if args.demo else [0])
    return args


if __name__ == "__main__":
    main()
