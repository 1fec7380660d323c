"""Comparisons of selectors, with intervals and costs. Knows every method, and nothing of the command line."""
