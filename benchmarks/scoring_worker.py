"""One method of `scoring.py` in a process of its own: builds the model, warms up, times, prints a line of JSON.

    python benchmarks/scoring_worker.py recorder --shape tiny --samples 6

What is needed once (imports, the model, the first call's allocations) is outside the clock, not outside the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from scoring import GSM8K, OWN, PEERS, SHAPES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from resofilter_trainer import Recorder, ResonanceConfig, literal
from resofilter_trainer.data.loading import default_arguments
from resofilter_trainer.data.preparation import PreparedRows, prepared_already
from resofilter_trainer.model.losses import IGNORE, token_losses
from resofilter_trainer.scoring.batches import arrange, default_budget
from resofilter_trainer.scoring.batches import collate as collate_rows
from resofilter_trainer.scoring.dataset import Pass, score_prepared

CHARACTERS_PER_TOKEN = 3  # about what a large vocabulary makes of GSM8K, its digits one by one
BATCH_SIZE = 4

Sample = dict[str, Tensor]
Method = Callable[[LlamaForCausalLM, Sequence[Sample], ResonanceConfig], "Tensor | None"]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    config = ResonanceConfig(eps=args.eps)
    with contextlib.redirect_stdout(sys.stderr):  # the libraries' own words; only the result goes to stdout
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
    """One of ours, or a peer, which is imported only now."""
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
    """What `score_dataset` does by default, what is measured again for the sake of `Trust` included."""
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
    """What a loss alone costs as everybody computes it, every logit formed."""
    with torch.no_grad():
        for batch in library_batches(samples):
            _ = model(**batch).loss


def forward_labelled(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> None:
    """What a loss alone costs with the head at learnt positions."""
    with torch.no_grad():
        for batch in library_batches(samples):
            token_losses(model, batch)


def forward_labelled_bf16(model: LlamaForCausalLM, samples: Sequence[Sample], config: ResonanceConfig) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        forward_labelled(model, samples, config)


def library_batches(samples: Sequence[Sample]) -> list[Sample]:
    """The batches that the library itself would make."""
    prepared, device = prepared_rows(samples), torch.device("cpu")
    return [collate_rows(prepared, rows, device) for rows, *_ in arrange(prepared, default_budget(device), device)]


def prepared_rows(samples: Sequence[Sample]) -> PreparedRows:
    rows = [{name: tensor.tolist() for name, tensor in sample.items()} for sample in samples]
    return prepared_already(Dataset.from_list(rows), DataCollatorForLanguageModeling(pad_token_id=0))


METHODS: dict[str, Method] = {
    "literal": literal_scores,
    "recorder": recorder,
    "recorder_bf16": recorder_bf16,
    "forward": forward,
    "forward_labelled": forward_labelled,
    "forward_labelled_bf16": forward_labelled_bf16,
    "default": default,
}


def build_model(shape: str = "135m") -> LlamaForCausalLM:
    """A Llama with random weights, always the same, in float32."""
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
    """Random tokens; each sample as long as a GSM8K question, not learnt, and its answer, learnt."""
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
    """Each four samples with the first one's prompt, as where several answers were drawn to a question."""
    prompts = [each["input_ids"][: prompt_length(each)] for each in samples]
    return [with_prompt(each, prompts[i - i % 4]) for i, each in enumerate(samples)]


def with_system_prompt(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample behind the same 200 tokens."""
    system = torch.randint(10, 500, (200,), generator=torch.Generator().manual_seed(1))
    return [with_prompt(each, torch.cat([system, each["input_ids"][: prompt_length(each)]])) for each in samples]


def prompt_length(sample: Sample) -> int:
    return int((sample["labels"] == IGNORE).sum())


def with_prompt(sample: Sample, prompt: Tensor) -> Sample:
    """The sample's answer to another prompt."""
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


def sorted_batches(samples: Sequence[Sample], size: int = BATCH_SIZE) -> list[tuple[list[int], Sample]]:
    """Batches of similar lengths, the longest first: the samples' places, and the padded batch."""
    order = sorted(range(len(samples)), key=lambda row: -len(samples[row]["input_ids"]))
    return [(rows, collate([samples[row] for row in rows])) for rows in in_batches(order, size)]


def in_batches(rows: Sequence[int], size: int = BATCH_SIZE) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def collate(samples: Sequence[Sample]) -> Sample:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    rows = [{name: tensor.tolist() for name, tensor in sample.items()} for sample in samples]
    batch: Sample = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    return batch


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # kilobytes but on macOS


def versions(method: str) -> dict[str, str]:
    """What was measured: torch, transformers, and the peer itself."""
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
