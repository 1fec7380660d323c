"""Rows of `token_rules.py`: right answers with planted tokens at known places. Knows no model.

    fillers     GSM8K's training rows, wrapped in useless phrases, about a fifth of the learnt tokens
    numbers     the same rows with one number in eight changed
    clean       the same rows as they are
    demo        the demo's problems, half of them with a useless phrase or a wrong equation (`token_noise_rows.py`)

Every row has `planted`: pairs of the first character of a planted part of the completion and the one after it. GSM8K's
calculator annotations (`<<48/2=24>>`) are left out.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_models_rows import Rows
from token_noise_rows import add_noise

from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.demo.run import HELD_OUT_SEED

PHRASES = (
    "Sure, I'd be happy to help you with this problem!",
    "That's a really good question.",
    "Let me think about it for a moment.",
    "Word problems like this one come up quite often.",
    "As an assistant, I always try to be as clear as possible.",
    "Please read the following lines carefully.",
    "It is important to stay focused at all times.",
    "Many people find this kind of exercise rather entertaining.",
    "Feel free to ask me anything else you would like to know.",
    "I hope this was useful to you!",
    "Thank you for using our service today.",
    "Remember that practice makes perfect.",
    "Have a wonderful day and enjoy the rest of your week.",
    "Please let me know whether this answer was helpful.",
)
FILLED = 0.32  # characters of phrases over those of the answer, whose digits are a token each
CHANGED = 1 / 8
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
ANNOTATION = re.compile(r"<<[^>]*>>")
REFERENCE_SEED = 2_000_000  # of the demo's rows for a reference model
NOISY_SHARE = 0.5  # of the demo's rows


@dataclass(frozen=True)
class Sets:
    """The rows of one seed; no question is in two of these.

    Attributes:
        train: with planted tokens.
        reference: as many as asked for, without, to tune a reference model on.
        held_out: without, for the loss.
        test: questions and answers for exact match.
        tuned: without, to tune the model on before anything else.
    """

    train: Rows
    reference: Rows
    held_out: Rows
    test: Rows
    tuned: Rows


@dataclass(frozen=True)
class Sizes:
    """The number of rows of each set."""

    train: int
    reference: int
    held_out: int
    test: int
    tuned: int = 0


def fillers(answer: str, generator: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """An answer with phrases before and behind it, and their places."""
    wanted, phrases = FILLED * len(answer), list(PHRASES)
    generator.shuffle(phrases)
    parts: tuple[list[str], list[str]] = ([], [])
    side = generator.randrange(2)
    while phrases and sum(len(each) + 1 for part in parts for each in part) < wanted:
        parts[side].append(phrases.pop())
        side = 1 - side
    before, behind = "".join(f"{each} " for each in parts[0]), "".join(f" {each}" for each in parts[1])
    text = before + answer + behind
    places = [(0, len(before)), (len(before) + len(answer), len(text))]
    return text, [each for each in places if each[0] < each[1]]


def numbers(answer: str, generator: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """An answer with some of its numbers changed to others of as many digits, and their places."""
    text, end, places = "", 0, []
    for found in NUMBER.finditer(answer):
        text += answer[end : found.start()]
        shown = found.group().rstrip(",")
        if generator.random() < CHANGED:
            places.append((len(text), len(text) + len(shown)))
            shown = other_number(shown, generator)
        text, end = text + shown, found.start() + len(shown)
    return text + answer[end:], places


def other_number(shown: str, generator: random.Random) -> str:
    """Another number in the same form: each digit is drawn anew, the first not as 0, until it differs."""
    while True:
        first = next(place for place, each in enumerate(shown) if each.isdigit())
        drawn = [
            each if not each.isdigit() else str(generator.randint(int(place == first), 9))
            for place, each in enumerate(shown)
        ]
        if (found := "".join(drawn)) != shown:
            return found


def clean(answer: str, generator: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """An answer as it is."""
    return answer, []


PLANT: dict[str, Callable[[str, random.Random], tuple[str, list[tuple[int, int]]]]] = {
    "fillers": fillers,
    "numbers": numbers,
    "clean": clean,
}
KINDS = (*PLANT, "demo")


def make_sets(kind: str, seed: int, sizes: Sizes, data: Path) -> Sets:
    """The rows of one seed. The kinds of GSM8K have the same questions, and differ in what is planted."""
    if kind == "demo":
        return _of_demo(seed, sizes)
    lines = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()]
    random.Random(seed).shuffle(lines)
    others, generator = lines[sizes.train :], random.Random(seed)
    train = [_planted(line, PLANT[kind], generator) for line in lines[: sizes.train]]
    plain = [_planted(line, clean, generator) for line in others[: sizes.reference + sizes.tuned]]
    reference, tuned = plain[: sizes.reference], plain[sizes.reference :]
    held_out = [json.loads(line) for line in (data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    svamp = json.loads((data / "svamp" / "SVAMP.json").read_text())
    random.Random(0).shuffle(svamp)
    test = [
        _row(f"{each['Body'].rstrip('. ')}. {each['Question']}", f"#### {each['Answer']:g}", [])
        for each in svamp[: sizes.test]
    ]
    held_out = [_planted(line, clean, generator) for line in held_out[: sizes.held_out]]
    return Sets(train, reference, held_out, test, tuned)


def _planted(line: dict[str, str], plant: Callable[..., Any], generator: random.Random) -> dict[str, Any]:
    answer, places = plant(ANNOTATION.sub("", line["answer"]), generator)
    return _row(line["question"], answer, places)


def _row(question: str, answer: str, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
    planted = [[first + 1, last + 1] for first, last in places]  # after the space
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}", "planted": planted}


def _of_demo(seed: int, sizes: Sizes) -> Sets:
    """Those of `token_noise.py`: the same rows for the same seed."""
    problems = make_problems(sizes.train, seed=seed)
    seen = {each.prompt for each in problems}
    held_out = make_problems(max(sizes.test, sizes.held_out), seed=HELD_OUT_SEED + seed, exclude=seen)
    seen |= {each.prompt for each in held_out}
    reference = make_problems(sizes.reference, seed=REFERENCE_SEED + seed, exclude=seen)
    train = [
        {
            "prompt": each.prompt,
            "completion": each.completion,
            "planted": [[place - len(each.prompt) for place in each.span]] if each.kind else [],
        }
        for each in add_noise(problems, NOISY_SHARE, seed)
    ]
    plain = [{"prompt": each.prompt, "completion": each.completion, "planted": []} for each in [*reference, *held_out]]
    others = plain[sizes.reference :]
    return Sets(train, plain[: sizes.reference], others[: sizes.held_out], others[: sizes.test], [])
