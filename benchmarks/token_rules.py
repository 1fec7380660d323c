"""Token rules on planted tokens: which rule finds them, and which one helps. Where no token is planted: which harms.

    python benchmarks/token_rules.py --models SmolLM2-135M-Instruct/ gemma-3-270m/ --parts detection --output rules/
    python benchmarks/token_rules.py --models SmolLM2-135M-Instruct/ --parts training --output rules/
    python benchmarks/token_rules.py --models demo --kinds demo --rows 2000 --seeds 0 1 2 3 4 --keep 0.6 --output rules/
    python benchmarks/token_rules.py --models SmolLM2-135M-Instruct/ --output rules/ --report

The rows are those of `token_rule_rows.py`; each seed has rows of its own. Parts, each of which resumes:

    detection   scores alone: for each rule the AUROC of planted tokens as those that it drops first, the share of them
                that it masks, of the others, and of the rows' last tokens, by its default bound or the share `--keep`
    training    a comparison of `resofilter compare` for each kind of rows and seed: all tokens, as many random tokens,
                exactly the unplanted ones, each rule; exact match (SVAMP; of the demo its own problems), and the loss
                on clean held-out answers. A cell is saved when it is done

With `--tuned_rows`, the model is tuned on so many clean rows first, once for each seed, so that it knows the format.
Two references are compared with: *trusted* is tuned on clean rows apart from those to train on (`token_cleaning`,
`rho`), *first fifth* on the first fifth of the rows with planted tokens (`sstoken`, whose earlier model is the one that
is trained; by its losses alone it ranks a row's tokens as Token Cleaning with that reference does). `--report` prints
the tables of what is there, also while others are made. Several processes can share the work, each with other seeds or
kinds; they must not share a seed and a kind, nor a seed whose model is not tuned yet. Needs `--shared` (GSM8K, SVAMP),
but for the demo. Intervals are 95 %, by Student's t over the seeds; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from real_models_rows import Rows, data_folder, named
from token_noise import auroc_or_nan, with_interval
from token_rule_detectors import DETECTORS, Detector
from token_rule_rows import KINDS, Sets, Sizes, make_sets
from transformers import AutoConfig, AutoTokenizer

from resofilter_trainer.compare import run as comparison_run
from resofilter_trainer.compare.cells import Cell, summarise
from resofilter_trainer.compare.config import DEMO, ComparisonConfig, SelectorConfig
from resofilter_trainer.compare.data import make_data
from resofilter_trainer.compare.marked import marked_tokens
from resofilter_trainer.compare.method_scores import as_tokens
from resofilter_trainer.compare.selector_scores import SelectorScores
from resofilter_trainer.compare.training import model_path, sft_config, train
from resofilter_trainer.demo.run import TRAINING as OF_DEMO
from resofilter_trainer.io.files import replacing
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.selecting.named_rules import token_rule
from resofilter_trainer.selecting.results import FULL
from resofilter_trainer.selecting.token_rules import TokenInputs
from resofilter_trainer.training.fine_tuning import save_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
SMALL = {  # models of a few hundred million parameters
    "per_device_eval_batch_size": 50,
    "max_length": 512,
    "num_train_epochs": 1,
    "learning_rate": 5e-5,
    "activation_checkpointing": False,
}
STEP = 8  # rows, but of the demo
NEW_TOKENS = {DEMO: 120}  # a model that was trained on noise may write noise before its answer
LONG_ANSWER = 160
UNPLANTED = {"token_rule": "unmarked", "name": "unplanted", "settings": {"spans": "planted"}}
ARMS: dict[str, Any] = {
    "full": "full",
    "random": {"token_rule": "random"},
    "unplanted": UNPLANTED,
    "token_cleaning": {"token_rule": "token_cleaning"},
    "rho": {"token_rule": "rho"},
    "sstoken": {"token_rule": "sstoken", "settings": {"gamma": 0.5}},  # as the paper
    "sstoken_loss": {"token_rule": "sstoken", "name": "token_sstoken_loss"},
    "profit": {"token_rule": "profit"},
    "profit_bound": {"token_rule": "profit", "name": "token_profit_bound", "settings": {"threshold": 0.1}},
    "stm_bound": {"token_rule": "stm", "name": "token_stm_bound", "settings": {"threshold": 2.5}},
    "eaft": {"token_rule": "eaft"},
    "conflict": {"token_rule": "conflict"},
    "all_but_first": {"token_rule": "all_but_first"},
    "self_evolving": "token_self_evolving",
}
USUAL = tuple(name for name in ARMS if name not in ("rho", "sstoken_loss", "all_but_first", "self_evolving"))


class Task:
    """The comparison of one model, kind of rows and seed.

    Args:
        args: the arguments of the command.
        model: the folder of a model, or `demo`.
        kind, seed: the kind of rows, and the seed.
    """

    def __init__(self, args: argparse.Namespace, model: str, kind: str, seed: int) -> None:
        self.args, self.kind, self.seed, self.comes = args, kind, seed, model
        of_model = args.output / short(model)
        self.folder = of_model / kind / f"seed-{seed}"
        self.model = str(of_model / f"tuned-{seed}") if args.tuned_rows else model

    def config(self, arms: Sequence[str]) -> ComparisonConfig:
        """The comparison. Writes the rows first, and tunes the models that it needs unless they are there."""
        self._write()
        comparison_run.save_settings(Path(self.plain.output), self.plain)  # before anything is in the folder
        if self.args.tuned_rows:
            self._tune(self.comes, "tuned", Path(self.model))
        selectors = [SelectorConfig.of(ARMS[name]) for name in arms if name != "unplanted" or self.kind != "clean"]
        by_trusted = {"token_cleaning", "rho"} & {*arms}
        reference = self._tune(self.model, "reference", self.folder / "trusted") if by_trusted else None
        return dataclasses.replace(self.plain, selectors=selectors, reference_model=reference)

    @cached_property
    def plain(self) -> ComparisonConfig:
        """The comparison of training on all tokens alone."""
        return ComparisonConfig.of(
            {
                "selectors": [FULL],
                "model": self.model,
                "keep": [self.args.keep],
                "seeds": [self.seed],
                "max_new_tokens": NEW_TOKENS.get(self.model, LONG_ANSWER),
                "training": self.training,
                "output": str(self.folder / "comparison"),
                **{key: str(self.folder / f"{name}.jsonl") for key, name in FILES.items()},
            }
        )

    @property
    def training(self) -> dict[str, Any]:
        """The fields of SFTConfig."""
        defaults = dict(OF_DEMO) if self.model == DEMO else SMALL
        own = {"num_train_epochs": self.args.epochs, "learning_rate": self.args.learning_rate, "bf16": self.args.bf16}
        if self.model != DEMO:
            batch = self.args.batch_size
            own |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": STEP // batch}
            if self.args.attn_implementation:
                own["model_init_kwargs"] = {"attn_implementation": self.args.attn_implementation}
        return {**defaults, **{name: value for name, value in own.items() if value is not None}}

    def _write(self) -> None:
        args = self.args
        sizes = Sizes(args.rows, args.reference_rows, args.loss_rows, args.test_rows, args.tuned_rows)
        settings = self.folder / "settings.json"
        if settings.exists():
            if Sizes(**(there := json.loads(settings.read_text()))) != sizes:
                sys.exit(f"'{self.folder}' has other numbers of rows, {there}: choose another output")
            return
        sets: Sets = make_sets(self.kind, self.seed, sizes, args.shared / "data")
        self.folder.mkdir(parents=True, exist_ok=True)
        for field in dataclasses.fields(sets):
            rows: Rows = getattr(sets, field.name)
            (self.folder / f"{field.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save(settings, dataclasses.asdict(sizes))

    def _tune(self, model: str, rows: str, folder: Path) -> str:
        """The folder of a model that was tuned on some clean rows, once."""
        path, done = self.folder / f"{rows}.jsonl", folder / "done"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if done.exists() and done.read_text() not in ("", digest):  # these may be the rows that another task trains on
            sys.exit(f"'{folder}' was tuned on other rows: choose another output")
        if not done.exists():
            found = datasets.Dataset.from_json(str(path))
            arguments = sft_config(self.plain, model, self.seed)
            tuned = train(model, found.select_columns(["prompt", "completion"]), None, arguments)
            save_model(tuned.model, tuned.tokenizer, folder)
            done.write_text(digest)
        return str(folder)

    def detect(self) -> dict[str, Any]:
        """The numbers of each detector."""
        for path in self.results:
            if path.exists():
                return dict(json.loads(path.read_text()))
        started = time.perf_counter()
        arms = ["eaft"] if self.args.alone else ["eaft", "token_cleaning", "sstoken"]
        config = self.config(arms)
        data = make_data(config, self.seed)
        scores = SelectorScores(config, self.model, self.seed, data)
        of_arms = {each: SelectorConfig.of(ARMS[each]) for each in arms}
        tables = {name: cast(TokenScores, scores.of(each).table) for name, each in of_arms.items()}
        tokenizer = AutoTokenizer.from_pretrained(model_path(self.model))
        prepared = as_tokens(data.rows, tokenizer, sft_config(config, self.model, self.seed))
        planted = marked_tokens(data.rows, prepared, tokenizer, "planted")
        found = {
            name: self._measured(each, tables[each.selector], planted)
            for name, each in DETECTORS.items()
            if each.selector in tables
        }
        seconds = time.perf_counter() - started
        result = {"tokens": len(planted), "planted": float(planted.mean()), "seconds": seconds, "detectors": found}
        result["losses"] = losses_of(tables["eaft"])
        save(path, result)
        return result

    @property
    def results(self) -> list[Path]:
        """The files that may have the numbers: of all rules and, with `--alone`, of those that need no other model."""
        names = ["", *(["-alone"] if self.args.alone else [])]
        return [self.folder / f"detection-{self.args.keep:g}{name}.json" for name in names]

    def _measured(self, detector: Detector, scores: TokenScores, planted: np.ndarray) -> dict[str, float]:
        inputs = TokenInputs.of(scores, AutoConfig.from_pretrained(model_path(self.model)).vocab_size)
        found = {"auroc": auroc_or_nan(np.asarray(detector.value(inputs), dtype=np.float64), planted)}
        if detector.rule is None:
            return found
        name, settings = detector.rule
        weights = token_rule(name, **settings, **({"keep": self.args.keep} if detector.share else {})).weights(inputs)
        off = 1 - weights.astype(np.float64)
        ends = scores.offsets[1:] - 1  # of a row that is not cut off, the end token
        means = {"off": off, "planted_off": off[planted], "others_off": off[~planted], "ends_off": off[ends]}
        return {
            **found,
            **{key: float(values.mean()) if len(values) else float("nan") for key, values in means.items()},
        }


def losses_of(scores: TokenScores) -> dict[str, float]:
    """The mean loss, before any training, of all learnt tokens, of the rows' first ones, and of their last ones."""
    losses, offsets = scores.base, scores.offsets
    parts = {"all": losses, "first": losses[offsets[:-1]], "last": losses[offsets[1:] - 1]}
    return {name: float(part.mean()) for name, part in parts.items()}


def short(model: str) -> str:
    """A model's name in those of folders."""
    return model if model == DEMO else named(model)


FILES = {"dataset": "train", "test_dataset": "test", "loss_dataset": "held_out"}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    for model in args.models:
        if model != DEMO and not Path(model, "config.json").is_file():
            print(f"skipped: there is no model at '{model}'")
            continue
        for part in args.parts:
            tasks = [Task(args, model, kind, seed) for seed in args.seeds for kind in args.kinds]
            if not args.report:
                for task in tasks:
                    begin = time.perf_counter()
                    WORK[part](task)
                    seconds = time.perf_counter() - begin
                    print(f"{part} {short(model)} {task.kind} seed {task.seed}: {seconds:.0f} s", flush=True)
            print(f"\n## {part}, {short(model)}\n\n" + "\n".join(REPORTS[part](tasks)), flush=True)


def training(task: Task) -> None:
    """Every arm of the comparison that is not there yet."""
    comparison_run.run(task.config(task.args.arms))


def detection_report(tasks: Sequence[Task]) -> list[str]:
    """A table for each kind of rows with planted tokens."""
    lines = []
    for kind in dict.fromkeys(task.kind for task in tasks):
        done = [task for task in tasks if task.kind == kind and any(path.exists() for path in task.results)]
        found = [task.detect() for task in done]
        if not found:
            continue
        share = statistics.mean(each["planted"] for each in found)
        lines += [f"{kind}: {len(found)} seeds, {found[0]['tokens']} tokens, {share:.1%} planted", ""]
        for part in ("all", "first", "last"):
            losses = [each["losses"][part] for each in found if "losses" in each]
            lines += [f"mean loss of {part} tokens, before any training: {with_interval(losses)}", ""] if losses else []
        lines += ["| rule | AUROC | masked | of the planted | of the others | of the rows' ends |", "|---" * 6 + "|"]
        for name in found[0]["detectors"]:
            cells = [each["detectors"][name] for each in found]
            keys = ("auroc", "off", "planted_off", "others_off", "ends_off")
            values = [[each[key] for each in cells if key in each] for key in keys]
            shown = [with_interval(each) if each else "" for each in values]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def training_report(tasks: Sequence[Task]) -> list[str]:
    """A table for each kind of rows: exact match and loss, and both minus those of random tokens and of all tokens."""
    lines = []
    for kind in dict.fromkeys(task.kind for task in tasks):
        cells = [
            dataclasses.replace(cell, model=task.comes)  # which each seed tunes for itself
            for task in tasks
            if task.kind == kind
            for path in sorted(task.folder.glob("comparison/cells/*/*.json"))
            if (cell := comparison_run.read_cell(path, {})).keep in (1.0, task.args.keep)
        ]
        if cells:
            lines += [kind, "", *_table(cells), ""]
    return lines


def _table(cells: Sequence[Cell]) -> list[str]:
    of = {(cell.selector, cell.seed): cell for cell in cells}
    lines = [
        "| trained on | seeds | tokens | exact match | over all tokens | over random tokens | loss | over all tokens "
        "| seconds |",
        "|---" * 9 + "|",
    ]
    for each in summarise(cells):
        own = [cell for cell in cells if cell.selector == each["selector"] and cell.metric is not None]
        failed = f" ({len(each['failures'])} diverged)" if each["failures"] else ""
        columns = [
            with_interval([cell.metric for cell in own if cell.metric is not None]),
            _difference(own, of, FULL, "metric"),
            _difference(own, of, "token_random", "metric"),
            with_interval([cell.held_out_loss for cell in own if cell.held_out_loss is not None]),
            _difference(own, of, FULL, "held_out_loss"),
            f"{each['training_seconds']:.0f}",
        ]
        lines.append(f"| {each['selector']}{failed} | {len(own)} | {each['sdf']:.0%} | {' | '.join(columns)} |")
    return lines


def _difference(own: Sequence[Cell], of: dict[tuple[str, int], Cell], other: str, field: str) -> str:
    """The mean of a number minus the other arm's of the same seed, with its interval."""
    pairs = [(getattr(cell, field), getattr(of.get((other, cell.seed)), field, None)) for cell in own]
    known = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return with_interval(known, "+") if known and own[0].selector != other else ""


def save(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of models; or demo")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["fillers", "numbers", "clean"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(USUAL))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=240, help="rows to train on")
    parser.add_argument(
        "--reference_rows", type=int, default=96, help="clean rows that the trusted reference is tuned on"
    )
    parser.add_argument("--tuned_rows", type=int, default=0, help="clean rows that the model is tuned on first")
    parser.add_argument("--loss_rows", type=int, default=64)
    parser.add_argument("--test_rows", type=int, default=100)
    parser.add_argument("--keep", type=float, default=0.8, help="the share of the tokens of rules with a share")
    parser.add_argument("--epochs", type=float, help="by default 1; of the demo its own 2")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--alone", action="store_true", help="detection: without the rules that need another model")
    parser.add_argument("--batch_size", type=int, default=STEP, help=f"rows in memory, of the {STEP} of a step")
    parser.add_argument("--bf16", action="store_true", default=None)
    parser.add_argument("--attn_implementation", help="'eager' is the fastest for short rows on a CPU")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print the tables of what is there")
    args = parser.parse_args()
    if STEP % args.batch_size:
        sys.exit(f"--batch_size {args.batch_size} does not divide the {STEP} rows of a step")
    if args.tuned_rows and "demo" in args.kinds:
        sys.exit("the demo's rows have none to tune on first: leave --tuned_rows out")
    if not args.report and set(args.kinds) != {DEMO}:
        data_folder(args.shared)
    return args


WORK: dict[str, Callable[[Task], Any]] = {"detection": Task.detect, "training": training}
REPORTS = {"detection": detection_report, "training": training_report}


if __name__ == "__main__":
    main()
