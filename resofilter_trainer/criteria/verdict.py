"""The self-verdict: what a model says to "is this answer right?" about a row. Knows models, tokens and tokenizers.

    prompt + response + question -> ln P(No) - ln P(Yes) at the next token

No dataset and no file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..config import InputError
from ..model.head import Way
from ..model.losses import IGNORE, TokenBatch, inputs_of

QUESTION = "Is this answer right? Answer Yes or No."
PLAIN = f"\n{QUESTION}\nAnswer:"  # where no chat template rendered the rows
MARK = "what the assistant said"


@torch.no_grad()
def verdict(model: nn.Module, batch: TokenBatch, way: Way, no: Sequence[int], yes: Sequence[int]) -> Tensor:
    """`ln P(No) - ln P(Yes)`, (B,) float64, at the one learnt position of each sample.

    Args:
        model, batch, way: as for `forwards`.
        no, yes: the tokens of each answer, whose probabilities are added up.
    """
    decoded = way(model, inputs_of(model, batch, causal=False))
    rows, answers = len(decoded.hidden), torch.tensor([*no, *yes], device=decoded.hidden.device)
    hidden, targets = decoded.hidden.repeat_interleave(len(answers), 0), answers.repeat(rows)
    log_p = -replace(decoded, hidden=hidden, targets=targets).losses().double().view(rows, -1)
    return log_p[:, : len(no)].logsumexp(1) - log_p[:, len(no) :].logsumexp(1)


@dataclass(frozen=True)
class Question:
    """Asks about the answer of a row.

    Attributes:
        ends: the tokens that end the assistant's turn, in order; empty for plain text.
        stops: the end-of-sequence tokens.
        tail: the tokens after the answer: the question, up to where the verdict is given.
        no, yes: the tokens that are this word.
    """

    ends: tuple[int, ...]
    stops: frozenset[int]
    tail: tuple[int, ...]
    no: tuple[int, ...]
    yes: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stops: Collection[int], template: str | None = None) -> Question:
        """The question for rows of a tokenizer.

        Args:
            tokenizer: the tokenizer of the rows.
            stops: the end-of-sequence tokens.
            template: the chat template that rendered the rows, which then makes a turn of the user of the question; if
                it cannot, and without one, the question is plain text.

        Raises:
            InputError: the tokenizer has no token for one of the answers.
        """
        turn = None if template is None else _turn(tokenizer, template)
        end, tail = ("", PLAIN) if turn is None else turn
        no, yes = (_tokens_of(tokenizer, word) for word in ("No", "Yes"))
        return cls(_ids(tokenizer, end), frozenset(stops), _ids(tokenizer, tail), no, yes)

    def __call__(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """A row up to its last learnt token, without the tokens that end it, and then the question.

        The last token stands for the verdict: it is the only learnt one, and its value does not matter.
        """
        answer = ids[: max(place for place, label in enumerate(labels) if label != IGNORE) + 1]
        for count in range(len(self.ends), 0, -1):
            if tuple(answer[-count:]) == self.ends[:count]:
                answer = answer[:-count]
                break
        while answer and answer[-1] in self.stops:
            answer = answer[:-1]
        asked = [*answer, *self.tail]
        return [*asked, self.yes[0]], [IGNORE] * len(asked) + [self.yes[0]]


def _turn(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str] | None:
    """What ends the assistant's turn, and the text from there to the verdict; None if the template gives neither."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    asked = [*said, {"role": "user", "content": QUESTION}]
    options = {"chat_template": template, "tokenize": False, "enable_thinking": False}
    try:
        ended = str(tokenizer.apply_chat_template(said, **options))
        whole = str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options))
    except Exception:  # templates raise what they like
        return None
    (_, found, end), (_, also_found, tail) = ended.rpartition(MARK), whole.rpartition(MARK)
    return (end, tail) if found and also_found and QUESTION in tail else None


def _tokens_of(tokenizer: PreTrainedTokenizerBase, word: str) -> tuple[int, ...]:
    """The tokens that are a word, with or without a space before it, in capitals or not. Raises InputError for none."""
    found = dict.fromkeys(
        ids[0]
        for each in (f" {word}", word, f" {word.lower()}", word.lower())
        if len(ids := _ids(tokenizer, each)) == 1 and ids[0] != tokenizer.unk_token_id
    )
    if not found:
        raise InputError(f"the tokenizer has no token for the answer '{word}'")
    return tuple(found)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
