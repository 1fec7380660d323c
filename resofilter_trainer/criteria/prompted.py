"""Criteria that show the model a sample in another context: as an example before a task, or for the model to rate.

    nuggets    sample + task -> does the loss of the task fall?
    selectit   "rate this" + sample + "rating:" -> which of 1 to 5 does the model choose, and how surely?

Each is made with tasks or a tokenizer and is then a function `(model, batch) -> (B,)`, like those of `model.py`. Knows
models, batches and tokenizers, no dataset and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..config import InputError
from ..model.losses import IGNORE, TokenBatch, unwrapped
from .model import loss

RATINGS = ("1", "2", "3", "4", "5")
ALPHA = 0.2  # SelectIT's weight of the spread over prompts
RATING_PROMPTS = (  # (before the instruction, between it and the response, after both)
    ("Rate from 1 to 5 how well the response answers the instruction.\nInstruction: ", "\nResponse: ", "\nRating: "),
    ("Instruction: ", "\nResponse: ", "\nThe quality of this response, from 1 (bad) to 5 (good), is "),
    ("Is the response below helpful, correct and complete?\n", "\n", "\nScore from 1 (no) to 5 (yes): "),
)


@dataclass
class Nuggets:
    """The golden score: the share of tasks whose answer becomes more likely with the sample as an example before it.

        1/M sum_j [log p(answer_j | sample, task_j) > log p(answer_j | task_j)]     (Nuggets, arXiv 2312.10302, eq. 1-3)

    The sample loses its end-of-sequence token and the task its beginning-of-sequence token, so that they are one text.

    Attributes:
        anchors: the M tasks, each with `input_ids` and `labels`, (T,), of which only the answer is learnt.
        between: the tokens between sample and task.
    """

    anchors: Sequence[Mapping[str, Tensor]]
    between: Sequence[int] = ()
    _alone: tuple[nn.Module, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.anchors:
            raise InputError("Nuggets needs tasks to test its examples on: pass a validation set.")

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """(B,) from 0 to 1."""
        device = batch["input_ids"].device
        if self._alone is None or self._alone[0] is not model:
            self._alone = model, loss(model, _padded(model, self.anchors, device))
        start, end = (getattr(unwrapped(model).config, f"{name}_token_id", None) for name in ("bos", "eos"))
        found = []
        for row in range(len(batch["input_ids"])):
            sample = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())].cpu()
            before = torch.cat([_without_end(sample, end), torch.tensor(self.between, dtype=torch.long)])
            after = [_after(before, each, start) for each in self.anchors]
            found.append((loss(model, _padded(model, after, device)) < self._alone[1]).double().mean())
        return torch.stack(found)


@dataclass(frozen=True)
class SelectIT:
    """The model's own rating of a sample, weighted by its certainty (SelectIT, arXiv 2402.16705, eq. 1-4).

        P(k) = softmax over the logits of "1" to "5" after a rating prompt; k' is the most likely
        token level      S = k' * 1/(K - 1) sum_k |P(k') - P(k)|
        sentence level   mean(S) / (1 + 0.2 std(S)) over the rating prompts

    For one model; the paper also averages over models of several sizes. The instruction is the row without its learnt
    tokens, the response the learnt tokens without an end-of-sequence token; a beginning-of-sequence token stays first.
    The prompts are not the paper's.

    Attributes:
        tokenizer: the model's tokenizer; it needs a token for each of the numbers.
        prompts: the texts before, between and after instruction and response.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[tuple[str, str, str]] = RATING_PROMPTS

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """(B,) from 0 to 5."""
        ratings = torch.tensor([self._token(rating) for rating in RATINGS], device=batch["input_ids"].device)
        levels = torch.stack([self._token_level(model, batch, prompt, ratings) for prompt in self.prompts])
        return levels.mean(0) / (1 + ALPHA * levels.std(0, correction=0))

    def _token_level(
        self, model: nn.Module, batch: TokenBatch, prompt: tuple[str, str, str], ratings: Tensor
    ) -> Tensor:
        before, between, after = (self._ids(text) for text in prompt)
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = []
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            learnt = (labels != IGNORE) & (mask > 0)
            asked, answer = ids[(mask > 0) & ~learnt].cpu(), _without_end(ids[learnt].cpu(), end)
            first = 1 if len(asked) and start is not None and int(asked[0]) == start else 0
            rows.append(torch.cat([asked[:first], before, asked[first:], between, answer, after]))
        padded = _padded(model, [{"input_ids": row, "labels": row} for row in rows], batch["input_ids"].device)
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
        last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
        p = logits[torch.arange(len(rows), device=logits.device), last][:, ratings].double().softmax(-1)
        largest, place = p.max(-1)
        return (place + 1) * (largest[:, None] - p).abs().sum(-1) / (len(RATINGS) - 1)

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def _token(self, rating: str) -> int:
        token = self.tokenizer.convert_tokens_to_ids(rating)
        if token is None or token == self.tokenizer.unk_token_id:
            raise InputError(f"SelectIT asks for a number from 1 to 5, and the tokenizer has no token for '{rating}'.")
        return int(token)


def _without_end(ids: Tensor, end: int | Sequence[int] | None) -> Tensor:
    """The tokens without a final end-of-sequence token."""
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return ids[:-1] if len(ids) and int(ids[-1]) in ends else ids


def _after(before: Tensor, task: Mapping[str, Tensor], start: int | None) -> dict[str, Tensor]:
    """A task after other tokens. Its first token is not learnt, although a token precedes it now."""
    ids, labels = task["input_ids"], task["labels"].clone()
    labels[0] = IGNORE
    if start is not None and int(ids[0]) == start:
        ids, labels = ids[1:], labels[1:]
    return {"input_ids": torch.cat([before, ids]), "labels": torch.cat([torch.full_like(before, IGNORE), labels])}


def _padded(model: nn.Module, samples: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """A batch of the samples, padded on the right. Raises InputError for samples longer than the model allows."""
    limit = getattr(unwrapped(model).config, "max_position_embeddings", None)
    longest = max(len(each["input_ids"]) for each in samples)
    if limit is not None and longest > limit:
        raise InputError(
            f"With its context, a row has {longest} tokens and the model {limit} positions: lower max_length."
        )
    ids, labels = ([torch.as_tensor(each[name]) for each in samples] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True).to(device),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(device),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).to(device),
    }
