"""Generate answers and count the right ones. Knows models and tokenizers, not how they were trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..model.modes import bfloat16_forward, evaluating

AT_FIRST = 64  # tokens
FINAL_ANSWER = Path(__file__).parent / "metrics" / "final_answer.py"


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    references: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    *,
    bf16: bool = False,
) -> float:
    """The share of prompts that the model answers with the right final answer, by greedy generation.

    Args:
        model: a causal language model.
        tokenizer: the tokenizer of the model.
        prompts: the prompts, as texts in the format of the training rows, or as lists of messages.
        references: the right answers, as texts with `#### <number>` or `The answer is <number>` at the end.
        max_new_tokens: the largest number of tokens of an answer.
        batch_size: the number of prompts in a batch of one process; the processes share the prompts.
        bf16: whether to use bfloat16 autocast, as a trainer does with `bf16=True`.
    """
    import evaluate  # of the extra `compare`; writing answers does without

    with bfloat16_forward(model, bf16):
        answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return evaluate.load(str(FINAL_ANSWER)).compute(predictions=answers, references=list(references))["exact_match"]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The greedy continuation of each prompt, without special tokens, in the order of the prompts.

    Answers that have not ended after `AT_FIRST` (64) tokens are put together in new batches, so that a few long ones do
    not hold up all others.
    """
    state = PartialState()
    chat = any(not isinstance(prompt, str) for prompt in prompts)
    texts = [_from_template(tokenizer, prompt) for prompt in prompts] if chat else list(prompts)
    special = not chat  # a chat template adds its own special tokens
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # little padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = [row for batch in batches[state.process_index :: state.num_processes] for row in batch]
    answers = _answers(model, tokenizer, [texts[row] for row in mine], special, max_new_tokens, batch_size)
    found = list(zip(mine, answers, strict=True))
    if state.num_processes > 1:
        found = gather_object(found)
    return [text for _, text in sorted(found)]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    special: bool,
    most: int,
    batch_size: int,
) -> list[str]:
    """The continuation of each text by this process, of `most` tokens at most."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=special)["input_ids"]
    first = min(most, AT_FIRST)
    with (
        torch.no_grad(),
        evaluating(model),
        tqdm(total=len(ids), desc="Answering", unit="row", disable=not PartialState().is_main_process) as bar,
    ):
        written = _continued(model, tokenizer, ids, first, batch_size, bar)
        answers = [tokens for tokens, _ in written]
        unfinished = [row for row, (_, ended) in enumerate(written) if not ended and most > first]
        bar.total += len(unfinished)
        begun = [ids[row] + answers[row] for row in unfinished]
        rest = _continued(model, tokenizer, begun, most - first, batch_size, bar)
        for row, (tokens, _) in zip(unfinished, rest, strict=True):
            answers[row] += tokens
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@dataclass(frozen=True)
class Written:
    """A continuation of a text.

    Attributes:
        text: what was written, without special tokens.
        finished: whether it came to an end by itself, not by the limit of tokens or seconds.
    """

    text: str
    finished: bool


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int,
    *,
    special: bool,
    seed: int,
    temperature: float = 1.0,
    min_p: float = 0.0,
    ends: Collection[int] = (),
    ended: Callable[[int, str], bool] | None = None,
    seconds: float | None = None,
) -> list[Written]:
    """A random continuation of each text, in one batch; the same again for the same batch, seed and machine.

    Args:
        model: a causal language model.
        tokenizer: the tokenizer of the model, with a pad token.
        texts: what is continued, as texts in the format of the training rows.
        max_new_tokens: the largest number of tokens of a continuation.
        special: whether the tokenizer adds its special tokens; False after a chat template.
        seed: the random seed; the generators of the process stay as they are.
        temperature: what the logits are divided by.
        min_p: tokens are drawn that are at least so likely, as a share of the likeliest (arXiv 2407.01082); unlike
            `top_p` it needs no sorted vocabulary, which would take longer than a small model's forward.
        ends: tokens that end a continuation, beside the end-of-sequence tokens of the model and the tokenizer.
        ended: a function from a text's number and its continuation to whether that is finished.
        seconds: the seconds after which the batch ends unfinished.
    """
    inputs = _inputs(tokenizer, texts, special).to(model.device)
    start = inputs["input_ids"].shape[1]
    stops = sorted({*ends, *_ends(model.generation_config.eos_token_id), *_ends(tokenizer.eos_token_id)})
    criteria = [] if ended is None else [_Ended(tokenizer, start, ended)]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, max_time=seconds, do_sample=True, temperature=temperature,
            min_p=min_p or None, top_p=1.0, top_k=0, num_beams=1, repetition_penalty=1.0, use_cache=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=stops or None,
            stopping_criteria=StoppingCriteriaList(criteria),
        )  # fmt: skip
    written = []
    for number, row in enumerate(ids):
        ending = torch.isin(row[start:], torch.tensor(stops, device=row.device)).nonzero()
        text = _continuation(tokenizer, row[: start + int(ending[0])] if len(ending) else row, start)
        written.append(Written(text, len(ending) > 0 or (ended is not None and ended(number, text))))
    return written


class _Ended(StoppingCriteria):
    """Ends each text of a batch when a function says that its continuation is finished."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, ended: Callable[[int, str], bool]) -> None:
        self.tokenizer, self.start, self.ended = tokenizer, start, ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [self.ended(number, text) for number, text in enumerate(texts)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _continuation(tokenizer: PreTrainedTokenizerBase, ids: Tensor, start: int) -> str:
    """The text of the tokens from `start`; decoded alone, some tokenizers would drop a space at its beginning."""
    settings: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (str(tokenizer.decode(each, **settings)) for each in (ids[:start], ids))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids[start:], **settings))


def _ends(tokens: int | Sequence[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def _inputs(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool) -> BatchEncoding:
    """The tokens of the texts, padded on the left."""
    return tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    )


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    most: int,
    batch_size: int,
    bar: Any,
) -> list[tuple[list[int], bool]]:
    """The greedy continuation of each list of tokens, and whether it has ended by itself."""
    ends = torch.tensor(sorted({*_ends(model.generation_config.eos_token_id)}), device=model.device)
    found = []
    for start in range(0, len(ids), batch_size):
        batch = {"input_ids": ids[start : start + batch_size]}
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(
            **inputs, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
        for row, ended in zip(tokens.tolist(), torch.isin(tokens, ends).tolist(), strict=True):
            found.append((row[: ended.index(True) + 1], True) if any(ended) else (row, False))
        bar.update(len(batch["input_ids"]))
    return found


def _from_template(tokenizer: PreTrainedTokenizerBase, messages: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
