"""Passes over a dataset: every row measured once, by any number of processes, resumable. Knows no Trainer."""
