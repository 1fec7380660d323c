"""What a model continues: a row's prompt and the beginning of its answer, as scoring's tokens have it.

Knows tokenizers, chat templates and models' losses, not what is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.endings import MARK
from ..model.losses import IGNORE, learnt_positions, sample_means, token_losses, unwrapped
from ..model.modes import evaluating
from .examples import Example
from .texts import prefix as first_share

STRATA = {"0": 0.0, "1/3": 1 / 3, "2/3": 2 / 3}  # the share of the row's own answer that is given
HERE = "@@HERE@@"  # where the answer continues in a rendered chat


@dataclass(frozen=True)
class Beginning:
    """Where an answer is to be continued.

    Attributes:
        example: the row.
        stratum: the share of its answer that is given, a key of `STRATA`.
        prefix: that beginning of its answer.
        context: what precedes the continuation, prompt and prefix, as the model reads it.
        special: whether the tokenizer adds its special tokens to the context.
        ends: tokens that end the answer.
        end_text: the text that ends the answer; empty where tokens alone do.
        tokens: the number of tokens of the rest of the row's own answer.
        room: the largest number of tokens that the model can write.
    """

    example: Example
    stratum: str
    prefix: str
    context: str
    special: bool
    ends: tuple[int, ...]
    end_text: str
    tokens: int
    room: int

    def end_of(self, text: str) -> int | None:
        """Where a continuation ends by its text: before what ends an answer in a chat; after the line that marks the
        final answer, if the row's own answer ends with such a line; and before a blank line, if the row's own has none.
        """
        own, whole = self.example.answer.strip(), self.prefix + text
        found = [text.find(self.end_text)] if self.end_text else []
        lines = own.splitlines()
        at = len(whole) - len(whole.lstrip())
        marks, blanks = bool(lines and MARK.search(lines[-1])), any(not line.strip() for line in lines)
        for line in whole[at:].splitlines(keepends=True):
            complete = line.endswith(("\n", "\r"))
            if marks and complete and MARK.search(line):
                found.append(at + len(line.rstrip()) - len(self.prefix))
            if not blanks and complete and not line.strip():
                found.append(at - len(self.prefix))
            at += len(line)
        return min((place for place in found if place >= 0), default=None)


def beginnings_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Beginning]:
    """A row's beginnings: without a prompt, none of which nothing is given; none where the answer is short or the
    template changes it."""
    room = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    found = list[Beginning]()
    for stratum, share in STRATA.items():
        prefix = first_share(example.answer, share) if share else ""
        if prefix is None or not (prefix or example.prompt) or any(each.prefix == prefix for each in found):
            continue
        rendered = _rendered(tokenizer, example, prefix)
        if rendered is None:
            continue
        context, after = rendered
        special = not example.messages
        ends, end_text = _ends(tokenizer, after)
        given = len(tokenizer(context, add_special_tokens=special)["input_ids"])
        rest = len(tokenizer(example.answer[len(prefix) :], add_special_tokens=False)["input_ids"])
        left = (10**9 if room is None else room) - given
        if left > rest:
            found.append(Beginning(example, stratum, prefix, context, special, ends, end_text, rest, left))
    return found


def mean_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: Sequence[Beginning],
    answers: Sequence[str],
) -> Tensor:
    """The model's mean token loss of what answers say after a beginning, (B,) in nats."""
    rows = []
    for each, answer in zip(beginnings, answers, strict=True):
        given, whole = (
            tokenizer(text, add_special_tokens=each.special)["input_ids"]
            for text in (each.context, each.context + answer[len(each.prefix) :])
        )
        differ = (place for place, (one, other) in enumerate(zip(given, whole, strict=False)) if one != other)
        shared = min(next(differ, len(given)), len(whole) - 1)
        rows.append((torch.tensor(whole), torch.tensor([IGNORE] * shared + whole[shared:])))
    batch = {
        "input_ids": pad_sequence([ids for ids, _ in rows], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
        "labels": pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORE),
    }
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad(), evaluating(model):
        return sample_means(token_losses(model, batch), learnt_positions(batch["labels"])).cpu()


def _rendered(tokenizer: PreTrainedTokenizerBase, example: Example, prefix: str) -> tuple[str, str] | None:
    """What precedes and what follows the continuation; None where the template does not render it."""
    if not example.messages:
        asked = example.values["prompt"] if example.column == "completion" else ""
        return asked + prefix, ""
    *before, last = example.messages
    values = example.values
    tools = values.get("tools")
    try:
        text = tokenizer.apply_chat_template(
            [*before, {**last, "content": prefix + HERE}],
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            tokenize=False,
            **(values.get("chat_template_kwargs") or {}),
        )
    except Exception:  # templates raise what they like
        return None
    context, here, after = str(text).rpartition(HERE)
    return (context, after) if here else None


def _ends(tokenizer: PreTrainedTokenizerBase, after: str) -> tuple[tuple[int, ...], str]:
    """The token that ends an answer in a chat, or the text where no single token does."""
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if ids and ids[0] in {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}:
        return (ids[0],), ""
    return (), after.strip()
