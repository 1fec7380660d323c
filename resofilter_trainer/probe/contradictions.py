"""Rows that other answers to the same prompt contradict. Knows examples, no signal.

They need no planting: where a dataset has several answers to a prompt, those that end alike are more often right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from ..data.endings import told_end
from .examples import Example

LEAST_ANSWERS = 3  # to a prompt, with an end that can be compared
AGREES, CONTRADICTED, UNTOLD = 0, 1, -1


def contradicted(examples: Sequence[Example]) -> np.ndarray:
    """(N,) for each row `CONTRADICTED` or `AGREES`, or `UNTOLD` where the answers to its prompt do not tell.

    They tell if there are three different ones or more whose end can be compared, and half of these or more, and more
    than of any other, end alike. Equal answers count once.
    """
    ends = [told_end(each.answer) for each in examples]
    of_prompt: dict[str, list[int]] = {}
    for number, each in enumerate(examples):
        if each.prompt.strip() and ends[number] is not None:
            of_prompt.setdefault(each.prompt.strip(), []).append(number)
    found = np.full(len(examples), UNTOLD)
    for numbers in of_prompt.values():
        different = {examples[number].answer.strip(): ends[number] for number in numbers}
        (most, times), *others = Counter(different.values()).most_common(2)
        alone = not others or times > others[0][1]
        if len(different) >= LEAST_ANSWERS and 2 * times >= len(different) and alone:
            for number in numbers:
                found[number] = AGREES if ends[number] == most else CONTRADICTED
    return found


def whole_prompts(order: np.ndarray, same_prompt: Mapping[int, int], rows: int, most: int) -> np.ndarray:
    """The first rows of an order, each followed by the others with its prompt, up to a number of rows.

    Args:
        order: (M,) rows, in random order.
        same_prompt: the first row with the same prompt, of each row that is not the first one.
        rows: the number of rows to take.
        most: the number of rows to take of one prompt at most, while there are others.
    """
    members: dict[Hashable, list[int]] = {}
    for row in order.tolist():
        members.setdefault(same_prompt.get(row, row), []).append(row)
    first = [row for group in members.values() for row in group[:most]]
    further = [row for group in members.values() for row in group[most:]]
    return np.array([*first, *further][:rows], dtype=np.int64)
