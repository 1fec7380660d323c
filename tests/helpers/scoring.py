"""Rows to score, and the arguments of a pass over them."""

from __future__ import annotations

from trl import SFTConfig

from helpers.versions import arguments_here

ROWS = [{"question": f"what is {i} + {i % 5} ?", "answer": "so " * (i % 4) + str(i + i % 5)} for i in range(30)]


COLUMNS = {"prompt_column": "question", "completion_column": "answer"}


def arguments(**settings) -> SFTConfig:
    usual = {"bf16": False, "report_to": "none", "use_cpu": True}
    return SFTConfig(output_dir="unused", **arguments_here({**usual, **settings}))
