"""The table of token rules in the documentation, and the names of the command, are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from resofilter_trainer.cli import clean
from resofilter_trainer.selecting.named_rules import RULES
from resofilter_trainer.selecting.token_rules import KNOWN

PAGE = (Path(__file__).parent.parent / "docs" / "token_rules.md").read_text()


def test_the_page_of_tokens_has_each_rule_as_the_code_says():
    lines = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|(.*)\| (\d) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert {name: [each.strip() for each in cells] for name, *cells in lines} == {
        name: [each.masks, each.formula, each.keeps, ", ".join(each.needs), str(each.forwards), each.source]
        for name, each in RULES.items()
    }


def test_the_page_of_tokens_has_what_a_rule_can_need():
    section = PAGE.split("## A rule of one's own\n")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \| .* \|$", section, flags=re.MULTILINE)) == KNOWN


def test_the_command_knows_every_rule():
    assert tuple(RULES) == clean.RULES
