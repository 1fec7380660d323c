"""The commands of `resofilter`. Knows arguments and files; the work is done by the packages above."""

from .entry import exit_on_input_error, main

__all__ = ["exit_on_input_error", "main"]
