"""One method of `scoring.py` in its own process: builds the model, warms up, measures the time, prints a line of JSON.

    python benchmarks/scoring_worker.py recorder --shape tiny --samples 6

The time leaves out what is needed once (imports, the model, the first call's allocations); the memory includes it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from scoring import GSM8K, OWN, PEERS, SHAPES
from scoring_samples import (
    BATCH_SIZE,
    PROMPTS,
    Method,
    Sample,
    build_model,
    make_samples,
    peak_memory,
    prepared_rows,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from resofilter_trainer import Recorder, ResonanceConfig, literal
from resofilter_trainer.data.loading import default_arguments
from resofilter_trainer.model.losses import IGNORE, token_losses
from resofilter_trainer.scoring.batches import arrange, default_budget
from resofilter_trainer.scoring.batches import collate as collate_rows
from resofilter_trainer.scoring.dataset import Pass, score_prepared


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    config = ResonanceConfig(eps=args.eps)
    with contextlib.redirect_stdout(sys.stderr):  # only the result goes to stdout
        method = find_method(args.method)
        model = build_model(args.shape)
        samples = PROMPTS[args.prompts](make_samples(args.gsm8k, args.samples, model.config.vocab_size))
        method(model, samples[:BATCH_SIZE], config)
        start = time.perf_counter()
        scores = method(model, samples, config)
        seconds = time.perf_counter() - start
    lengths = [(len(each["labels"]), int((each["labels"][1:] != IGNORE).sum())) for each in samples]
    result = {
        "method": args.method,
        "seconds": seconds,
        "peak_memory": peak_memory(),
        "scores": None if scores is None else scores.tolist(),
        "lengths": lengths,
        "parameters": model.num_parameters(),
        "versions": versions(args.method),
    }
    print(json.dumps(result))


def find_method(name: str) -> Method:
    """One of our methods, or a peer's, which is imported only now."""
    if name in METHODS:
        return METHODS[name]
    import scoring_peers

    return scoring_peers.METHODS[name]


def literal_scores(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    return torch.from_numpy(literal(model, samples, config).score)


def recorder(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    return scored(model, samples, config, autocast=False)


def recorder_bf16(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    return scored(model, samples, config, autocast=True)


def default(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> Tensor:
    """What `score_dataset` does by default, including the rows that are measured again for `Trust`."""
    prepared, args = prepared_rows(samples), default_arguments()
    args.disable_tqdm = True
    return torch.from_numpy(score_prepared(model, prepared, args, config, "auto")[0].score)


def scored(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig, autocast: bool) -> Tensor:
    """The library's own pass, in its own batches."""
    prepared, args = prepared_rows(samples), default_arguments()
    args.disable_tqdm = True
    with Recorder(model, config) as record:
        measured = Pass(record, prepared, args, default_budget(model.device)).measure_all(autocast)
    return torch.from_numpy(measured.score)


def forward(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> None:
    """The cost of a loss alone as it is usually computed, with every logit."""
    with torch.no_grad():
        for batch in library_batches(samples):
            _ = model(**batch).loss


def forward_labelled(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> None:
    """The cost of a loss alone, with the head at learnt positions only."""
    with torch.no_grad():
        for batch in library_batches(samples):
            token_losses(model, batch)


def forward_labelled_bf16(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        forward_labelled(model, samples, config)


def library_batches(samples: Sequence[Sample]) -> list[Sample]:
    """The batches that the library makes."""
    prepared, device = prepared_rows(samples), torch.device("cpu")
    return [collate_rows(prepared, rows, device) for rows, *_ in arrange(prepared, default_budget(device), device)]


METHODS: dict[str, Method] = {
    "literal": literal_scores,
    "recorder": recorder,
    "recorder_bf16": recorder_bf16,
    "forward": forward,
    "forward_labelled": forward_labelled,
    "forward_labelled_bf16": forward_labelled_bf16,
    "default": default,
}


def versions(method: str) -> dict[str, str]:
    """The versions of torch, transformers and the peer."""
    names = ["torch", "transformers"]
    peer = method.removesuffix("_tuned")
    if method in PEERS and peer != "torch_func":
        names.append(peer)
    return {name: importlib.metadata.version(name) for name in names}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=[*OWN, *PEERS])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--prompts", choices=PROMPTS, default="own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gsm8k", type=Path, default=GSM8K)
    parser.add_argument("--eps", type=float, default=1e-8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
