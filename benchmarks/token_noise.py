"""Token cleaning on data whose noisy tokens are known: which tokens it finds, and how good the models are.

    python benchmarks/token_noise.py --seeds 0 1 2 3 4 --json token_noise.json

The rows are the demo's problems with right answers (`token_noise_rows.py`). Half of them have a useless phrase or a
wrong equation in the completion, so that the noisy tokens are known. Models are trained as in the demo and compared on
held-out problems, with answers as long as a noisy row's.

The methods:

- `rho` and `fixed` have a reference model tuned on a warm-up set of *clean* rows with the demo's arguments; none of its
  prompts is trained on or held out. In `fixed_noisy`, the warm-up set is the first fifth of the noisy rows, as in
  self-evolving cleaning; detection is also measured on the other four fifths, which that reference model has not seen.
- `random` keeps 60 % of the tokens at random, `oracle` exactly those that are not noise.
- `self_evolving` trains all weights, one epoch per stage, in order: it sees each row once, the others see it twice. It
  is compared with `full_1_epoch`, all tokens, once, in order; `full_staged` has the schedules of the five stages as
  well (`keep=1`).
- With `--base noisy`, everything starts from the demo's base tuned on as many other noisy rows: a base that knows the
  noise, as one that was pretrained on the web does.
- Tokens with a low score count as detected noise (AUROC); so do, for comparison, those with a high loss of the base
  model or of the reference model alone.
- Intervals are 95 %, by Student's t over the seeds; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from token_cleaning import stub_provenance
from token_noise_rows import CLEAN, EQUATION, FILLER, Marks, add_noise, as_dataset, mark_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from resofilter_trainer.config import TokenCleaning
from resofilter_trainer.data.preparation import PreparedRows, prepare
from resofilter_trainer.data.surveys import ROW_POSITION
from resofilter_trainer.demo.problems import Problem, make_problems
from resofilter_trainer.demo.run import BASE, HELD_OUT, HELD_OUT_SEED, ROWS, training_arguments
from resofilter_trainer.evaluation.generate import exact_match
from resofilter_trainer.scores.statistics import auroc, interval
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.scoring.token_losses import measure_token_losses
from resofilter_trainer.selecting.token_selection import TokenSelection, TokenSelector
from resofilter_trainer.tokens.cleaned_dataset import mask_labels
from resofilter_trainer.tokens.losses import score_tokens
from resofilter_trainer.training.self_evolving import Evolved, self_evolve

KEEP = 0.6
STAGES = 5
WARMUP_SEED = 2_000_000
BASE_SEED = 3_000_000
ANSWER_TOKENS = 120  # a model that was trained on noise may write noise before its answer
COMPARED_WITH = {"self_evolving": "full_1_epoch", "full_staged": "full_1_epoch"}  # the others with `full`


@dataclass(frozen=True)
class Bench:
    """Everything that the trainings of a seed share."""

    rows: Dataset
    prepared: PreparedRows
    marks: Marks
    held_out: list[Problem]
    warmup: Dataset
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    seed: int
    base: str

    def load_base(self) -> PreTrainedModel:
        """The model that everything starts from."""
        with quietly():
            return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def arguments(self, name: str, **changes: Any) -> SFTConfig:
        """The demo's arguments without progress bars, in their own folder, with some changes."""
        args = training_arguments(self.folder / name, self.seed)
        for key, value in {"disable_tqdm": True, **changes}.items():
            setattr(args, key, value)
        return args

    def train(self, rows: Dataset, **changes: Any) -> PreTrainedModel:
        """The base model, fine-tuned on rows as text or as tokens."""
        model = self.load_base()
        with quietly():
            SFTTrainer(model, self.arguments("trained", **changes), train_dataset=rows,
                       processing_class=self.tokenizer).train()  # fmt: skip
        return model

    def evolve(self, keep: float) -> Evolved:
        """Self-evolving cleaning of all rows, one epoch per stage, in order."""
        args = self.arguments(f"evolved-{keep}", num_train_epochs=1, train_sampling_strategy="sequential")
        with quietly():
            return self_evolve(self.base, self.rows, TokenCleaning(keep=keep, parts=STAGES), args)

    def losses(self, model: PreTrainedModel) -> np.ndarray:
        """A model's losses of all learnt tokens, (N,)."""
        budget = TokenCleaning().tokens_per_batch
        return measure_token_losses(model, self.prepared, self.arguments("losses"), budget, "")

    def accuracy(self, model: PreTrainedModel) -> float:
        """Exact match on the held-out problems."""
        prompts, references = [p.prompt for p in self.held_out], [p.completion for p in self.held_out]
        with quietly():
            return exact_match(model, self.tokenizer, prompts, references, ANSWER_TOKENS, batch_size=200)


def main() -> None:
    args = _arguments()
    datasets.disable_progress_bars()
    found = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(run_seed(args, seed, Path(folder)))
        if args.json:  # in case a later seed is interrupted
            args.json.write_text(json.dumps({"noise": found}, indent=2) + "\n")
    report_methods(found)
    report_detection(found)


def run_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """All trainings and the detection on one seed's rows."""
    started, bench = time.perf_counter(), open_bench(args, seed, folder)
    fifth = len(bench.rows) // STAGES
    references = {"warm_up": bench.train(bench.warmup), "noisy_warm_up": bench.train(bench.rows.select(range(fifth)))}
    base = bench.load_base()
    found = {"base": {"accuracy": bench.accuracy(base)}}
    found |= {name: {"accuracy": bench.accuracy(model)} for name, model in references.items()}
    base_losses = bench.losses(base)
    trusted, untrusted = (
        score_tokens(bench.prepared, base_losses, bench.losses(model), stub_provenance(len(bench.rows)))
        for model in references.values()
    )
    selections = select_tokens(trusted, untrusted, bench.marks.of(trusted), seed)
    for name, keep in selections.items():
        rows = mask_labels(bench.prepared.dataset, TokenSelection(trusted, keep))
        once = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"} if name == "full_1_epoch" else {}
        found[name] = outcome(bench, name, rows, bench.train(rows, **once))
    for name, share in ("full_staged", 1.0), ("self_evolving", KEEP):
        evolved = bench.evolve(share)
        found[name] = outcome(bench, name, evolved.dataset, evolved.model)
    detection = detect_all(bench, trusted, untrusted, selections, evolved, fifth)
    seconds = time.perf_counter() - started
    print(f"seed {seed}: {seconds:.0f} s", flush=True)
    return {"seed": seed, "methods": found, "detection": detection, "seconds": seconds}


def open_bench(args: argparse.Namespace, seed: int, folder: Path) -> Bench:
    """A seed's rows, as text and as tokens, with marked noise; no prompt is in two of its sets."""
    count, held_out_count = args.rows or ROWS, args.held_out or HELD_OUT
    problems = make_problems(count, seed=seed)
    seen = {problem.prompt for problem in problems}
    held_out = make_problems(held_out_count, seed=HELD_OUT_SEED + seed, exclude=seen)
    seen |= {problem.prompt for problem in held_out}
    warmup = make_problems(args.warmup_rows, seed=WARMUP_SEED + seed, exclude=seen)
    noisy = add_noise(problems, args.noisy_share, seed)
    rows, tokenizer = as_dataset(noisy), AutoTokenizer.from_pretrained(BASE)
    with quietly():
        training = training_arguments(folder / "prepared", seed)
        prepared = prepare(rows.add_column(ROW_POSITION, np.arange(len(rows))), tokenizer, training)
    marks = mark_tokens(noisy, prepared, tokenizer)
    bench = Bench(rows, prepared, marks, held_out, as_dataset(warmup), tokenizer, folder, seed, str(BASE))
    if args.base == "demo":
        return bench
    seen |= {problem.prompt for problem in warmup}
    more = add_noise(make_problems(count, seed=BASE_SEED + seed, exclude=seen), args.noisy_share, BASE_SEED + seed)
    bench.train(as_dataset(more)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return dataclasses.replace(bench, base=str(folder / "base"))


def select_tokens(trusted: TokenScores, untrusted: TokenScores, kinds: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """(N,) bool each: the tokens that a method keeps, by token scores with a clean and a noisy warm-up set."""
    every, count = np.ones(len(kinds), dtype=bool), int(len(kinds) * KEEP)
    return {
        "full": every,
        "full_1_epoch": every,
        "random": np.random.default_rng(seed).permutation(len(kinds)) < count,
        "rho": TokenSelector(KEEP, "sample").select(trusted).keep,
        "fixed": TokenSelector(KEEP).select(trusted).keep,
        "fixed_noisy": TokenSelector(KEEP).select(untrusted).keep,
        "oracle": kinds == CLEAN,
    }


def outcome(bench: Bench, name: str, rows: Dataset, model: PreTrainedModel) -> dict[str, float]:
    """Held-out accuracy, and the number and noise of the learnt tokens."""
    kinds, accuracy = bench.marks.of_labels(rows), bench.accuracy(model)
    print(f"seed {bench.seed}: {name} {accuracy:.3f}", flush=True)
    return {
        "accuracy": accuracy,
        "rows": len(rows),
        "tokens": len(kinds),
        "noisy_share": float((kinds != CLEAN).mean()),
    }


def detect_all(
    bench: Bench,
    trusted: TokenScores,
    untrusted: TokenScores,
    selections: dict[str, np.ndarray],
    evolved: Evolved,
    fifth: int,
) -> dict[str, dict[str, float]]:
    """How well the scores of fixed-model cleaning and of every stage find the noise."""
    kinds, unseen = bench.marks.of(trusted), np.arange(len(trusted)) >= trusted.offsets[fifth]
    found = {
        "rho": detect(trusted, kinds, selections["rho"]),
        "fixed": detect(trusted, kinds, selections["fixed"]),
        "fixed_noisy": detect(untrusted, kinds, selections["fixed_noisy"]),
        "fixed_noisy, unseen": detect(untrusted, kinds, selections["fixed_noisy"], unseen),
    }
    for number, stage in enumerate(evolved.stages):
        if stage.selection is not None:
            scores = stage.selection.scores
            found[f"stage {number}"] = detect(scores, bench.marks.of(scores), stage.selection.keep)
    return found


def detect(
    scores: TokenScores, kinds: np.ndarray, keep: np.ndarray, among: np.ndarray | None = None
) -> dict[str, float]:
    """AUROC of score and losses for all noise, of the score for each kind of noise, and the share of noise."""
    among = np.ones(len(kinds), dtype=bool) if among is None else among
    base, reference, kinds, keep = scores.base[among], scores.reference_losses[among], kinds[among], keep[among]
    score, noisy = base.astype(np.float64) - reference, kinds != CLEAN
    filler, equation = kinds != EQUATION, kinds != FILLER
    return {
        "score": auroc_or_nan(-score, noisy),
        "base_loss": auroc_or_nan(base, noisy),
        "reference_loss": auroc_or_nan(reference, noisy),
        "score_filler": auroc_or_nan(-score[filler], noisy[filler]),
        "score_equation": auroc_or_nan(-score[equation], noisy[equation]),
        "noisy_share": float(noisy.mean()),
        "noisy_share_kept": float(noisy[keep].mean()),
    }


def auroc_or_nan(values: np.ndarray, positive: np.ndarray) -> float:
    return auroc(values, positive) if 0 < positive.sum() < len(positive) else math.nan


def report_methods(found: Sequence[dict[str, Any]]) -> None:
    accuracies = {name: [each["methods"][name]["accuracy"] for each in found] for name in found[0]["methods"]}
    print(f"\n{'trained on':14}{'accuracy':>16}{'over compared':>17}{'tokens':>9}{'noisy':>8}  by seed")
    for name, values in accuracies.items():
        learnt = [each["methods"][name] for each in found]
        line = f"{name:14}{with_interval(values):>16}"
        if "tokens" in learnt[0]:
            others = accuracies[COMPARED_WITH.get(name, "full")]
            difference = [one - other for one, other in zip(values, others, strict=True)]
            tokens, noisy = (statistics.mean(each[key] for each in learnt) for key in ("tokens", "noisy_share"))
            line += f"{with_interval(difference, '+'):>17}{tokens:9.0f}{noisy:8.1%}"
        else:
            line += " " * 34
        print(line, "", *(f"{value:.3f}" for value in values))
    exceptions = ", ".join(f"{name} with {other}" for name, other in COMPARED_WITH.items())
    print(f"compared with full, but {exceptions}; {len(found)} seeds")


def report_detection(found: Sequence[dict[str, Any]]) -> None:
    columns = list(found[0]["detection"]["fixed"])
    print(f"\n{'AUROC':20}" + "".join(f"{column:>17}" for column in columns))
    for name in found[0]["detection"]:
        cells = [with_interval([each["detection"][name][column] for each in found]) for column in columns]
        print(f"{name:20}" + "".join(f"{cell:>17}" for cell in cells))


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """The mean, and half of its 95 % interval if there is more than one value."""
    mean, _, high = interval(values)
    return f"{mean:{sign}.3f}" if math.isnan(high) else f"{mean:{sign}.3f} +-{high - mean:.3f}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars and the trainers' summaries."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file for the results, written after every seed")
    parser.add_argument("--rows", type=int, help="the number of rows; the demo's by default")
    parser.add_argument("--held_out", type=int, help="the number of held-out problems; the demo's by default")
    parser.add_argument("--warmup_rows", type=int, default=400, help="the number of clean rows in the warm-up set")
    parser.add_argument("--noisy_share", type=float, default=0.5, help="the share of rows with noise")
    parser.add_argument("--base", choices=["demo", "noisy"], default="demo", help="the model to start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    return parser.parse_args()


if __name__ == "__main__":
    main()
