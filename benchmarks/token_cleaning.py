"""Token cleaning: what selecting costs at 50 million tokens, what measuring costs over two forwards, what it finds.

    python benchmarks/token_cleaning.py --json token_cleaning.json
    python benchmarks/token_cleaning.py --what noise --seeds 0 1 2 3 4

`--what all`, the default, runs the three one after another, each in a process of its own:

- `select`: `TokenScores.load` and `TokenSelector.select` on random scores, each in a fresh process; beside it, on fewer
  tokens, the sort of Python tuples of the released scripts, whose masks must be the same. The tuples' clock starts with
  lists in memory, ours with the file; the files were just written, so no disk is waited for. Peak memory is
  `ru_maxrss`: it counts what is mapped and looked at, and what the imports took before.
- `throughput`: cleaning (both models' losses, scores, selection, masks) over two plain forwards of the same batches
  with the head at the learnt positions and no loss. Alternating rounds, medians: only the ratio means anything. The
  model is the 135M Llama shape with random weights, the rows have GSM8K's lengths.
- `noise`: the demo's problems, all right, half of them with a useless phrase or a wrong equation put into the
  completion, so that for every token it is known whether it is noise. Trained as in the demo and compared on held-out
  problems, whose answers may be as long as a noisy row's.

What `noise` assumes, and what its names mean:

- `rho` and `fixed` have a reference tuned on a warm-up set of *clean* rows, the demo's arguments, none of whose prompts
  is trained on or held out: somebody has such rows. In `fixed_noisy` the warm-up is the first fifth of the noisy rows
  themselves, as self-evolving cleaning has to do; detection is also given on the other four fifths, which that
  reference has not seen.
- `random` keeps 60 % of the tokens at random, `oracle` exactly those that are not noise.
- `self_evolving` trains one epoch per stage, in order, all weights: it sees each row once, the others twice. Its like
  is `full_1_epoch`, all tokens, once, in order; `full_staged` has the five stages' schedules, too (`keep=1`).
- A low score, and beside it a high loss of the base or of the reference alone, is taken for noise (AUROC).
- Intervals are 95 %, by t over the seeds; differences are of the same seed's runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resofilter_trainer.comparison import auroc
from resofilter_trainer.config import TokenCleaning
from resofilter_trainer.scores import Provenance
from resofilter_trainer.token_scores import TokenScores
from resofilter_trainer.token_selection import TokenSelection, TokenSelector

if "select" not in sys.argv:  # which needs no model, and is not measured with torch in memory
    import datasets
    import torch
    from datasets import Dataset
    from scoring import GSM8K, build_model, make_samples
    from torch import Tensor, nn
    from torch.nn import functional as F
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from resofilter_trainer.cleaned_dataset import SAMPLE_ID, mask_labels
    from resofilter_trainer.demo.problems import Problem, make_problems
    from resofilter_trainer.demo.run import BASE, HELD_OUT, HELD_OUT_SEED, ROWS, training_arguments
    from resofilter_trainer.evaluation import exact_match
    from resofilter_trainer.loading import default_arguments
    from resofilter_trainer.loss_pass import measure_token_losses, split_by_tokens
    from resofilter_trainer.losses import IGNORE, _head_only_at, learnt_positions
    from resofilter_trainer.modes import evaluating
    from resofilter_trainer.preparation import ROW, PreparedRows, prepare, prepared_already
    from resofilter_trainer.self_evolving import Evolved, self_evolve
    from resofilter_trainer.token_cleaning import score_tokens

KEEP = 0.6
LONGEST_ROW, VOCABULARY = 400, 49152
PARTS = 5
WARMUP_SEED = 2_000_000
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


def main() -> None:
    args = _arguments()
    if args.run:
        print(json.dumps(RUNS[args.run](args)))
        return
    found = {args.what: MEASUREMENTS[args.what](args)} if args.what != "all" else in_turn()
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def in_turn() -> dict[str, Any]:
    """All measurements, each in a process of its own; they print their tables themselves."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in MEASUREMENTS:
            path = Path(folder) / f"{what}.json"
            command = [sys.executable, *sys.argv, "--what", what, "--json", str(path)]
            if subprocess.run(command, check=False).returncode:
                print(f"'{what}' did not end well", file=sys.stderr)
            found |= json.loads(path.read_text()) if path.exists() else {}
            print()
    return found


def stub_provenance(rows: int) -> Provenance:
    return Provenance("", "", "", "", "", rows, config={}, preparation={}, versions={})


# select


def select(args: argparse.Namespace) -> dict[str, Any]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens, runs in (args.tokens, ("global", "sample")), (args.tuples, ("global", "sample", "tuples")):
            path = Path(folder) / f"{tokens}.arrow"
            in_a_process("make", tokens, path)
            found += [{"what": run, "tokens": tokens, **in_a_process(run, tokens, path)} for run in runs]
            path.unlink()
    ours, tuples = found[2], found[4]
    same = ours.pop("mask") == tuples.pop("mask")
    print(f"{'':8} {'tokens':>12} {'seconds':>8} {'peak MB':>8} {'before':>8}")
    for each in found:
        print(f"{each['what']:8} {each['tokens']:12,} {each['seconds']:8.2f} ", end="")
        print(f"{each['peak_mb']:8.0f} {each['before_mb']:8.0f}")
    memory = (tuples["peak_mb"] - tuples["before_mb"]) / max(ours["peak_mb"] - ours["before_mb"], 1e-9)
    print(f"tuples over global, {args.tuples:,} tokens: time {tuples['seconds'] / ours['seconds']:.1f}, ", end="")
    print(f"memory above what was there before {memory:.1f}; the masks are {'the same' if same else 'NOT THE SAME'}")
    return {"runs": found, "masks_equal": same}


def in_a_process(run: str, tokens: int, path: Path) -> dict[str, Any]:
    own = ["--what", "select", "--run", run, "--tokens", str(tokens), "--file", str(path)]
    done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make_scores(args: argparse.Namespace) -> dict[str, Any]:
    """Write `--tokens` random scores, in rows of 1 to 400, to `--file`."""
    rng, count = np.random.default_rng(0), args.tokens
    ends = np.cumsum(rng.integers(1, LONGEST_ROW + 1, count // (LONGEST_ROW // 4) + 10))
    offsets = np.concatenate([[0], ends[ends < count], [count]])
    rows = len(offsets) - 1
    scores = TokenScores(
        sample_id=np.arange(rows),
        offsets=offsets,
        position=np.arange(count, dtype=np.int32) - np.repeat(offsets[:-1].astype(np.int32), np.diff(offsets)),
        token=rng.integers(0, VOCABULARY, count, dtype=np.int32),
        base=rng.standard_exponential(count, dtype=np.float32),
        reference=rng.standard_exponential(count, dtype=np.float32),
        provenance=stub_provenance(rows),
    )
    scores.save(args.file)
    return {}


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    before, start = peak_mb(), time.perf_counter()
    selection = TokenSelector(KEEP, args.run).select(TokenScores.load(args.file))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "before_mb": before, "peak_mb": peak_mb(), **digest(args, selection.keep)}


def run_tuples(args: argparse.Namespace) -> dict[str, Any]:
    """As the released scripts do it; they read lists, which are made here before the clock starts."""
    before, scores = peak_mb(), TokenScores.load(args.file)
    rows = [scores.of_row(row).tolist() for row in range(len(scores.sample_id))]
    start = time.perf_counter()
    tuples = [(score, i, j) for i, row in enumerate(rows) for j, score in enumerate(row)]
    tuples.sort(key=lambda each: each[0], reverse=True)
    masks = [[False] * len(row) for row in rows]
    for _, i, j in tuples[: int(len(tuples) * KEEP)]:
        masks[i][j] = True
    seconds, peak = time.perf_counter() - start, peak_mb()
    keep = np.concatenate([np.array(mask) for mask in masks])
    return {"seconds": seconds, "before_mb": before, "peak_mb": peak, **digest(args, keep)}


def digest(args: argparse.Namespace, keep: np.ndarray) -> dict[str, str]:
    """What two masks are compared by."""
    return {} if args.run == "sample" else {"mask": hashlib.sha256(np.packbits(keep).data).hexdigest()}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# throughput


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    gsm8k = args.gsm8k or GSM8K
    if not gsm8k.exists():
        sys.exit(f"skipped: there is no GSM8K at '{gsm8k}' to take the lengths from; pass --gsm8k train.jsonl")
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    models = [build(seed, args.tiny) for seed in (0, 1)]
    rows = prepared_rows(gsm8k, args.samples, models[0].config.vocab_size)
    few = rows.select(np.arange(min(2, args.samples)))
    methods: dict[str, Callable[[PreparedRows], object]] = {
        "cleaning": lambda rows: clean(models, rows),
        "forwards": lambda rows: plain_forwards(models, rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method(few)
    for round_ in range(args.rounds):
        for name in list(methods)[:: 1 if round_ % 2 == 0 else -1]:
            start = time.perf_counter()
            methods[name](rows)
            seconds[name].append(time.perf_counter() - start)
    return report_throughput(seconds, rows, models[0].num_parameters())


def build(seed: int, tiny: bool) -> LlamaForCausalLM:
    """The 135M shape, or one that is good for nothing but trying this script, with this seed's random weights."""
    if tiny:
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    else:
        config = build_model().config
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def prepared_rows(gsm8k: Path, count: int, vocab_size: int) -> PreparedRows:
    samples = make_samples(gsm8k, count, vocab_size)
    rows = [{name: tensor.tolist() for name, tensor in sample.items()} for sample in samples]
    return prepared_already(Dataset.from_list(rows), DataCollatorForLanguageModeling(pad_token_id=0))


def clean(models: Sequence[LlamaForCausalLM], rows: PreparedRows) -> Dataset:
    """What `clean_dataset` does with models and rows that are there; returns the rows with masked labels."""
    args = default_arguments()
    args.disable_tqdm = True
    base, reference = (
        measure_token_losses(model, rows, args, TokenCleaning().tokens_per_batch, "") for model in models
    )
    scores = score_tokens(rows, base, reference, stub_provenance(len(rows.lengths)))
    return mask_labels(rows.dataset, TokenSelector(KEEP).select(scores))


def plain_forwards(models: Sequence[LlamaForCausalLM], rows: PreparedRows) -> None:
    """Both models over the same batches, logits at the learnt positions, thrown away."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    for model in models:
        with torch.no_grad(), evaluating(model):
            for batch in split_by_tokens(rows.lengths, TokenCleaning().tokens_per_batch):
                forward(model, collate([rows.dataset[int(row)] for row in batch]))


def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    labels = batch["labels"]
    index = F.pad(learnt_positions(labels), (0, 1)).flatten().nonzero()[:, 0]
    with _head_only_at(index, labels.numel(), model):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def report_throughput(seconds: dict[str, list[float]], rows: PreparedRows, parameters: int) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    share = medians["forwards"] / medians["cleaning"]
    tokens, learnt = int(rows.lengths.sum()), int(rows.num_tokens.sum())
    print(f"{parameters / 1e6:.1f}M parameters, {len(rows.lengths)} rows, {tokens} tokens, {learnt} of them learnt")
    for name, value in medians.items():
        print(f"{name:10} {value:8.3f} s (median), {tokens / value:8.0f} tokens a second")
    rounds = [b / a for a, b in zip(seconds["cleaning"], seconds["forwards"], strict=True)]
    print(f"throughput over that of two forwards {share:.3f}, of the rounds {', '.join(f'{r:.3f}' for r in rounds)}")
    return {"seconds": seconds, "medians": medians, "share": share, "tokens": tokens, "learnt": learnt}


# noise


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

    def arguments(self, name: str, **changes: Any) -> SFTConfig:
        """The demo's, silent, in a folder of their own, with some changed."""
        args = training_arguments(self.folder / name, self.seed)
        for key, value in {"disable_tqdm": True, **changes}.items():
            setattr(args, key, value)
        return args

    def train(self, rows: Dataset, **changes: Any) -> PreTrainedModel:
        """The base model, fine-tuned on rows as text or as tokens."""
        model = load_base()
        with quietly():
            SFTTrainer(model, self.arguments("trained", **changes), train_dataset=rows,
                       processing_class=self.tokenizer).train()  # fmt: skip
        return model

    def evolve(self, keep: float) -> Evolved:
        """Self-evolving cleaning of all rows, an epoch per stage, in order."""
        args = self.arguments(f"evolved-{keep}", num_train_epochs=1, train_sampling_strategy="sequential")
        with quietly():
            return self_evolve(str(BASE), self.rows, TokenCleaning(keep=keep, parts=PARTS), args)

    def losses(self, model: PreTrainedModel) -> np.ndarray:
        """A model's losses of all learnt tokens, (N,)."""
        budget = TokenCleaning().tokens_per_batch
        return measure_token_losses(model, self.prepared, self.arguments("losses"), budget, "")

    def accuracy(self, model: PreTrainedModel) -> float:
        """Exact match on the held-out problems."""
        prompts, references = [p.prompt for p in self.held_out], [p.completion for p in self.held_out]
        with quietly():
            return exact_match(model, self.tokenizer, prompts, references, ANSWER_TOKENS, batch_size=200)


def noise(args: argparse.Namespace) -> list[dict[str, Any]]:
    datasets.disable_progress_bars()
    found = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found.append(noise_of_seed(args, seed, Path(folder)))
        if args.json:  # what is there, should a later seed be interrupted
            args.json.write_text(json.dumps({"noise": found}, indent=2) + "\n")
    report_methods(found)
    report_detection(found)
    return found


def noise_of_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """All trainings and all detection on one seed's rows."""
    started, bench = time.perf_counter(), open_bench(args, seed, folder)
    fifth = len(bench.rows) // PARTS
    references = {"warm_up": bench.train(bench.warmup), "noisy_warm_up": bench.train(bench.rows.select(range(fifth)))}
    base = load_base()
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
    return Bench(rows, prepared, marks, held_out, as_dataset(warmup), tokenizer, folder, seed)


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


def load_base() -> PreTrainedModel:
    with quietly():
        return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


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
    parser.add_argument("--what", choices=["all", *MEASUREMENTS], default="all")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="select: how many")
    parser.add_argument("--tuples", type=int, default=2_000_000, help="select: how many also as Python tuples")
    parser.add_argument("--samples", type=int, default=48, help="throughput: rows")
    parser.add_argument("--rounds", type=int, default=5, help="throughput")
    parser.add_argument("--threads", type=int, default=2, help="throughput; the others follow OMP_NUM_THREADS")
    parser.add_argument("--gsm8k", type=Path, help="throughput: GSM8K's train.jsonl, for the lengths")
    parser.add_argument("--rows", type=int, help="noise: rows to train on; the demo's by default")
    parser.add_argument("--held_out", type=int, help="noise: held-out problems; the demo's by default")
    parser.add_argument("--warmup_rows", type=int, default=400, help="noise: clean rows that the reference is tuned on")
    parser.add_argument("--noisy_share", type=float, default=0.5, help="noise: share of the rows that get some")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="noise")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # throughput of a toy, to try the script
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "select": select,
    "throughput": throughput,
    "noise": noise,
}
RUNS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "make": make_scores,
    "global": run_ours,
    "sample": run_ours,
    "tuples": run_tuples,
}


if __name__ == "__main__":
    main()
