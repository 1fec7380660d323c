"""Pretrain the demo's base model: a small Llama, from scratch, on all tokens of word problems with right answers.

    python recipes/pretrain_demo_base.py --output resofilter_trainer/demo/base
    python recipes/pretrain_demo_base.py --start resofilter_trainer/demo/base --steps 200 --lr 1e-3 --seed 3000000000 \
        --output runs/base80        # further pretraining, to about 80 % of new problems

About ten minutes on two CPU cores. Training stops while the model still makes mistakes, so that the demo's
fine-tuning can improve it. Weights are stored as float16; load them with `dtype=torch.float32`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.evaluation.generate import exact_match

FIRST_SEED = 1_000_000_000  # far from the demo's seeds, whose problems must be new to the model
WORDS_DIGITS_REST = Regex(r" ?[A-Za-z]+|\d| ?#+|[^A-Za-z\d\s]|\s")
END, PAD = "<|end|>", "<|pad|>"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: encoding and decoding preserves any text. Digits and the words of `texts` are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS_DIGITS_REST, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model of just under 0.9 million parameters, 1.8 MB as float16."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """An endless stream of new problems, right-padded; the labels of padding are masked."""
    while True:
        seed += 1
        problems = make_problems(100 * batch_size, seed=seed)
        texts = [problem.prompt + problem.completion + tokenizer.eos_token for problem in problems]
        for first in range(0, len(texts), batch_size):
            batch = tokenizer(
                texts[first : first + batch_size], padding=True, return_tensors="pt", padding_side="right"
            )
            ids, mask = batch["input_ids"], batch["attention_mask"]
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Train with AdamW on the mean loss of all tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, args.steps))
    start = time.perf_counter()
    model.train()
    for step, batch in zip(range(1, args.steps + 1), batches(tokenizer, args.batch_size, args.seed), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:5.0f} s", flush=True)


def learning_rate_factor(step: int, num_steps: int, warmup: int = 50) -> float:
    """A linear warm-up from 0 to 1, then a cosine from 1 to 0.1."""
    return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the folder for the model and the tokenizer")
    parser.add_argument("--start", help="a model to continue from, with its tokenizer")
    parser.add_argument("--steps", type=int, default=1750)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    held_out = make_problems(1000, seed=args.seed)
    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer([problem.prompt + problem.completion for problem in held_out])
        model = make_model(tokenizer)
    tokenizer.save_pretrained(args.output)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, tokenizer, args)
    model.half().save_pretrained(args.output)
    prompts, answers = [problem.prompt for problem in held_out], [problem.completion for problem in held_out]
    accuracy = exact_match(model.float(), tokenizer, prompts, answers, max_new_tokens=64, batch_size=200)
    print(f"accuracy {accuracy:.3f} with the weights as stored")


if __name__ == "__main__":
    main()
