"""The tables of what is refused in the documentation are the code's own lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resofilter_trainer.training.refusals import MEASURING, UNKNOWN_ROWS, WEIGHING
from resofilter_trainer.training.refused_uses import USES
from resofilter_trainer.training.stream_check import STREAMS

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"


@pytest.mark.parametrize(
    ("heading", "refusals"),
    [
        ("ResonanceCallback refuses", (*MEASURING, *USES)),
        ("ResonanceCallback refuses on a stream", STREAMS),
        ("SampleWeights refuses", (*UNKNOWN_ROWS, *WEIGHING)),
    ],
)
def test_the_page_of_engines_has_each_refusal_as_the_code_says(heading, refusals):
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", section, flags=re.MULTILINE)
    assert found[0] == ("refused", "reason", "way round")
    assert found[1:] == [(each.what, each.why, each.remedy) for each in refusals]


@pytest.mark.parametrize(
    "refusal", dict.fromkeys((*MEASURING, *USES, *STREAMS, *UNKNOWN_ROWS, *WEIGHING)), ids=lambda refusal: refusal.what
)
def test_a_refusal_is_one_line_with_a_reason_and_a_way_round(refusal):
    for text in (refusal.what, refusal.why, refusal.remedy):
        assert text
        assert not {"\n", "|"} & {*text}
        assert not text.endswith(".")
