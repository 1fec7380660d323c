"""Random samples as the recorder and the literal procedure take them, and batches of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from resofilter_trainer import Recorder, Resonance, ResonanceConfig
from resofilter_trainer.losses import IGNORE

Sample = dict[str, Tensor]


def make_samples(
    count: int = 8, vocab_size: int = 128, shortest: int = 4, longest: int = 24, seed: int = 0
) -> list[Sample]:
    """Random tokens of random lengths; the first ones, as many as chance says, are a prompt and not learnt."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, length - 2, (), generator=generator))] = IGNORE
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def collate(samples: list[Sample], side: str = "right") -> Sample:
    """Pad to the longest, on one side."""
    shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        span = slice(0, length) if side == "right" else slice(shape[1] - length, None)
        batch["input_ids"][row, span] = sample["input_ids"]
        batch["labels"][row, span] = sample["labels"]
        batch["attention_mask"][row, span] = 1
    return batch


def record_all(
    model: torch.nn.Module, samples: list[Sample], config: ResonanceConfig, size: int = 8, side: str = "right"
) -> Resonance:
    """The recorder over all samples, in batches of `size`."""
    with Recorder(model, config) as record:
        found = [record(collate(samples[i : i + size], side)) for i in range(0, len(samples), size)]
    return Resonance(
        *(np.concatenate([getattr(each, name) for each in found]) for name in ("loss", "num_tokens", "layers"))
    )


def error_over_spread(found: Resonance, truth: Resonance) -> float:
    """The largest error of a score, as a share of the spread of the scores."""
    return float(np.abs(found.score - truth.score).max() / np.ptp(truth.score))
