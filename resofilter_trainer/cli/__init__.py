"""The commands of `resofilter`. Knows arguments and files; the other packages do the work."""

from .entry import exit_on_input_error, main

__all__ = ["exit_on_input_error", "main"]
