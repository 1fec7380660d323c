"""Token cleaning: the cost of selecting at 50 million tokens, and of measuring over two forwards.

    python benchmarks/token_cleaning.py --json token_cleaning.json
    python benchmarks/token_cleaning.py --what select

`--what all`, the default, runs both, each in its own process:

- `select`: `TokenScores.load` and `TokenSelector.select` on random scores, each in a fresh process. On fewer tokens,
  they are compared with the released scripts' sort of Python tuples, whose masks must be the same. The time of the
  tuples starts with lists in memory, ours with the file, which was just written and is therefore in the page cache.
  Peak memory is `ru_maxrss`, which includes mapped pages that were read, and the imports.
- `throughput`: cleaning (both models' losses, scores, selection, masks) over two plain forwards of the same batches
  with the head at the learnt positions and no loss. Medians of alternating rounds; only the ratio is meaningful. The
  model is the 135M Llama shape with random weights, the rows have GSM8K's lengths.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resofilter_trainer.config import TokenCleaning
from resofilter_trainer.scores.provenance import Provenance
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.selecting.token_selection import TokenSelector

if "select" not in sys.argv:  # which needs no model, and whose memory is measured without torch
    import datasets
    import torch
    from datasets import Dataset
    from scoring import GSM8K
    from scoring_samples import build_model, make_samples, prepared_rows
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
    )

    from resofilter_trainer.data.loading import default_arguments
    from resofilter_trainer.data.preparation import PreparedRows
    from resofilter_trainer.model.losses import inputs_of, learnt_logits
    from resofilter_trainer.model.modes import evaluating
    from resofilter_trainer.scoring.batches import collate, split_by_tokens
    from resofilter_trainer.scoring.token_losses import measure_token_losses
    from resofilter_trainer.tokens.cleaned_dataset import mask_labels
    from resofilter_trainer.tokens.losses import score_tokens

KEEP = 0.6
LONGEST_ROW, VOCABULARY = 400, 49152


def main() -> None:
    args = _arguments()
    if args.run:
        print(json.dumps(RUNS[args.run](args)))
        return
    found = {args.what: MEASUREMENTS[args.what](args)} if args.what != "all" else in_turn()
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def in_turn() -> dict[str, Any]:
    """All measurements, each in its own process, which prints its table."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in MEASUREMENTS:
            path = Path(folder) / f"{what}.json"
            command = [sys.executable, *sys.argv, "--what", what, "--json", str(path)]
            if subprocess.run(command, check=False).returncode:
                print(f"'{what}' failed", file=sys.stderr)
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
    print(f"additional memory {memory:.1f}; the masks are {'the same' if same else 'NOT THE SAME'}")
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
    """The selection of the released scripts, which read lists; these are made before the time starts."""
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
    """A hash by which two masks are compared."""
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
    rows = prepared_rows(make_samples(gsm8k, args.samples, models[0].config.vocab_size))
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
    """The 135M shape, or a tiny one to try this script, with the seed's random weights."""
    if tiny:
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    else:
        config = build_model().config
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def clean(models: Sequence[LlamaForCausalLM], rows: PreparedRows) -> Dataset:
    """What `clean_dataset` does with loaded models and rows; returns the rows with masked labels."""
    args = default_arguments()
    args.disable_tqdm = True
    base, reference = (
        measure_token_losses(model, rows, args, TokenCleaning().tokens_per_batch, "") for model in models
    )
    scores = score_tokens(rows, base, reference, stub_provenance(len(rows.lengths)))
    return mask_labels(rows.dataset, TokenSelector(KEEP).select(scores))


def plain_forwards(models: Sequence[LlamaForCausalLM], rows: PreparedRows) -> None:
    """Both models over the same batches, with logits at the learnt positions, which are not used."""
    for model in models:
        with torch.no_grad(), evaluating(model):
            for batch in split_by_tokens(rows.lengths, TokenCleaning().tokens_per_batch):
                learnt_logits(model, inputs_of(model, collate(rows, batch, model.device), causal=False))


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=["all", *MEASUREMENTS], default="all")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="select: the number of tokens")
    parser.add_argument("--tuples", type=int, default=2_000_000, help="select: the number of tokens as Python tuples")
    parser.add_argument("--samples", type=int, default=48, help="throughput: the number of rows")
    parser.add_argument("--rounds", type=int, default=5, help="throughput")
    parser.add_argument("--threads", type=int, default=2, help="throughput")
    parser.add_argument("--gsm8k", type=Path, help="throughput: GSM8K's train.jsonl, for the lengths")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # to try the script
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "select": select,
    "throughput": throughput,
}
RUNS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "make": make_scores,
    "global": run_ours,
    "sample": run_ours,
    "tuples": run_tuples,
}


if __name__ == "__main__":
    main()
