"""The table of signals in the documentation is what the columns say of themselves."""

from __future__ import annotations

import re
from pathlib import Path

from resofilter_trainer.scoring.further_signals import ALL_SIGNALS

PAGE = Path(__file__).parent.parent / "docs" / "signals.md"


def test_the_page_of_signals_has_each_as_its_column_says():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| (.*) \|$", PAGE.read_text(), flags=re.MULTILINE)
    found = {name: (formula.replace("\\|", "|"), unit, drop, source) for name, formula, unit, drop, source in rows}
    assert found == {name: (each.formula, each.unit, each.drop, each.source) for name, each in ALL_SIGNALS.items()}
