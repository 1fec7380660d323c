"""Rows whose noisy tokens are known: the demo's problems with useless phrases and wrong equations. Knows no model."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from resofilter_trainer.data.preparation import PreparedRows
from resofilter_trainer.demo.problems import Problem
from resofilter_trainer.model.losses import IGNORE
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.tokens.cleaned_dataset import SAMPLE_ID

CLEAN, FILLER, EQUATION = 0, 1, 2
FILLERS = (
    "Well let me think about this one.",
    "I like numbers a lot.",
    "This is a nice question.",
    "Here we go again.",
    "Hope that helps you.",
    "Let us see what we can do.",
)


@dataclass(frozen=True)
class NoisyRow:
    """A right row, or one with noise of a kind at `span`, its start and end in prompt + completion."""

    prompt: str
    completion: str
    kind: int
    span: tuple[int, int]


@dataclass(frozen=True)
class Marks:
    """For each row, (T,) arrays: the ids of its tokens, and the kind of noise of each token, or CLEAN."""

    ids: list[np.ndarray]
    kinds: list[np.ndarray]

    def of(self, scores: TokenScores) -> np.ndarray:
        """(N,) the kinds of the learnt tokens, after a check that the scores are of the same tokens."""
        spans = zip(scores.sample_id, scores.offsets[:-1], scores.offsets[1:], strict=True)
        places = [(row, scores.position[start:stop]) for row, start, stop in spans]
        if not np.array_equal(np.concatenate([self.ids[row][at] for row, at in places]), scores.token):
            sys.exit("the token scores are not of the marked tokens")
        return np.concatenate([self.kinds[row][at] for row, at in places])

    def of_labels(self, rows: Dataset) -> np.ndarray:
        """(M,) the kinds of all learnt tokens of rows with masked labels."""
        pairs = zip(rows[SAMPLE_ID], rows["labels"], strict=True)
        return np.concatenate([self.kinds[row][np.array(labels) != IGNORE] for row, labels in pairs])


def as_dataset(rows: Sequence[NoisyRow] | Sequence[Problem]) -> Dataset:
    return Dataset.from_list([{"prompt": row.prompt, "completion": row.completion} for row in rows])


def add_noise(problems: Sequence[Problem], share: float, seed: int) -> list[NoisyRow]:
    """Add noise to a share of the rows: before the first step, between two steps, or after the last, equally often."""
    rng = random.Random(seed)
    noisy = set(rng.sample(range(len(problems)), round(share * len(problems))))
    return [
        put_noise(problem, rng) if row in noisy else NoisyRow(problem.prompt, problem.completion, CLEAN, (0, 0))
        for row, problem in enumerate(problems)
    ]


def put_noise(problem: Problem, rng: random.Random) -> NoisyRow:
    """Add noise before the first step, between two steps, or after the last; the row still ends in `#### N`."""
    steps = problem.completion.split(" #### ")[0].split(" ")
    where = rng.choice(("before", "between", "after"))
    step = {"before": 0, "between": rng.randrange(1, len(steps)), "after": len(steps)}[where]
    phrase = wrong_equation(rng) if where == "between" else rng.choice(FILLERS)
    inserted = f" {phrase}" if where == "after" else f"{phrase} "
    start = len(" ".join(steps[:step])) + (where == "between")
    completion = problem.completion[:start] + inserted + problem.completion[start:]
    start += len(problem.prompt)
    kind = EQUATION if where == "between" else FILLER
    return NoisyRow(problem.prompt, completion, kind, (start, start + len(inserted)))


def wrong_equation(rng: random.Random) -> str:
    left, right = rng.randint(2, 99), rng.randint(2, 99)
    result = rng.choice([number for number in range(2, 200) if number != left + right])
    return f"{left}+{right}={result}."


def mark_tokens(rows: Sequence[NoisyRow], prepared: PreparedRows, tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Mark tokens by their offsets in the text, after a check that these are the tokens of the prepared rows."""
    encoded = tokenizer([row.prompt + row.completion for row in rows], return_offsets_mapping=True)
    own = [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]
    if prepared.sample_ids.tolist() != list(range(len(rows))) or list(prepared.dataset["input_ids"]) != own:
        sys.exit("rows are missing, or their tokens are not those of the whole text and an end token")
    kinds = []
    for row, offsets in zip(rows, encoded["offset_mapping"], strict=True):
        start, stop = np.array([*offsets, (0, 0)]).T  # the end token has no text
        kinds.append(np.where((start < row.span[1]) & (stop > row.span[0]), row.kind, CLEAN))
    return Marks([np.array(ids) for ids in own], kinds)
