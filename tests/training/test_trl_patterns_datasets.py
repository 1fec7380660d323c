"""Every kind of dataset that SFTTrainer takes: keeping all rows changes nothing, keeping half keeps the right ones."""

from __future__ import annotations

import pytest
from helpers.sft import Pattern, assert_right_rows, assert_untouched, patterns
from helpers.zen import SFT

QUICK = ("text", "messages and tools", "prompt-completion", "input_ids and assistant_masks")  # of "nothing changes"


@pytest.mark.parametrize("pattern", patterns({kind: Pattern(kind, slow=kind not in QUICK) for kind in SFT}))
def test_where_every_row_is_kept_nothing_changes(pattern, tmp_path):
    assert_untouched(pattern, tmp_path)


@pytest.mark.parametrize("pattern", patterns({kind: Pattern(kind) for kind in SFT}))
def test_where_half_is_kept_it_is_the_half_with_the_lower_scores(pattern, tmp_path):
    assert_right_rows(pattern, tmp_path)
