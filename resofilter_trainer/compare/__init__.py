"""Selectors against each other, with intervals and costs. Knows every selector and nothing of the command line."""
