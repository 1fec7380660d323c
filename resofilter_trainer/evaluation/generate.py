"""Generate answers and count the right ones. Knows models and tokenizers, not how they were trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.modes import evaluating

FINAL_ANSWER = Path(__file__).parent / "metrics" / "final_answer.py"


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    references: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
) -> float:
    """The share of prompts that the model answers with the right final answer, by greedy generation.

    Args:
        model: a causal language model.
        tokenizer: the tokenizer of the model.
        prompts: the prompts, as texts in the format of the training rows, or as lists of messages.
        references: the right answers, as texts with `#### <number>` or `The answer is <number>` at the end.
        max_new_tokens: the largest number of tokens of an answer.
        batch_size: the number of prompts in a batch of one process; the processes share the prompts.
    """
    answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return evaluate.load(str(FINAL_ANSWER)).compute(predictions=answers, references=list(references))["exact_match"]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The greedy continuation of each prompt, without special tokens, in the order of the prompts."""
    state = PartialState()
    chat = any(not isinstance(prompt, str) for prompt in prompts)
    texts = [_from_template(tokenizer, prompt) for prompt in prompts] if chat else list(prompts)
    special = not chat  # a chat template adds its own special tokens
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # little padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    found: list[tuple[int, str]] = []
    with torch.no_grad(), evaluating(model):
        for rows in tqdm(mine, desc="Answering", unit="batch", disable=not state.is_main_process):
            some = [texts[row] for row in rows]
            found += zip(rows, _continue(model, tokenizer, some, special, max_new_tokens), strict=True)
    if state.num_processes > 1:
        found = gather_object(found)
    return [text for _, text in sorted(found)]


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool, max_new_tokens: int
) -> list[str]:
    inputs = tokenizer(
        texts,
        add_special_tokens=special,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    ).to(model.device)
    written = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _from_template(tokenizer: PreTrainedTokenizerBase, messages: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
