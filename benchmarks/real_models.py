"""What helps on real models and real errors, with intervals: detection, the probe, and training.

    python benchmarks/real_models.py --models SmolLM2-135M-Instruct/ gemma-3-270m/ --output real/
    python benchmarks/real_models.py --models my-8b-model/ --output real/ --bf16 --plan

Parts, each of which resumes where it was interrupted:

    detection   which signal finds wrong rows: every signal, layer and eps, as the model comes and after a warm-up
    probe       do a probe's faults order the signals as real errors do, and is its recommendation right?
    training    all rows, half of them by chance, resonance, loss and the probe, and right rows only: as they are, and
                with more wrong rows; exact match on SVAMP, and loss on held-out right rows
    detectors   how good a detector must be for half of the rows to beat all: true labels with noise put in

`--plan` measures the model's tokens a second and says how long each part would take. The data are expected in
`--shared` (GSM8K, LLM-Adapters' labelled solutions, SVAMP; `real_models_data.py` makes it); without them, or without a
model, it says so and goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import probe
import real_models_plan
import torch
from real_models_detection import STATES, detect
from real_models_detection import table as detection_table
from real_models_rows import DATA, data_folder, named, training_rows
from real_models_training import BATCH, Training, lora_of, memory
from real_models_training import table as training_table

from resofilter_trainer.config import InputError
from resofilter_trainer.model.signals import SIGNALS

SHARED = Path(__file__).resolve().parents[2] / "shared"


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    data = data_folder(args.shared)
    failed: list[str] = []
    for model in args.models:
        if not Path(model, "config.json").is_file():
            print(f"skipped: there is no model at '{model}'")
            continue
        if args.plan:
            print("\n".join(real_models_plan.plan(model, data, args)))
            continue
        for part in args.parts:
            try:
                PARTS[part](model, data, args)
            except (InputError, OSError) as error:  # missing data, a damaged model, a warm-up that diverges
                failed.append(f"{part} of {model}")
                print(f"skipped: {part} of {model}: {error}", flush=True)
    if failed:
        sys.exit(f"not done: {', '.join(failed)}")


def detection(model: str, data: Path, args: argparse.Namespace) -> None:
    """A table for each set of rows and each state of the model."""
    for name in args.data:
        for state in args.states:
            settings = {"rows": args.rows, "signals": args.signals, "bf16": args.bf16, "device": _device()}
            found = detect(model, name, state, data, args.output, settings)
            _save(args, f"detection-{named(model)}-{name}-{state.replace(' ', '-')}", found)
            print(f"\n{named(model)} {state}, {found['rows']} rows of {name}, {found['seconds']:.0f} s\n")
            print("\n".join(detection_table(found, shown_layers=3)), flush=True)


def probing(model: str, data: Path, args: argparse.Namespace) -> None:
    """A line for each set of rows, and how each kind of fault orders the signals."""
    for name in args.data:
        folder = args.output / "probes" / f"{named(model)}-{name}"
        found = probe.measure(model, name, DATA[name](data), folder, args)
        _save(args, f"probe-{named(model)}-{name}", found)
        print("\n".join(["", *probe.HEADER, probe.line(found), "", *probe.orders(found)]), flush=True)


def training(model: str, data: Path, args: argparse.Namespace) -> None:
    """The arms on the rows as they are, then on those with more wrong ones."""
    arms = _training(model, data, args)
    for name in args.sets:
        folder = args.output / "probes" / f"{named(model)}-{name}"
        found = probe.measure(model, name, getattr(arms.rows, name), folder, args)
        _save(args, f"probe-{named(model)}-{name}", found)
        print("\n".join(["", *probe.HEADER, probe.line(found)]), flush=True)
        print(f"{name}: the probe took {found['minutes']:.0f} minutes, which no cost below counts")
        if found["signal"] is None:
            print(f"{name}: no arm by the probe, as it recommends not to filter")
        cells = arms.arms(name, None if found["signal"] is None else folder, args.equal_cost)
        _save(args, f"training-{named(model)}-{name}", [cell.to_json() for cell in cells])
        print(f"\n{named(model)}, {name}\n")
        print("\n".join(training_table(cells)), flush=True)


def detectors(model: str, data: Path, args: argparse.Namespace) -> None:
    """The curve, beside all rows and a random half."""
    arms = _training(model, data, args)
    cells = [each for each in arms.arms("noisy") if each.selector in ("full", "random")] + arms.detectors()
    _save(args, f"detectors-{named(model)}", [cell.to_json() for cell in cells])
    print("\n".join(["", *training_table(cells)]), flush=True)


PARTS: dict[str, Callable[[str, Path, argparse.Namespace], None]] = {
    "detection": detection,
    "probe": probing,
    "training": training,
    "detectors": detectors,
}


def _training(model: str, data: Path, args: argparse.Namespace) -> Training:
    settings = {"bf16": args.bf16, "num_train_epochs": args.epochs, **memory(args.batch_size), **_device()}
    if args.attn_implementation:
        settings["model_init_kwargs"] = {"attn_implementation": args.attn_implementation}
    rows = training_rows(data, args.training_rows, args.test_rows)
    return Training(model, rows, args.output, settings, args.seeds, args.learning_rate, lora_of(args.lora_r))


def _device() -> dict[str, Any]:
    return {"use_cpu": not torch.cuda.is_available()}


def _save(args: argparse.Namespace, name: str, found: Any) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of models")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--output", type=Path, default=Path("real"), help="a folder for everything")
    parser.add_argument("--shared", type=Path, default=SHARED, help="a folder with data/")
    parser.add_argument("--data", nargs="+", choices=[*DATA], default=[*DATA], help="rows of detection and probe")
    parser.add_argument("--states", nargs="+", choices=[*STATES], default=[*STATES], help="of detection")
    parser.add_argument("--signals", nargs="+", default=[*SIGNALS], help="those of the one pass by default")
    parser.add_argument("--rows", type=int, default=800, help="rows of detection")
    parser.add_argument("--sets", nargs="+", choices=("as_is", "noisy"), default=("as_is", "noisy"), help="of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of training")
    parser.add_argument("--training_rows", type=int, help="rows to train on, at most; by default all")
    parser.add_argument("--test_rows", type=int, help="SVAMP's problems, and held-out rows, at most; by default all")
    parser.add_argument("--batch_size", type=int, default=BATCH, help=f"rows in memory, of the {BATCH} of a step")
    parser.add_argument("--attn_implementation", help="of training; 'eager' is the fastest for short rows on a CPU")
    parser.add_argument(
        "--lora_r", type=int, help="train LoRA of this rank on all linear layers; by default all weights"
    )
    parser.add_argument("--epochs", type=float, default=1, help="of training")
    parser.add_argument("--learning_rate", type=float, help="of training; by default chosen by the loss on other rows")
    parser.add_argument("--equal_cost", action="store_true", help="train halves at the cost of all rows, too")
    probe.add_probe_arguments(parser)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan", action="store_true", help="only say how long each part would take")
    args = parser.parse_args()
    if BATCH % args.batch_size:
        sys.exit(f"--batch_size {args.batch_size} does not divide the {BATCH} rows of a step")
    return args


if __name__ == "__main__":
    main()
