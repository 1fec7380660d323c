"""Token cleaning on data whose noisy tokens are known: what it finds, and what the models are worth.

    python benchmarks/token_noise.py --seeds 0 1 2 3 4 --json token_noise.json

The demo's problems, all right, half of them with a useless phrase or a wrong equation put into the
completion, so that for every token it is known whether it is noise. Trained as in the demo and compared on held-out
problems, whose answers may be as long as a noisy row's.

What is assumed, and what the names mean:

- `rho` and `fixed` have a reference tuned on a warm-up set of *clean* rows, the demo's arguments, none of whose prompts
  is trained on or held out: somebody has such rows. In `fixed_noisy` the warm-up is the first fifth of the noisy rows
  themselves, as self-evolving cleaning has to do; detection is also given on the other four fifths, which that
  reference has not seen.
- `random` keeps 60 % of the tokens at random, `oracle` exactly those that are not noise.
- `self_evolving` trains one epoch per stage, in order, all weights: it sees each row once, the others twice. Its like
  is `full_1_epoch`, all tokens, once, in order; `full_staged` has the five stages' schedules, too (`keep=1`).
- With `--base noisy` everything starts from the demo's base after it was tuned on as many other noisy rows: a base that
  knows the noise, as one that was pretrained on the web does.
- A low score, and beside it a high loss of the base or of the reference alone, is taken for noise (AUROC).
- Intervals are 95 %, by t over the seeds; differences are of the same seed's runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import random
import statistics
import sys
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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from resofilter_trainer.config import TokenCleaning
from resofilter_trainer.data.preparation import ROW, PreparedRows, prepare
from resofilter_trainer.demo.problems import Problem, make_problems
from resofilter_trainer.demo.run import BASE, HELD_OUT, HELD_OUT_SEED, ROWS, training_arguments
from resofilter_trainer.evaluation.generate import exact_match
from resofilter_trainer.model.losses import IGNORE
from resofilter_trainer.scores.statistics import auroc
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.scoring.token_losses import measure_token_losses
from resofilter_trainer.selecting.token_selection import TokenSelection, TokenSelector
from resofilter_trainer.tokens.cleaned_dataset import SAMPLE_ID, mask_labels
from resofilter_trainer.tokens.losses import score_tokens
from resofilter_trainer.training.self_evolving import Evolved, self_evolve

KEEP = 0.6
PARTS = 5
WARMUP_SEED = 2_000_000
BASE_SEED = 3_000_000
ANSWER_TOKENS = 120  # a model that was trained on noise may write some before it answers
CLEAN, FILLER, EQUATION = 0, 1, 2
FILLERS = (
    "Well let me think about this one.",
    "I like numbers a lot.",
    "This is a nice question.",
    "Here we go again.",
    "Hope that helps you.",
    "Let us see what we can do.",
)
LIKE = {"self_evolving": "full_1_epoch", "full_staged": "full_1_epoch"}  # what a method is compared with; else `full`
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds


@dataclass(frozen=True)
class NoisyRow:
    """A right row, or one with noise of a kind at `span`, places in prompt + completion."""

    prompt: str
    completion: str
    kind: int
    span: tuple[int, int]


@dataclass(frozen=True)
class Marks:
    """Of each row's tokens, (T,) each: their ids, and which kind of noise they are, or CLEAN."""

    ids: list[np.ndarray]
    kinds: list[np.ndarray]

    def of(self, scores: TokenScores) -> np.ndarray:
        """(N,) the kinds of the learnt tokens, after a look whether they are the same tokens."""
        spans = zip(scores.sample_id, scores.offsets[:-1], scores.offsets[1:], strict=True)
        places = [(row, scores.position[start:stop]) for row, start, stop in spans]
        if not np.array_equal(np.concatenate([self.ids[row][at] for row, at in places]), scores.token):
            sys.exit("the positions of the token scores are not those of the marks")
        return np.concatenate([self.kinds[row][at] for row, at in places])

    def of_labels(self, rows: Dataset) -> np.ndarray:
        """(M,) the kinds of all tokens that some rows with masked labels learn."""
        pairs = zip(rows[SAMPLE_ID], rows["labels"], strict=True)
        return np.concatenate([self.kinds[row][np.array(labels) != IGNORE] for row, labels in pairs])


@dataclass(frozen=True)
class Bench:
    """All that the trainings of a seed share."""

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
        """The demo's, silent, in a folder of their own, with some changed."""
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
        """Self-evolving cleaning of all rows, an epoch per stage, in order."""
        args = self.arguments(f"evolved-{keep}", num_train_epochs=1, train_sampling_strategy="sequential")
        with quietly():
            return self_evolve(self.base, self.rows, TokenCleaning(keep=keep, parts=PARTS), args)

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
        if args.json:  # what is there, should a later seed be interrupted
            args.json.write_text(json.dumps({"noise": found}, indent=2) + "\n")
    report_methods(found)
    report_detection(found)


def run_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """All trainings and all detection on one seed's rows."""
    started, bench = time.perf_counter(), open_bench(args, seed, folder)
    fifth = len(bench.rows) // PARTS
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
    """A seed's rows, as text and as tokens, with every token marked; no prompt is in two of its sets."""
    count, held_out_count = args.rows or ROWS, args.held_out or HELD_OUT
    problems = make_problems(count, seed=seed)
    seen = {problem.prompt for problem in problems}
    held_out = make_problems(held_out_count, seed=HELD_OUT_SEED + seed, exclude=seen)
    seen |= {problem.prompt for problem in held_out}
    warmup = make_problems(args.warmup_rows, seed=WARMUP_SEED + seed, exclude=seen)
    noisy = add_noise(problems, args.noisy_share, seed)
    rows, tokenizer = as_dataset(noisy), AutoTokenizer.from_pretrained(BASE)
    with quietly():
        prepared = prepare(
            rows.add_column(ROW, np.arange(len(rows))), tokenizer, training_arguments(folder / "prepared", seed)
        )
    marks = mark_tokens(noisy, prepared, tokenizer)
    bench = Bench(rows, prepared, marks, held_out, as_dataset(warmup), tokenizer, folder, seed, str(BASE))
    if args.base == "demo":
        return bench
    seen |= {problem.prompt for problem in warmup}
    more = add_noise(make_problems(count, seed=BASE_SEED + seed, exclude=seen), args.noisy_share, BASE_SEED + seed)
    bench.train(as_dataset(more)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return dataclasses.replace(bench, base=str(folder / "base"))


def as_dataset(rows: Sequence[NoisyRow] | Sequence[Problem]) -> Dataset:
    return Dataset.from_list([{"prompt": row.prompt, "completion": row.completion} for row in rows])


def add_noise(problems: Sequence[Problem], share: float, seed: int) -> list[NoisyRow]:
    """A share of the rows gets noise: a third a filler before the steps, a third after them, a third an equation."""
    rng = random.Random(seed)
    noisy = set(rng.sample(range(len(problems)), round(share * len(problems))))
    return [
        put_noise(problem, rng) if row in noisy else NoisyRow(problem.prompt, problem.completion, CLEAN, (0, 0))
        for row, problem in enumerate(problems)
    ]


def put_noise(problem: Problem, rng: random.Random) -> NoisyRow:
    """Noise before the first step, between two, or after the last; `#### N` stays the end."""
    steps = problem.completion.split(" #### ")[0].split(" ")
    where = rng.choice(("before", "between", "after"))
    step = {"before": 0, "between": rng.randrange(1, len(steps)), "after": len(steps)}[where]
    phrase = wrong_equation(rng) if where == "between" else rng.choice(FILLERS)
    inserted = f" {phrase}" if where == "after" else f"{phrase} "
    start = len(" ".join(steps[:step])) + (where == "between")
    completion = problem.completion[:start] + inserted + problem.completion[start:]
    start += len(problem.prompt)
    kind = EQUATION if where == "between" else FILLER
    return NoisyRow(problem.prompt, completion, kind, (start, start + len(inserted)))


def wrong_equation(rng: random.Random) -> str:
    left, right = rng.randint(2, 99), rng.randint(2, 99)
    result = rng.choice([number for number in range(2, 200) if number != left + right])
    return f"{left}+{right}={result}."


def mark_tokens(rows: Sequence[NoisyRow], prepared: PreparedRows, tokenizer: PreTrainedTokenizerBase) -> Marks:
    """By the places of tokens in the text, once it is sure that these are the tokens that are trained on."""
    encoded = tokenizer([row.prompt + row.completion for row in rows], return_offsets_mapping=True)
    own = [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]
    if prepared.sample_ids.tolist() != list(range(len(rows))) or list(prepared.dataset["input_ids"]) != own:
        sys.exit("rows were left out, or their tokens are not those of the whole text and an end")
    kinds = []
    for row, offsets in zip(rows, encoded["offset_mapping"], strict=True):
        start, stop = np.array([*offsets, (0, 0)]).T  # the end is no text
        kinds.append(np.where((start < row.span[1]) & (stop > row.span[0]), row.kind, CLEAN))
    return Marks([np.array(ids) for ids in own], kinds)


def select_tokens(trusted: TokenScores, untrusted: TokenScores, kinds: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """(N,) bool each: the tokens that a method learns, by scores against a clean and a noisy warm-up."""
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
    """Held-out accuracy, and what was learnt, by the labels that were trained on."""
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
    """How well each reference's scores find the noise, of fixed cleaning and of every stage."""
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
    """AUROC of score and losses for all noise and of the score for each kind, and the share of noise; among some."""
    among = np.ones(len(kinds), dtype=bool) if among is None else among
    base, reference, kinds, keep = scores.base[among], scores.reference[among], kinds[among], keep[among]
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
    print(f"\n{'trained on':14}{'accuracy':>16}{'less its like':>17}{'tokens':>9}{'noisy':>8}  by seed")
    for name, values in accuracies.items():
        learnt = [each["methods"][name] for each in found]
        line = f"{name:14}{with_interval(values):>16}"
        if "tokens" in learnt[0]:
            like = accuracies[LIKE.get(name, "full")]
            difference = [one - other for one, other in zip(values, like, strict=True)]
            tokens, noisy = (statistics.mean(each[key] for each in learnt) for key in ("tokens", "noisy_share"))
            line += f"{with_interval(difference, '+'):>17}{tokens:9.0f}{noisy:8.1%}"
        else:
            line += " " * 34
        print(line, "", *(f"{value:.3f}" for value in values))
    likes = ", ".join(f"{name} with {like}" for name, like in LIKE.items())
    print(f"compared with full, but {likes}; {len(found)} seeds")


def report_detection(found: Sequence[dict[str, Any]]) -> None:
    columns = list(found[0]["detection"]["fixed"])
    print(f"\n{'AUROC':20}" + "".join(f"{column:>17}" for column in columns))
    for name in found[0]["detection"]:
        cells = [with_interval([each["detection"][name][column] for each in found]) for column in columns]
        print(f"{name:20}" + "".join(f"{cell:>17}" for cell in cells))


def with_interval(values: Sequence[float], sign: str = "") -> str:
    """The mean, and half of its 95 % interval where there is more than one value."""
    text = f"{statistics.mean(values):{sign}.3f}"
    if len(values) < 2:
        return text
    return f"{text} +-{T_95.get(len(values), 2.2) * np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars and the trainers' last words."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything here, after every seed")
    parser.add_argument("--rows", type=int, help="rows to train on; the demo's by default")
    parser.add_argument("--held_out", type=int, help="held-out problems; the demo's by default")
    parser.add_argument("--warmup_rows", type=int, default=400, help="clean rows that the reference is tuned on")
    parser.add_argument("--noisy_share", type=float, default=0.5, help="share of the rows that get some")
    parser.add_argument("--base", choices=["demo", "noisy"], default="demo", help="what everything starts from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    return parser.parse_args()


if __name__ == "__main__":
    main()
