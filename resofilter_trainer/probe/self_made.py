"""Errors that a model makes itself: it answers the rows' prompts, and its answers' ends are compared with the rows'.

    prompt | nothing, a third or two thirds of the row's own answer | what the model writes
                                                                       ends as the row: right; otherwise: faulty

Right and wrong ones of one writer, from one beginning, differ in what they say and not in whose style it is. Knows
models, tokenizers and examples, not what is measured of them.
"""

from __future__ import annotations

import copy
import re
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import number, whole_number
from ..data.endings import BOXED, MARK, NUMBER, ending_of
from ..evaluation.generate import sample
from .beginnings import STRATA, Beginning, beginnings_of, mean_losses
from .examples import Example
from .faults import Planted
from .texts import SENTENCE

KIND = "self_made"
GIVEN = {"0": "nothing", "1/3": "a third", "2/3": "two thirds"}
LONGER, MORE = 1.5, 16  # times the tokens of the row's own rest, and tokens more, that a continuation may have
MANY, FEW = 30, 0.05  # judged answers, of which fewer are right, or wrong: no more are written from that beginning
DRAWS = 4  # rows to try for each of the faults to find
AT_ONCE = 4  # texts whose losses are measured together


@dataclass(frozen=True)
class Try:
    """A finished continuation: where it begins, and the whole answer that it makes."""

    beginning: Beginning
    answer: str


@dataclass
class Writer:
    """A model that continues answers, and what became of the continuations.

    Attributes:
        deadline: the time at which it stops, by `time.monotonic`.
        counts: how many continuations were unfinished, undecided, ...
        judged: how many from each beginning are wrong or not, by stratum and wrongness.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    temperature: float
    min_p: float
    deadline: float
    counts: Counter[str] = field(default_factory=Counter)
    judged: Counter[tuple[str, bool]] = field(default_factory=Counter)

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() >= self.deadline

    def given_up(self, stratum: str) -> bool:
        """Whether answers from one beginning are nearly all wrong, or nearly all right."""
        wrong, right = self.judged[stratum, True], self.judged[stratum, False]
        return wrong + right >= MANY and min(wrong, right) < FEW * (wrong + right)

    def continue_all(self, beginnings: Sequence[Beginning], turn: Sequence[int]) -> list[Try]:
        """The finished continuations of one batch; `turn` tells this batch from all others."""
        seed = int(np.random.SeedSequence([self.seed, zlib.crc32(KIND.encode()), *turn]).generate_state(1)[0])
        written = sample(
            self.model,
            self.tokenizer,
            [each.context for each in beginnings],
            min(round(LONGER * max(each.tokens for each in beginnings)) + MORE, *(each.room for each in beginnings)),
            special=beginnings[0].special,
            seed=seed,
            temperature=self.temperature,
            min_p=self.min_p,
            ends={end for each in beginnings for end in each.ends},
            ended=lambda place, text: beginnings[place].end_of(text) is not None,
            seconds=max(self.deadline - time.monotonic(), 0.01),
        )
        tries = []
        for beginning, each in zip(beginnings, written, strict=True):
            text = each.text[: beginning.end_of(each.text)].rstrip()
            finished = each.finished and bool(text)
            self.counts["finished" if finished else "unfinished"] += 1
            tries += [Try(beginning, beginning.prefix + text)] if finished else []
        return tries


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    count: int,
    seed: int,
    *,
    seconds: float = 600.0,
    batch_size: int | None = None,
    samples: int = 2,
    temperature: float = 0.8,
    min_p: float = 0.05,
) -> tuple[list[Planted], list[str]]:
    """Answers that the model writes itself, wrong ones as faults and right ones to compare them with.

    Rows drawn at random are continued, those with short answers first, until there are enough wrong and right ones. An
    answer is wrong if it ends otherwise than the row's own (`ending_of`). Where the row's own has no end to compare,
    it is wrong if most samples of its prompt agree on another end; and without such a majority, if the row's own words
    are more likely to the model than those that it sampled (mean token loss). What begins with a share of the answer
    from which nearly all end rightly, or nearly all wrongly, is left out: there is nothing to compare it with.

    Args:
        model: the writer, the user's model or another.
        tokenizer: the tokenizer of the model, with the chat template by which the rows are scored.
        examples: the rows.
        count: the number of wrong ones to find, and of right ones.
        seed: the random seed; the same seed gives the same answers on the same machine, unless the time is over.
        seconds: the seconds after which no more is written.
        batch_size: the number of answers to write at once; by default 16 on a CPU and 64 elsewhere.
        samples: the number of continuations of each beginning; several let answers to one prompt be compared.
        temperature: what the logits are divided by.
        min_p: tokens are drawn that are at least so likely, as a share of the likeliest.

    Returns:
        At most `count` of each, their `stratum` the share of the row's own answer that they begin with ("0", "1/3",
        "2/3"); and notes for the user.

    Raises:
        InputError: a number is out of its range.
    """
    if batch_size is None:
        batch_size = 16 if model.device.type == "cpu" else 64
    count, batch_size, samples = (
        whole_number(name, value, least=1)
        for name, value in (("count", count), ("batch_size", batch_size), ("samples", samples))
    )
    seconds, temperature = number("seconds", seconds, above=0), number("temperature", temperature, above=0)
    min_p = number("min_p", min_p, least=0, most=1)
    rng = np.random.default_rng([seed, zlib.crc32(KIND.encode())])
    drawn = [examples[place] for place in rng.permutation(len(examples))[: DRAWS * count]]
    drawn.sort(key=lambda example: (len(example.answer), example.row))
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    writer = Writer(model, tokenizer, seed, temperature, min_p, time.monotonic() + seconds)
    found: list[Planted] = []
    group = max(1, batch_size // samples)
    for start in tqdm(range(0, len(drawn), group), desc="Writing answers", unit="batch"):
        if writer.late or _enough(_comparable(writer, found), count):
            break
        found += _written(writer, drawn[start : start + group], start, samples)
    found = _comparable(writer, found)
    kept = [each for wrong in (True, False) for each in _at_most(count, [p for p in found if p.faulty is wrong], rng)]
    return kept, _notes(writer, found, count, seconds)


def _comparable(writer: Writer, found: Sequence[Planted]) -> list[Planted]:
    """Those that begin where there are wrong and right ones to compare."""
    return [each for each in found if not writer.given_up(each.stratum)]


def _enough(found: Sequence[Planted], count: int) -> bool:
    wrong = sum(each.faulty for each in found)
    return min(wrong, len(found) - wrong) >= count


def _at_most(count: int, planted: list[Planted], rng: np.random.Generator) -> list[Planted]:
    """All, or `count` at random, in their order."""
    return [planted[place] for place in sorted(rng.permutation(len(planted))[:count])]


def _written(writer: Writer, examples: Sequence[Example], start: int, samples: int) -> list[Planted]:
    """The answers to some rows from every beginning, judged."""
    beginnings = [each for example in examples for each in _usable(writer, example)]
    tries: list[Try] = []
    for place, stratum in reversed(list(enumerate(STRATA))):  # short continuations first
        some = [each for each in beginnings if each.stratum == stratum for _ in range(samples)]
        if some and not writer.late and not writer.given_up(stratum):
            tries += writer.continue_all(some, (start, place))
    writer.counts["rows"] += len({id(each.example) for each in beginnings})
    planted = []
    for each, wrong in _judged(writer, tries):
        example, stratum = each.beginning.example, each.beginning.stratum
        writer.judged[stratum, wrong] += 1
        planted.append(Planted(KIND, example.row, example.with_answer(each.answer), stratum, wrong))
    return planted


def _usable(writer: Writer, example: Example) -> list[Beginning]:
    beginnings = beginnings_of(writer.model, writer.tokenizer, example)
    writer.counts["unusable"] += not beginnings
    return beginnings


# ---- right or wrong


def _judged(writer: Writer, tries: Sequence[Try]) -> list[tuple[Try, bool]]:
    """The different answers, each with whether it is wrong; without those that cannot be told."""
    judged, unclear = list[tuple[Try, bool]](), list[Try]()
    for example in {id(each.beginning.example): each.beginning.example for each in tries}.values():
        own = [each for each in tries if each.beginning.example is example]
        most = majority([each.answer for each in own]) if ending_of(example.answer) is None else None
        for each in _different(own):
            wrong = ends_otherwise(example.answer, each.answer)
            if wrong is None and most is not None:
                wrong = ending_of(each.answer) != most
                writer.counts["by majority"] += 1
            if wrong is not None:
                judged.append((each, wrong))
            elif ending_of(example.answer) is None:
                unclear.append(each)
            else:
                writer.counts["undecided"] += 1
    writer.counts["by likelihood"] += len(unclear)
    return judged + list(zip(unclear, less_likely(writer, unclear), strict=True))


def _different(tries: Sequence[Try]) -> list[Try]:
    """The first of those with equal answers from one beginning."""
    first: dict[tuple[str, str], Try] = {}
    for each in tries:
        first.setdefault((each.beginning.stratum, each.answer.strip()), each)
    return list(first.values())


def ends_otherwise(own: str, answer: str) -> bool | None:
    """Whether an answer ends otherwise than the row's own; None where that cannot be told.

    It cannot be told where one of them has no end; where the row's own marks its end, such as with `####`, and the
    answer, right or wrong, does not, as it is a part of an answer then; and where the row's own has no mark, and its
    end stands in the last sentence of the answer: `Paris` and `The capital is Paris, of course.`
    """
    if answer.strip() == own.strip():
        return False
    end, other = ending_of(own), ending_of(answer)
    if end is None or other is None or (_marked(own) and not _marked(answer)):
        return None
    if end == other or _marked(own):
        return end != other
    last = next((part for part in reversed(SENTENCE.split(answer)) if part.strip()), "").casefold()
    if NUMBER.fullmatch(end):
        return None if end in {ending_of(each) for each in NUMBER.findall(last)} else True
    stands = re.search(rf"(?<!\w){re.escape(end)}(?!\w)", last) or (len(end) > 5 and end in re.sub(r"\s+", "", last))
    return None if stands else True


def _marked(text: str) -> bool:
    return bool(BOXED.search(text) or MARK.search(text))


def majority(answers: Sequence[str]) -> str | None:
    """The end of more than half of the answers, of two at least; None without one."""
    ends = Counter(end for answer in answers if (end := ending_of(answer)) is not None)
    most, times = max(ends.items(), key=lambda each: each[1], default=(None, 0))
    return most if times >= 2 and 2 * times > len(answers) else None


def less_likely(writer: Writer, tries: Sequence[Try]) -> list[bool]:
    """Whether the model finds its own words less likely than the row's, each with what precedes it, by mean loss."""
    found: list[bool] = []
    for start in range(0, len(tries), AT_ONCE):
        some = tries[start : start + AT_ONCE]
        beginnings = [each.beginning for each in some]
        rows, written = (
            mean_losses(writer.model, writer.tokenizer, beginnings, answers)
            for answers in ([each.example.answer for each in beginnings], [each.answer for each in some])
        )
        found += [bool(wrong) for wrong in rows < written]
    return found


# ---- what is told


def _notes(writer: Writer, found: Sequence[Planted], count: int, seconds: float) -> list[str]:
    counts, wrong = writer.counts, sum(each.faulty for each in found)
    right = len(found) - wrong
    notes = [
        f"The model continued the answers of {counts['rows']} rows, from nothing, a third and two thirds of each, "
        f"sampled with temperature {writer.temperature:g} and min_p {writer.min_p:g}: {wrong} ended wrongly and "
        f"{right} rightly, and can be compared."
    ]
    if counts["by majority"] or counts["by likelihood"]:
        notes.append(
            f"{counts['by majority'] + counts['by likelihood']} of these belong to rows without an end to compare: "
            f"{counts['by majority']} were told by the end of most samples of the prompt, {counts['by likelihood']} "
            "are wrong if the row's own words are more likely to the model, which says less."
        )
    if counts["unfinished"]:
        notes.append(
            f"{counts['unfinished']} continuations did not come to an end within {LONGER:g} times the length of the "
            "row's own, and were left out."
        )
    if counts["undecided"]:
        notes.append(f"{counts['undecided']} continuations have no end that can be compared, and were left out.")
    if counts["unusable"]:
        notes.append(
            f"{counts['unusable']} rows cannot be continued: they leave the model no room, or its chat template does "
            "not render their answers."
        )
    for stratum in filter(writer.given_up, STRATA):
        told = f"{writer.judged[stratum, True]} wrong and {writer.judged[stratum, False]} right"
        notes.append(
            f"Of the answers of which {GIVEN[stratum]} is given, {told} were found, and left out, as there is hardly "
            "anything to compare them with."
        )
    if writer.late and min(wrong, right) < count:
        notes.append(f"The time was over (seconds={seconds:g}): another run may find others.")
    if min(wrong, right) < count:
        notes.append(f"Fewer were found than the {count} wrong and {count} right ones that were asked for.")
    return notes
