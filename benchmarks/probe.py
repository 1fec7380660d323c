"""Is a probe's recommendation right? Against real errors whose labels the probe does not see.

    python benchmarks/probe.py --models SmolLM2/ gemma-3/ --data gsm8k math --output probes/ --json probe.json

For each model and data set, `probe_dataset` draws rows and recommends a signal without labels. Then the labels tell how
well each signal finds the rows that are really wrong, among the drawn ones: the recommended signal's AUROC beside the
best signal's, and for each kind of fault whether it orders the signals as the real errors do (Spearman). The data are
those of `real_models_rows.py`. A probe that is there already is read.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from real_models_rows import DATA, Rows, data_folder, named, training_rows
from trl import SFTConfig

from resofilter_trainer import ProbeResult, ScoreTable, probe_dataset
from resofilter_trainer.compare.cost import timed
from resofilter_trainer.model.signals import SIGNALS
from resofilter_trainer.probe.drawing import draw, kinds_of
from resofilter_trainer.probe.measuring import SCORES, SCORES_WARMED
from resofilter_trainer.probe.statistics import length_out
from resofilter_trainer.scores.statistics import auroc, rank_correlation
from resofilter_trainer.selecting.votes import WARMED

ROWS = {
    **DATA,
    "as_is": lambda data: training_rows(data).as_is,
    "noisy": lambda data: training_rows(data).noisy,
}
SHARED = Path(__file__).resolve().parents[2] / "shared"
HEADER = (
    "| model | data | rows | wrong | evidence | recommended | its AUROC | best | its AUROC | regret | minutes |",
    "|---" * 11 + "|",
)


def main() -> None:
    args = _arguments()
    data = data_folder(args.shared)
    torch.set_num_threads(args.threads)
    found = []
    print("\n".join(HEADER))
    for model in args.models:
        for name in args.data:
            folder = args.output / f"{named(model)}-{name}{'' if args.warmup is None else '-warmup'}"
            case = measure(model, name, ROWS[name](data), folder, args)
            found.append(case)
            print(line(case), flush=True)
    for case in found:
        print("\n".join(["", *orders(case)]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def measure(model: str, name: str, rows: Rows, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Probe rows without their labels, and compare what is recommended with what the labels say.

    Args:
        model: the folder of a model.
        name: the name of the rows, for the table.
        rows: the rows, with `wrong`.
        folder: a folder for the probe.
        args: `probe_rows`, `signals`, `no_self_made`, `warmup`, `bf16`.
    """
    wrong = np.array([row["wrong"] for row in rows])
    dataset = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    cpu = not torch.cuda.is_available()
    training = SFTConfig(output_dir="unused", bf16=args.bf16, use_cpu=cpu, report_to="none", max_length=512)

    def probe() -> ProbeResult:
        return probe_dataset(
            model, dataset, args=training, output=folder, rows=args.probe_rows, self_made=not args.no_self_made,
            precision="bfloat16" if args.bf16 else "float32", signals=args.signals, warmup=args.warmup,
        )  # fmt: skip

    result, seconds = timed(folder, probe, resumes=True)
    drawn = draw(dataset, training, args.probe_rows, kinds_of("all", ()), None, None, 0)
    labels = wrong[[each.row for each in drawn.examples]]
    chosen = result.recommendation
    real = _real(folder / SCORES, labels, "")
    without_length = _real(folder / SCORES, labels, "", out=True)
    if args.warmup is not None:
        real |= _real(folder / SCORES_WARMED, labels, WARMED)
        without_length |= _real(folder / SCORES_WARMED, labels, WARMED, out=True)
    best = max(real, key=lambda each: max(real[each], 1 - real[each]))
    its = 0.5 if chosen.name is None else (without_length if chosen.length_out else real)[chosen.name]
    its = its if chosen.drop != "smallest" else 1 - its
    most = max(real[best], 1 - real[best])
    return {
        "model": named(model) + ("" if args.warmup is None else f", warm-up on {args.warmup} of its rows"),
        "data": name,
        "rows": len(labels),
        "wrong": float(labels.mean()),
        "evidence": chosen.evidence,
        "signal": chosen.name,
        "drop": chosen.drop,
        "length_out": chosen.length_out,
        "found": its,
        "best": best if real[best] >= 0.5 else f"-{best}",
        "most": most,
        "regret": most - its,
        "real": real,
        "kinds": _orders(result, real),
        "minutes": seconds / 60,
    }


def line(case: dict[str, Any]) -> str:
    """A case's line of the table."""
    return (
        f"| {case['model']} | {case['data']} | {case['rows']} | {case['wrong']:.0%} | {case['evidence']} | "
        f"{case['drop'] or ''} {case['signal']}{', length out' if case['length_out'] else ''} | {case['found']:.3f} | "
        f"{case['best']} | {case['most']:.3f} | {case['regret']:.3f} | {case['minutes']:.1f} |"
    )


def orders(case: dict[str, Any]) -> list[str]:
    """How far each kind of fault orders the signals as the real errors do."""
    kinds = sorted(case["kinds"].items(), key=lambda each: -each[1])
    return [f"{case['model']}, {case['data']}: " + ", ".join(f"{kind} {value:+.2f}" for kind, value in kinds)]


def _real(folder: Path, labels: np.ndarray, suffix: str, out: bool = False) -> dict[str, float]:
    """The AUROC of each signal for the drawn rows that are really wrong, of those that the model can measure.

    Args:
        folder: the scores.
        labels: (N,) bool, which of the first N rows are wrong.
        suffix: what follows the signals' names.
        out: whether the length is taken out.
    """
    scores = ScoreTable.load(folder)
    names = [each for each in scores.table.column_names if scores.direction(each) is not None]
    measured = scores.scored[: len(labels)]
    columns = {name: scores.column(name)[: len(labels)][measured] for name in [*names, "num_tokens"]}
    if out:
        columns = {name: length_out(values, columns["num_tokens"]) for name, values in columns.items()}
    return {f"{name}{suffix}": auroc(values, labels[measured]) for name, values in columns.items()}


def _orders(result: ProbeResult, real: dict[str, float]) -> dict[str, float]:
    """Spearman's correlation over signals of each kind's AUROCs with those for real errors."""
    found = {}
    for kind in result.ordered_kinds:
        pairs = [  # a record's AUROC is of the end that the signal drops by itself, a real one of the largest values
            (each["auroc"] if each["direction"] == "largest" else 1 - each["auroc"], real[each["signal"]])
            for each in result.signals
            if each["kind"] == kind and each["auroc"] is not None and each["signal"] in real
        ]
        if len(pairs) > 2:
            found[kind] = rank_correlation(*np.array(pairs).T)
    return {kind: value for kind, value in found.items() if not math.isnan(value)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of models")
    parser.add_argument("--data", nargs="+", choices=[*ROWS], default=[*DATA])
    parser.add_argument("--shared", type=Path, default=SHARED, help="a folder with data/")
    parser.add_argument("--output", type=Path, default=Path("probes"), help="a folder for the probes")
    add_probe_arguments(parser)
    parser.add_argument("--signals", nargs="+", default=[*SIGNALS], help="by default those of the one pass")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a probe."""
    parser.add_argument("--probe_rows", type=int, default=400)
    parser.add_argument("--no_self_made", action="store_true")
    parser.add_argument("--warmup", type=int, help="measure again after a warm-up on so many other rows")


if __name__ == "__main__":
    main()
