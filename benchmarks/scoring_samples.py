"""The model and the samples of the scoring benchmarks, and the batches that the methods share. Knows no method."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from scoring import SHAPES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from resofilter_trainer import ResonanceConfig
from resofilter_trainer.data.preparation import PreparedRows, prepared_already
from resofilter_trainer.model.losses import IGNORE

CHARACTERS_PER_TOKEN = 3  # roughly that of a large vocabulary on GSM8K, with single digits
BATCH_SIZE = 4

Sample = dict[str, Tensor]
Method = Callable[[LlamaForCausalLM, Sequence[Sample], ResonanceConfig], "Tensor | None"]


def build_model(shape: str = "135m") -> LlamaForCausalLM:
    """A Llama in float32 with random weights, which are always the same."""
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_samples(gsm8k: Path, count: int, vocab_size: int) -> list[Sample]:
    """Random tokens, as long as GSM8K's rows: the question is not learnt, the answer is."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for line in gsm8k.read_text().splitlines()[:count]:
        row = json.loads(line)
        prompt, answer = (len(row[name]) // CHARACTERS_PER_TOKEN for name in ("question", "answer"))
        ids = torch.randint(10, vocab_size, (prompt + answer,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = IGNORE
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def with_repeated_prompts(samples: Sequence[Sample]) -> list[Sample]:
    """Every four samples share the first one's prompt, as in data with several answers to each question."""
    prompts = [each["input_ids"][: prompt_length(each)] for each in samples]
    return [with_prompt(each, prompts[i - i % 4]) for i, each in enumerate(samples)]


def with_system_prompt(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample begins with the same 200 tokens."""
    system = torch.randint(10, 500, (200,), generator=torch.Generator().manual_seed(1))
    return [with_prompt(each, torch.cat([system, each["input_ids"][: prompt_length(each)]])) for each in samples]


def prompt_length(sample: Sample) -> int:
    return int((sample["labels"] == IGNORE).sum())


def with_prompt(sample: Sample, prompt: Tensor) -> Sample:
    """The sample's answer after another prompt."""
    answer = sample["input_ids"][prompt_length(sample) :]
    return {
        "input_ids": torch.cat([prompt, answer]),
        "labels": torch.cat([torch.full_like(prompt, IGNORE), answer]),
    }


PROMPTS: dict[str, Callable[[Sequence[Sample]], Sequence[Sample]]] = {
    "own": lambda samples: samples,
    "repeated": with_repeated_prompts,
    "system": with_system_prompt,
}


def as_rows(samples: Sequence[Sample]) -> list[dict[str, list[int]]]:
    """The samples as plain rows of a dataset."""
    return [{name: tensor.tolist() for name, tensor in sample.items()} for sample in samples]


def prepared_rows(samples: Sequence[Sample]) -> PreparedRows:
    """The samples as the library prepares rows."""
    return prepared_already(Dataset.from_list(as_rows(samples)), DataCollatorForLanguageModeling(pad_token_id=0))


def sorted_batches(samples: Sequence[Sample], size: int = BATCH_SIZE) -> list[tuple[list[int], Sample]]:
    """Batches of similar lengths, the longest first: the samples' positions, and the padded batch."""
    order = sorted(range(len(samples)), key=lambda row: -len(samples[row]["input_ids"]))
    return [(rows, collate([samples[row] for row in rows])) for rows in in_batches(order, size)]


def in_batches(rows: Sequence[int], size: int = BATCH_SIZE) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def collate(samples: Sequence[Sample]) -> Sample:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    batch: Sample = DataCollatorForLanguageModeling(pad_token_id=0)(as_rows(samples))
    return batch


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # kilobytes, except on macOS
